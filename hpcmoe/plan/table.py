"""A plan as text and as JSON."""

from __future__ import annotations

from hpcmoe.config import to_dict
from hpcmoe.plan.candidates import MOST_ROWS, Candidate, Choices, job_of
from hpcmoe.plan.room import Room
from hpcmoe.plan.search import order, split
from hpcmoe.plan.trial import TERMS, Outcome
from hpcmoe.report.table import number, percent, size

FORMAT, VERSION = "hpcmoe-plan", 1
NEAR = 0.02   # of the front: points that differ less from the last one shown, in both, are left out of the table
HEADS = ("tokens/s/rank", "TPOT ms", "TTFT ms", "at once", "dp", "pp", "ep", "tp", "leaders", "copies", "micro", "lanes", "step rows", "transport", "GiB")


def words(c: Candidate) -> str:
    """A candidate in one line."""
    s, layout = c.shape, c.shape.layout
    copies = f" replicas={layout.replicas}" if layout.replicas else ""
    return (f"{layout}{copies}, leaders {layout.leaders}, {c.micros} micro-batch{'es' if c.micros > 1 else ''} on {c.lanes} lane{'s' if c.lanes > 1 else ''}, "
            f"{c.sequences:,} sequences at once, steps of {s.rows * s.leaders:,} rows, {_transport(c)}")


def _transport(c: Candidate) -> str:
    return "hierarchical" if c.shape.hierarchical else "flat"


# ---------------------------------------------------------------- text
def render(answer, model: str, cluster: str) -> str:
    """What is printed; answer: run.Answer."""
    sections = [_question(answer, model, cluster), _search(answer), _front(answer), _best(answer)]
    return "\n\n".join("\n".join(lines) for lines in sections if lines)


def _question(answer, model: str, cluster: str) -> list[str]:
    told = answer.told
    prompt, outputs = told.lengths[0]
    return [f"Plan      {model} on {told.gpus} ranks of {told.cluster.name} ({cluster})",
            f"work      prompts of {prompt:,} tokens, outputs of {outputs:,}; up to {len(told.lengths):,} requests at once",
            f"load      of experts: {told.load}; kernels as calibrated on {told.calibration.machine}"]


def _search(answer) -> list[str]:
    found = answer.found
    memory = found.refused["memory"]
    fitting, clocked = len(found.bounds), len(found.outcomes)
    lines = [f"{'Search':<34}{'layouts':>12}{'candidates':>12}",
             f"  {'that the engine takes':<32}{found.layouts:>12,}{fitting + memory:>12,}"]
    lines += [f"  {'refused: ' + why:<32}{count:>12,}" for why, count in sorted(found.refused.items()) if why != "memory" and count]
    return lines + [f"  {'refused: memory of a rank':<32}{'':>12}{memory:>12,}",
                    f"  {'cannot win, by a bound':<32}{'':>12}{fitting - clocked:>12,}",
                    f"  {'simulated':<32}{'':>12}{clocked:>12,}"]


def _front(answer) -> list[str]:
    shown, last = [], None
    for o in answer.front:
        near = last and _near(o.tpot_ms, last.tpot_ms) and _near(o.tokens_per_s_per_gpu, last.tokens_per_s_per_gpu)
        if not near or o is answer.best:
            shown, last = shown + [o], o
    room = Room(answer.told)
    rows = [HEADS] + [_cells(o, room) + ("<- best" if o is answer.best else "",) for o in shown]
    wide = [max(len(row[i]) for row in rows) for i in range(len(HEADS))]
    left = len(answer.front) - len(shown)
    head = "Output tokens/s per rank against TPOT: no other candidate has more at no more TPOT"
    return [head + (f"; {left} more differ by less than {100 * NEAR:.0f} %" if left else "")] + \
        [("  " + "  ".join(f"{cell:>{w}}" for cell, w in zip(row, wide)) + "  " + "".join(row[len(HEADS):])).rstrip() for row in rows]


def _near(a: float, b: float) -> bool:
    return abs(a - b) <= NEAR * max(a, b)


def _cells(o: Outcome, room: Room) -> tuple[str, ...]:
    c, needs = o.candidate, room.needs(o.candidate)
    held = (needs.weights + needs.buffers + needs.kv) / 2**30
    return (number(o.tokens_per_s_per_gpu), _ms(o.tpot_ms), _ms(o.ttft_ms), f"{c.sequences:,}", *map(str, split(c)), c.shape.layout.leaders,
            str(c.shape.layout.replicas), str(c.micros), str(c.lanes), f"{c.shape.rows * c.shape.leaders:,}", _transport(c), f"{held:.3g}")


def _ms(value: float) -> str:
    return number(value) if value else "-"


def _best(answer) -> list[str]:
    best, second, gpus = answer.best, answer.second, answer.told.gpus
    limit = f" within a TPOT of {answer.tpot_ms:g} ms" if answer.tpot_ms is not None else ""
    lines = [f"Best{limit}: {words(best.candidate)}",
             f"  {number(best.tokens_per_s_per_gpu * gpus)} output tokens/s, {number(1e6 / best.tokens_per_s_per_gpu)} rank-seconds per million; "
             f"TPOT {_ms(best.tpot_ms)} ms, TTFT {_ms(best.ttft_ms)} ms"]
    if second is None:
        return lines + [f"  no other layout{limit}"]
    lines += [f"Runner-up, of the other layouts{limit}: {words(second.candidate)}", "",
              f"{'Where a rank is, us per output token':<38}{'best':>14}{'runner-up':>14}{'difference':>14}"]
    both = list(zip(TERMS, best.terms_us, second.terms_us))
    both.append(("together: 1e6 / tokens/s per rank", 1e6 / best.tokens_per_s_per_gpu, 1e6 / second.tokens_per_s_per_gpu))
    both = [(name, *(0.0 if abs(x) < 1e-9 * both[-1][1] else x for x in (a, b, b - a))) for name, a, b in both]
    lines += [f"  {name:<36}{number(a):>14}{number(b):>14}{'+' * (more > 0) + number(more):>14}" for name, a, b, more in both if a or b]
    lines += [f"  {name:<36}{a:>14}{b:>14}" for name, a, b in (
        ("TPOT, ms", _ms(best.tpot_ms), _ms(second.tpot_ms)),
        ("busiest link", f"{percent(best.link_share)}", f"{percent(second.link_share)}"),
        ("that is a", best.link, second.link),
        ("memory of a rank left", *(_left(answer, o) for o in (best, second))))]
    lines += [f"  {'a batch twice as large: ' + name:<36}{_larger(answer, o)}" for name, o in (("best", best), ("runner-up", second))]
    name, _, _, more = max(both[:-1], key=lambda row: row[3])
    return lines + ["", f"The runner-up lost by {number(both[-1][3])} us per output token; what it needs more of, most of all: {name}, {number(more)} us."]


def _left(answer, o: Outcome) -> str:
    return size(-Room(answer.told).needs(o.candidate).over)


def _larger(answer, o: Outcome) -> str:
    """What stops a batch of twice as many sequences per leader."""
    c = o.candidate
    shape = c.shape._replace(sequences=2 * c.shape.sequences, rows=max(c.shape.rows, 2 * c.shape.sequences))
    twice = c._replace(shape=shape)
    choices = Choices(answer.told, set())
    if not choices.takes_batch(twice):
        return f"more than the {len(answer.told.lengths):,} requests"
    over = Room(answer.told).needs(twice).over
    if over > 0:
        return f"memory: {size(over)} more than there is"
    def same(x) -> bool:
        return x.candidate[1:] == c[1:] and x.candidate.shape._replace(rows=0) == shape._replace(rows=0)

    clocked = sorted(filter(same, answer.found.outcomes), key=lambda o: o.tpot_ms)
    bounds = sorted(filter(same, answer.found.bounds), key=order)
    if clocked:
        return f"{number(clocked[0].tokens_per_s_per_gpu)} tokens/s per rank at a TPOT of {_ms(clocked[0].tpot_ms)} ms"
    if not bounds:
        return f"not tried: steps of more than {MOST_ROWS:,} rows, or than run.batch_tokens"
    return f"at most {number(bounds[0].tokens_per_s_per_gpu)} tokens/s per rank, at a TPOT of at least {_ms(bounds[0].tpot_ms)} ms"


# ---------------------------------------------------------------- JSON
COLUMNS = ("dp", "pp", "ep", "tp", "leaders", "replicas", "transport", "micro_batches", "lanes", "batch_tokens", "sequences_at_once",
           "tokens_per_s_per_gpu_at_most", "tpot_at_least_ms", "tokens_per_s_per_gpu", "tpot_ms", "ttft_ms", "run_s")


def as_json(answer, model: str, cluster: str) -> dict:
    """Everything: the question, the counts, all candidates that fit (bounds, and outcomes of those that were simulated), the front, the best."""
    told, found = answer.told, answer.found
    outcome = {o.candidate: o for o in found.outcomes}
    rows = [[*_facts(b.candidate), b.tokens_per_s_per_gpu, b.tpot_ms, *_figures(outcome.get(b.candidate))] for b in found.bounds]
    prompt, outputs = told.lengths[0]
    return {
        "format": FORMAT, "format_version": VERSION,
        "question": {"model": model, "cluster": cluster, "gpus": told.gpus, "prompt_tokens": prompt, "output_tokens": outputs,
                     "sequences": len(told.lengths), "load": told.load, "tpot_limit_ms": answer.tpot_ms, "calibration": told.calibration.machine},
        "layouts": found.layouts, "refused": dict(found.refused), "bounded_away": len(found.bounds) - len(found.outcomes), "simulated": len(found.outcomes),
        "columns": COLUMNS, "candidates": rows,
        "front": [_answer(o) for o in answer.front], "best": _answer(answer.best), "runner_up": _answer(answer.second) if answer.second else None,
        "job": to_dict(job_of(told, answer.best.candidate)),
    }


def _facts(c: Candidate) -> tuple:
    s, layout = c.shape, c.shape.layout
    return (*split(c), layout.leaders, layout.replicas, _transport(c), c.micros, c.lanes, s.rows * s.leaders, c.sequences)


def _figures(o: Outcome | None) -> tuple:
    return (None,) * 4 if o is None else (o.tokens_per_s_per_gpu, o.tpot_ms, o.ttft_ms, o.run_s)


def _answer(o: Outcome) -> dict:
    facts = dict(zip(COLUMNS, _facts(o.candidate)))
    figures = dict(zip(COLUMNS[-4:], _figures(o)))
    return facts | figures | {"gpu_us_per_output_token": dict(zip(TERMS, o.terms_us)), "busiest_link": o.link, "busiest_link_share": o.link_share}
