"""What `hpcmoe plan` does: reads what it is told, searches, prints and writes the answer."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import NamedTuple

from hpcmoe.errors import EXIT_OK, UserError, at
from hpcmoe.files import check_folder, replacing
from hpcmoe.plan import table
from hpcmoe.plan.candidates import Candidate, Choices, Shape
from hpcmoe.plan.room import Room
from hpcmoe.plan.script import job_toml, sbatch
from hpcmoe.plan.search import Found, front, order, runner_up, search, within
from hpcmoe.plan.trial import Outcome
from hpcmoe.report import plots
from hpcmoe.report.table import size
from hpcmoe.simulate import run as simulate_run
from hpcmoe.simulate.run import Told

PER_GPU = 256    # requests, where nothing is said
EVERY_S = 5.0    # between lines of progress
SEARCHED = ("layout.dp", "layout.pp", "layout.ep", "layout.tp", "layout.leaders", "layout.replicas", "run.micro_batches", "run.lanes",
            "run.batch_tokens", "run.max_sequences", "run.transport")
REFUSED = ("layout.placement", "run.schedule", "throughput.sequences", "throughput.prompt_tokens", "throughput.output_tokens")


class Answer(NamedTuple):
    """front: the outcomes that none beats, fastest first; best: the fastest within the limit; second: the best of another layout, if there is."""

    told: Told
    found: Found
    front: list[Outcome]
    best: Outcome
    second: Outcome | None
    tpot_ms: float | None


def run(args) -> int:
    """Runs `plan`; its exit code. Raises UserError for whatever the user can mend."""
    told, fixed = read(args)
    for warning in told.warnings:
        print(f"hpcmoe: warning: {warning}", file=sys.stderr, flush=True)
    begin = time.monotonic()
    answer = plan(told, fixed, args.tpot_ms, _Progress(), args.processes)
    print(table.render(answer, args.model, args.cluster))
    print(f"searched in {time.monotonic() - begin:.1f} s", file=sys.stderr)
    _write(args, answer)
    return EXIT_OK


def read(args) -> tuple[Told, set[str]]:
    """(what is told, as a simulation is told it: its requests are the most that run at once; keys of the job that are not searched)."""
    for name in ("out", "plot", "script"):
        if getattr(args, name):
            check_folder(Path(getattr(args, name)).parent)
    if args.plot:
        plots.check()
    if args.tpot_ms is not None and not 0 < args.tpot_ms < math.inf:
        raise at("command line", "--tpot-ms", args.tpot_ms, "a number of ms > 0")
    if args.processes is not None and args.processes < 1:
        raise at("command line", "--processes", args.processes, "a number >= 1")
    keys = {text.partition("=")[0].strip() for text in args.sets}
    for key in REFUSED:
        if key in keys:
            raise at("command line", "--set", key, "another key: plan does not take it (work is said by --sequences, --prompt-tokens, --output-tokens)")
    args.requests = args.output = args.trace = None
    if args.sequences is None:
        args.sequences = PER_GPU * max(1, args.gpus)
    told = simulate_run.read(args)
    for name, value in (("--tpot-ms", args.tpot_ms), ("--plot", args.plot)):
        if value is not None and told.lengths[0][1] == 1:
            raise at("command line", name, value, "--output-tokens >= 2: one token has no TPOT")
    return told, (keys & set(SEARCHED)) - _open_keys(told)


def _open_keys(told: Told) -> set[str]:
    """Keys that a job leaves open with these values."""
    layout, run_ = told.job.layout, told.job.run
    values = {f"layout.{name}": getattr(layout, name) for name in ("dp", "pp", "ep", "tp")}
    values |= {f"run.{name}": getattr(run_, name) for name in ("micro_batches", "lanes", "max_sequences")}
    return {key for key, value in values.items() if value == 0} | ({"run.transport"} if run_.transport == "auto" else set())


def plan(told: Told, fixed: set[str], tpot_ms: float | None, say, processes: int | None = None) -> Answer:
    """The answer. Raises UserError where nothing fits, or nothing keeps the limit."""
    found = search(told, fixed, tpot_ms, say, processes)
    if not found.bounds:
        raise UserError(_nothing(told, fixed, found))
    kept = within(found.outcomes, tpot_ms)
    if not kept:
        least = min(found.outcomes, key=lambda o: (o.tpot_ms, *order(o)))
        raise at("command line", "--tpot-ms", tpot_ms, f"at least {least.tpot_ms:.4g}, the least TPOT of all: {table.words(least.candidate)}, "
                 f"with {least.tokens_per_s_per_gpu:.4g} tokens/s per rank")
    return Answer(told, found, front(found.outcomes), kept[0], runner_up(found.outcomes, tpot_ms), tpot_ms)


# ---------------------------------------------------------------- where nothing fits
def _nothing(told: Told, fixed: set[str], found: Found) -> str:
    """By how much the layout that lacks least does not fit, and on how many GPUs one would."""
    where = f"{told.job.weights.file} on {told.gpus} ranks of {told.cluster.name}"
    if found.least is None:
        why = ", ".join(f"{count} layouts: {reason}" for reason, count in found.refused.items() if count)
        return f"{where}: no candidate" + (f" ({why})" if why else "") + ": expected keys of --set and --sequences that leave some"
    c, needs = found.least
    usable = Room(told).usable
    text = (f"{where}: no layout fits: the one that lacks least, {table.words(c)}, needs {size(needs.over)} more than the {size(usable)} that a rank "
            f"can use (weights {size(needs.weights)}, buffers {size(needs.buffers)}, KV cache {size(needs.kv)})")
    count = told.gpus
    while (count := count * 2) <= told.cluster.ranks:
        fits = _first_fit(told._replace(gpus=count))
        if fits:
            return f"{text}; on {count} ranks this would fit: {table.words(fits)}"
    return f"{text}; no layout of up to {told.cluster.ranks} ranks, those of the cluster, was found to fit"


def _first_fit(told: Told) -> Candidate | None:
    """A candidate of one sequence per leader that fits, if any does."""
    room, choices = Room(told), Choices(told, set())
    for layout in choices.layouts:
        leaders = len(layout.leader_places(choices.node_r, 0)[0])
        c = Candidate(Shape(layout, leaders, False, 1, max(1, 1024 // leaders)), 1, 1)
        if room.needs(c).over <= 0:
            return c
    return None


# ---------------------------------------------------------------- what is written
class _Progress:
    """A line now and then, of a search that takes long."""

    def __init__(self):
        self.begin = self.last = time.monotonic()

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if now >= self.last + EVERY_S:
            self.last = now
            print(f"hpcmoe: plan: {done} of {total} {what}, {now - self.begin:.0f} s", file=sys.stderr, flush=True)


def _write(args, answer: Answer) -> None:
    best = answer.best.candidate
    if args.out:
        _text(args.out, json.dumps(table.as_json(answer, args.model, args.cluster), indent=None, separators=(",", ":")) + "\n")
        print(f"all candidates in {args.out}")
    if args.plot:
        points = [(o.tpot_ms, o.tokens_per_s_per_gpu) for o in answer.found.outcomes]
        line = [(o.tpot_ms, o.tokens_per_s_per_gpu) for o in answer.front]
        marks = [("best", answer.best.tpot_ms, answer.best.tokens_per_s_per_gpu)]
        marks += [("runner-up", answer.second.tpot_ms, answer.second.tokens_per_s_per_gpu)] if answer.second else []
        print(f"picture in {plots.plot_front(points, line, marks, answer.tpot_ms, args.plot)}")
    script = Path(args.script or "plan.sbatch")
    job = script.with_suffix(".toml")
    texts = {job: job_toml(answer.told, best, args.cluster), script: sbatch(answer.told, best, args.cluster, job)}
    for path, text in texts.items():
        if args.script:
            _text(path, text)
        else:
            print(f"\n--- {path}\n{text}", end="")
    if args.script:
        print(f"job in {job}; start it with: sbatch {script}")


def _text(path, text: str) -> None:
    with replacing(path) as temporary:
        Path(temporary).write_text(text, encoding="utf-8")
