"""What the paper left on the table: batches in flight, lanes, node-aware exchange, copies of hot experts; and how far that goes on its 64 GPUs."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from hpcmoe.paper import roofline
from hpcmoe.paper.claims import Claim
from hpcmoe.paper.constants import ASSUMED, MUCH, free, network, no_network
from hpcmoe.paper.setup import BATCH, GPUS, Setup, resized
from hpcmoe.paper.steady import Case, Machine, Steady
from hpcmoe.paper.words import Section, layout_name, ms, percent, rate, table, us
from hpcmoe.parallel.layout import Layout
from hpcmoe.report.plots import Series, plot_series

GOAL, LIMIT_S = 1.8e6, 2.4e-3  # four times the paper's tokens/s, at no more than about its TPOT
SKEWS = (None, 0.0, 1.01, 1.2)
NOT = ("does not fit", "-", "-", "-")
NEAR = 2.0  # those within so many times the limit are clocked again with constants free
IN_FLIGHT = (1024, 1536, 2048, 2560, 3072, 4096, 6144, 8192, 16384)  # on one lane; on two every other


class Tried(NamedTuple):
    case: Case
    own: Steady


def untapped(setup: Setup, proposal: Claim, pictures: Path) -> Section:
    found = search(setup)
    plot_series([Series("all layouts tried", [1e3 * t.own.tpot_s for t in found], [t.own.tokens_per_s / 1e6 for t in found], ".", ""),
                 Series("best of them", *zip(*[(1e3 * t.own.tpot_s, t.own.tokens_per_s / 1e6) for t in pareto(found)]), "o", "-"),
                 Series("the paper", [1e3 * proposal.tpot_s], [proposal.tokens_per_s / 1e6], "*", ""),
                 Series("the goal", [1e3 * LIMIT_S], [GOAL / 1e6], "x", "")],
                ("TPOT, ms", f"million tokens/s on {GPUS} GPUs"), pictures / "paper-goal.svg", logarithmic="x")
    searched, met = _searched(setup, found)
    text = f"""## 3. What the paper left on the table

All on the same {GPUS} GPUs. TPOT of a sequence is one round of its batch through all stages, also where other batches fill them meanwhile.

{_ladder(setup, proposal)}
### Skew, and copies of hot experts

{_skewed(setup)}
### {GOAL / 1e6:.1f} M tokens/s at {ms(LIMIT_S)} ms?

{_bounds(setup)}
{searched}
![Every layout tried](pictures/paper-goal.svg)

{setup.rests()}"""
    within, most = ([t for t in found if t.own.tpot_s <= LIMIT_S], max(found, key=lambda t: t.own.tokens_per_s))
    best = max(within, key=lambda t: t.own.tokens_per_s, default=None)
    return Section(text, f"The goal of {GOAL / 1e6:.1f} M tokens/s within {ms(LIMIT_S)} ms on {GPUS} GPUs is {'met' if met else 'not met'}: "
                   + (f"the most within the limit is {rate(best.own.tokens_per_s)} ({layout_name(best.case.layout)})" if best else
                      f"of the batches and layouts tried none comes within the limit (the nearest {ms(min(t.own.tpot_s for t in found))} ms)")
                   + f", the most of all {rate(most.own.tokens_per_s)} at {ms(most.own.tpot_s)} ms ({layout_name(most.case.layout)}).")


# ---------------------------------------------------------------- one change after the other
def _ladder(setup: Setup, proposal: Claim) -> str:
    cases = [("one batch in flight, as the paper", setup.proposal()),
             ("4 in flight, one per stage", setup.proposal(micros=4)),
             ("8 in flight", setup.proposal(micros=8)),
             ("8 in flight, two lanes: a stage interleaves two", setup.proposal(micros=8, lanes=2)),
             (f"8 of {BATCH // 2} in flight, two lanes", setup.proposal(BATCH // 2, 8, lanes=2)),
             ("4 in flight, node-aware exchange", setup.proposal(micros=4, hierarchical=True)),
             (f"4 of {2 * BATCH:,} in flight", setup.proposal(2 * BATCH, 4)),
             (f"8 of {2 * BATCH:,} in flight, two lanes", setup.proposal(2 * BATCH, 8, lanes=2)),
             (f"4 of {4 * BATCH:,} in flight", setup.proposal(4 * BATCH, 4)),
             (f"4 of {4 * BATCH:,} in flight, node-aware exchange", setup.proposal(4 * BATCH, 4, hierarchical=True)),
             (f"8 of {4 * BATCH:,} in flight, two lanes", setup.proposal(4 * BATCH, 8, lanes=2))]
    rows = []
    for (words, case), own in zip(cases, setup.clock([case for _, case in cases])):
        if own:
            busy = sum(own.device_s.values()) / case.layout.pp / own.tpot_s
            cells = [rate(own.tokens_per_s), f"{own.tokens_per_s / proposal.tokens_per_s:.2f}", ms(own.tpot_s), percent(busy)]
        rows.append([words, f"{case.batch * case.micros:,}", *(cells if own else NOT)])
    head = [f"{layout_name(setup.proposal().layout)}, {BATCH:,} tokens per batch unless it says otherwise", "tokens in flight", "tokens/s", "x paper's", "TPOT, ms",
            "part of the time that kernels run"]
    return table(head, rows) + """
Every batch makes its stage read all its weights again, so TPOT is at least max(stages, batches in flight) x the time of a stage: up to one batch per stage pipelining costs no
TPOT but what the busiest stage has more than the others; further ones, on two lanes or not, are paid with TPOT. Larger batches use the weights better. Lanes hide messages behind
the other batch's kernels.
"""


def _skewed(setup: Setup) -> str:
    experts = setup.model.router.experts
    layouts = [Layout(1, 4, experts), Layout(1, 2, GPUS // 2, 1, "all", GPUS // 2 - experts), Layout(1, 1, GPUS, 1, "all", GPUS - experts)]
    cases = [setup.case(layout, tokens // layout.pp, layout.pp, skew=skew) for tokens in (4 * BATCH, 16 * BATCH) for skew in SKEWS for layout in layouts]
    own = iter(setup.clock(cases))
    rows = []
    for tokens in (4 * BATCH, 16 * BATCH):
        for skew in SKEWS:
            found = [next(own) for _ in layouts]
            cells = [text for one in found for text in ((rate(one.tokens_per_s), ms(one.tpot_s), f"{one.busiest:.2f}") if one else NOT[:3])]
            rows.append([f"{tokens:,}", "even" if skew is None else f"{skew:g}", *cells])
    head = ["tokens in flight", "skew"] + [text for layout in layouts for text in (f"{layout_name(layout)}: tokens/s", "TPOT, ms", "busiest / mean")]
    return ("As many micro-batches in flight as stages. Skew: exponent of a power law, by which each layer's tokens draw their experts (0: all alike, with the chance of "
            "a draw; even: without). Copies and seats are planned for the load ([balance.md](balance.md)). Busiest / mean: rows of ranks, in the layer where that is "
            "worst.\n\n" + table(head, rows))


# ---------------------------------------------------------------- what stops it
def _bounds(setup: Setup) -> str:
    """In closed form: of the paper's layout, and of any."""
    case, lines = setup.proposal(), []
    needed = GOAL * LIMIT_S
    for words, rates in (("at the data sheet's rates", setup.sheet), ("at the rates that are reached", setup.reached)):
        p = roofline.parts(case, rates, setup.ranks_per_node)
        weights, all_s = roofline.weights_s(case, p), roofline.tpot_s(case, p)
        verdict = "more than the limit by itself" if weights > LIMIT_S else "more than the limit" if all_s > LIMIT_S else f"{us((LIMIT_S - all_s) / case.model.layers)} us per layer below the limit"
        lines.append(f"- {words}: weights {ms(weights)} ms, with cache and messages {ms(all_s)} ms: {verdict}.")
    any_s = [_any_layout_s(setup, needed, rates) for rates in (setup.sheet, setup.reached)]
    return f"""The goal needs {needed:,.0f} tokens in flight. In the paper's layout a sequence waits for a whole expert and a whole attention in each layer, with however many batches
in flight, and that alone takes at batches of {BATCH:,}

{chr(10).join(lines)}

Were weights divided evenly over all {GPUS} GPUs in every layer (each reads 1/{GPUS} of a layer at a time), reading them and the arithmetic of {needed:,.0f} tokens would take
{ms(any_s[0])} ms by the data sheet, {ms(any_s[1])} ms at reached rates{", which does not forbid the goal" if max(any_s) < LIMIT_S else ""}. But who divides, sends more (each tensor shard sends whole
rows, as the engine does). The roofline of section 1 with these tokens in flight, one batch per stage, for every layout in one replica; what is left of the limit has to hold
launches, waits for the device, norms, latencies:

{_bound_table(setup, needed)}"""


def layouts(setup: Setup) -> list[Layout]:
    """Those of 64 GPUs in one replica, with copies where places are more than experts."""
    found = []
    for pp in (1, 2, 4):
        for tp in (1, 2, 4, 8):
            ep = GPUS // pp // tp
            found.append(Layout(1, pp, ep, tp, "all", max(0, ep - setup.model.router.experts)))
    return found


def _bound_table(setup: Setup, tokens: float) -> str:
    rows = []
    for layout in layouts(setup):
        case, cells = setup.case(layout, round(tokens / layout.pp), layout.pp), []
        for rates in (setup.sheet, setup.reached):
            p = roofline.parts(case, rates, setup.ranks_per_node)
            bound, layers = roofline.tpot_s(case, p), case.model.layers
            spare = f"{us((LIMIT_S - bound) / layers)} us per layer left" if bound <= LIMIT_S else "forbids it"
            cells += [ms(layers * (p.attention + p.expert + p.cache) + p.head), ms(layers * (p.exchange + p.sums) + (layout.pp - 1) * p.hand_on), ms(bound), spare]
        rows.append([layout_name(layout), *cells])
    return table(["layout", *["data sheet: memory and arithmetic, ms", "messages", "TPOT >=", "goal"], *["reached: memory and arithmetic, ms", "messages", "TPOT >=", "goal"]], rows)


def _any_layout_s(setup: Setup, tokens: float, r: roofline.Rates) -> float:
    """Reading all weights, or all arithmetic, whichever is longer, shared by all GPUs."""
    m, a = setup.model, setup.model.attention
    dense, one = m.d * (2 * a.heads + 2 * a.kv_heads) * a.head_dim, (2 + m.expert.gated) * m.d * m.expert.f
    numbers = m.layers * (dense + m.router.experts * one) + m.vocab * m.d
    used = m.layers * (dense + m.router.top_k * one) + m.vocab * m.d
    return max(r.item * numbers / r.memory, 2 * tokens * used / r.flop) / GPUS


def search(setup: Setup) -> list[Tried]:
    """Every layout of 64 GPUs in one replica, with one micro-batch per stage and with two on two lanes; node-aware exchange where experts are
    whole."""
    cases = []
    for layout in layouts(setup):
        for lanes in (1, 2):
            micros = layout.pp * lanes
            for tokens in IN_FLIGHT[::lanes]:
                for hierarchical in ((False, True) if layout.tp == 1 else (False,)):
                    cases.append(setup.case(layout, tokens // micros, micros, lanes=lanes, hierarchical=hierarchical))
    return clocked(setup, cases, setup.machine)


def clocked(setup: Setup, cases: list[Case], machine: Machine) -> list[Tried]:
    """Those that fit."""
    return [Tried(case, own) for case, own in zip(cases, setup.clock(cases, machine)) if own]


def pareto(found: list[Tried]) -> list[Tried]:
    """Those that no other beats in both, by TPOT."""
    best: list[Tried] = []
    for one in sorted(found, key=lambda t: (t.own.tpot_s, -t.own.tokens_per_s)):
        if not best or one.own.tokens_per_s > best[-1].own.tokens_per_s:
            best.append(one)
    return best


def _searched(setup: Setup, found: list[Tried]) -> tuple[str, bool]:
    """(what the search found, whether the goal is met)"""
    rows = [[layout_name(t.case.layout), f"{t.case.micros} of {t.case.batch:,}", str(t.case.lanes), "node-aware" if t.case.hierarchical else "straight",
             rate(t.own.tokens_per_s), f"{1e3 * t.own.tpot_s:.3f}"] for t in pareto(found)]
    text = (f"{len(found)} combinations of layout, lanes, exchange and {IN_FLIGHT[0]:,} to {IN_FLIGHT[-1]:,} tokens in flight that fit in memory, even load; those that "
            "no other beats in both:\n\n" + table(["layout", "batches", "lanes", "exchange", "tokens/s", "TPOT, ms"], rows))
    near = [t.case for t in found if t.own.tpot_s <= NEAR * LIMIT_S]
    lines = [("with all constants as they are", found)] + [(words, clocked(setup, near, machine)) for words, machine in (
        ("with all that is assumed free", free(setup.machine, setup.of(ASSUMED))), ("with latencies and host time of messages free", network(setup.machine, 1, waits=False)),
        ("with links without limit", network(setup.machine, MUCH)), ("with messages free", no_network(setup.machine)))]
    rows = []
    for words, tried in lines:
        within = [t for t in tried if t.own.tpot_s <= LIMIT_S]
        fast = [t for t in tried if t.own.tokens_per_s >= GOAL]
        best, least = max(within, key=lambda t: t.own.tokens_per_s, default=None), min(fast, key=lambda t: t.own.tpot_s, default=None)
        met = any(t.own.tokens_per_s >= GOAL for t in within)
        rows.append([words, *_cells(best, lambda own: f"{own.tokens_per_s / 1e6:.3f} M"), *_cells(least, lambda own: f"{1e3 * own.tpot_s:.3f} ms"), "yes" if met else "no"])
    met = rows[0][-1] == "yes"
    text += f"\n**The goal is {'met' if met else 'not met'}.** " + ("" if met else "What stops it shows where it would be met:") + "\n\n"
    text += table(["", f"most tokens/s within {ms(LIMIT_S)} ms", "by", f"least TPOT from {GOAL / 1e6:.1f} M tokens/s", "by", "met"], rows)
    return text + "\n" + _narrower(setup), met


def _cells(tried: Tried | None, say) -> tuple[str, str]:
    if tried is None:
        return "none", ""
    return say(tried.own), f"{layout_name(tried.case.layout)}, {tried.case.micros} of {tried.case.batch:,}"


def _narrower(setup: Setup) -> str:
    """The paper's layout with a batch on every stage: what fits within the limit, by expert width."""
    f = setup.model.expert.f
    widths, batches = [f, f // 2, f // 4, f // 8], (256, 512, 768, 1024, 1536, 2048, 3072, 4096)
    cases = [setup.proposal(batch, 4, model=resized(setup.model, f=width)) for width in widths for batch in batches]
    own, rows = iter(setup.clock(cases)), []
    for width in widths:
        tried = [(batch, one) for batch in batches if (one := next(own))]
        within = [(one.tokens_per_s, batch, one) for batch, one in tried if one.tpot_s <= LIMIT_S]
        least = min((one.tpot_s for _, one in tried), default=float("inf"))
        best = max(within, default=None, key=lambda x: x[0])
        rows.append([f"{width:,}", ms(least), *((f"4 of {best[1]:,}", rate(best[0]), ms(best[2].tpot_s)) if best else ("none", "-", "-"))])
    return (f"With the paper's layout, 4 batches of {batches[0]} to {batches[-1]:,} tokens in flight, narrower experts:\n\n"
            + table(["expert width", "least TPOT, ms", f"best within {ms(LIMIT_S)} ms", "tokens/s", "TPOT, ms"], rows))
