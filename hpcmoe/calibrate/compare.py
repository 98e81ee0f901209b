"""Real runs beside what the simulator predicts of them: `hpcmoe calibrate compare`.

A comparison file names a job and settings of it. Each is run in a process of its own, or under mpiexec, some times by turns; its report
carries the prediction (predicting.py), so that what is judged is what every run prints.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

from hpcmoe import memory
from hpcmoe.bench import jobs
from hpcmoe.bench.timing import Deadline
from hpcmoe.config import from_dict
from hpcmoe.errors import UserError, at
from hpcmoe.files import read_toml

RUN_S = 600.0


@dataclass(frozen=True)
class Setting:
    """A run: of so many ranks, with these keys of the job; seen: whether the simulator was mended or fitted with a look at it."""

    name: str
    ranks: int
    sets: tuple[str, ...] = ()
    seen: bool = False


@dataclass(frozen=True)
class Comparison:
    """A comparison file. job: a job file, its path as for `hpcmoe run`."""

    job: str
    setting: tuple[Setting, ...]


@dataclass(frozen=True)
class Compared:
    """What came of a setting, medians over its runs, or of the run with the median TPS. tps, tpot_ms, elapsed_s: (predicted, measured);
    phases: sum of |predicted - measured| over phases / elapsed. reason: why there is no prediction, or ""."""

    setting: Setting
    runs: int
    tps: tuple[float, float] = (0.0, 0.0)
    tpot_ms: tuple[float | None, float | None] = (None, None)
    elapsed_s: tuple[float, float] = (0.0, 0.0)
    phases: float = 0.0
    spread: float = 0.0
    reason: str = ""

    @property
    def error(self) -> float:
        """Of TPS: predicted / measured - 1."""
        return self.tps[0] / self.tps[1] - 1


def read_comparison(path: str) -> Comparison:
    """A comparison file. Raises UserError naming file, key and value."""
    found = from_dict(Comparison, read_toml(path), path)
    if not found.setting:
        raise UserError(f"{path}: setting is missing: expected at least one [[setting]]")
    for i, setting in enumerate(found.setting):
        if setting.ranks < 1:
            raise at(path, f"setting[{i}].ranks", setting.ranks, "a number >= 1")
        for text in setting.sets:
            if "=" not in text:
                raise at(path, f"setting[{i}].sets", text, "key=value, for instance run.lanes=2")
    return found


def launcher() -> str:
    """The mpiexec of this Python's environment, or else of the machine. Raises UserError where there is none."""
    mine = os.path.join(sys.prefix, "bin", "mpiexec")
    found = mine if os.path.exists(mine) else shutil.which("mpiexec")
    if not found:
        raise UserError("no mpiexec beside this Python or on the path: settings of several ranks cannot run; expected --mpiexec COMMAND")
    return found


def compare(comparison: Comparison, cluster: str, mpiexec: str, repeats: int, only: str, tell: Callable[[str], None]) -> list[Compared]:
    """Runs all settings whose name contains `only`, `repeats` times, by turns. Raises UserError where one fails."""
    chosen = [s for s in comparison.setting if only in s.name]
    if not chosen:
        raise UserError(f"--only {only}: no setting's name contains it")
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):  # a core for each rank, as calibrations have it
        os.environ[name] = "1"
    reports: dict[str, list[dict]] = {s.name: [] for s in chosen}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(repeats):
            for s in chosen:
                reports[s.name].append(_run(comparison.job, s, cluster, mpiexec, Path(folder) / "out"))
                tell(f"{s.name}: {reports[s.name][-1]['throughput']['output_tokens_per_s']:,.0f} tokens/s")
    return [_compared(s, reports[s.name]) for s in chosen]


def _run(job: str, s: Setting, cluster: str, mpiexec: str, out: Path) -> dict:
    command = [mpiexec, "-n", str(s.ranks)] if s.ranks > 1 else []
    command += [sys.executable, "-m", "hpcmoe", "run", job, "--quiet", "--cluster", cluster, "--output", str(out), "--set", "output.show_text=false"]
    for text in s.sets:
        command += ["--set", text]
    try:
        jobs.start(command, Deadline(RUN_S))
    except jobs.JobFailed as error:
        raise UserError(f"setting {s.name!r}: {error}") from error
    return json.loads((out / "report.json").read_text())


def _compared(s: Setting, reports: list[dict]) -> Compared:
    reports = sorted(reports, key=lambda r: r["throughput"]["output_tokens_per_s"])
    middle, speeds = reports[len(reports) // 2], [r["throughput"]["output_tokens_per_s"] for r in reports]
    p = middle["predicted"]
    if p["reason"]:
        return Compared(s, len(reports), reason=p["reason"])
    measured, phases = middle["throughput"], middle["phases"]
    apart = sum(abs(p["phases"].get(name, {"mean_s": 0.0})["mean_s"] - phase["mean_s"]) for name, phase in phases.items())
    return Compared(s, len(reports), (p["output_tokens_per_s"], measured["output_tokens_per_s"]),
                    (p["tpot_mean_ms"], middle["latency"]["tpot_mean_ms"]), (p["elapsed_s"], measured["elapsed_s"]),
                    apart / measured["elapsed_s"], (speeds[-1] - speeds[0]) / measured["output_tokens_per_s"])


# ---------------------------------------------------------------- what is printed
def render(found: list[Compared], cores: int) -> str:
    """A table, and the mean absolute error of TPS: of settings that were seen, of the others, of those with more ranks than cores."""
    lines = [f"{'setting':<40}{'ranks':>6}{'':>10}{'TPS':>9}{'predicted':>11}{'error':>9}{'TPOT ms':>9}{'predicted':>11}{'phases off':>12}{'spread':>8}"]
    for c in found:
        head = f"{c.setting.name[:39]:<40}{c.setting.ranks:>6}{'seen' if c.setting.seen else 'held out':>10}"
        if c.reason:
            lines.append(f"{head}  {c.reason}")
            continue
        tpot = "".join(f"{'-' if x is None else f'{x:.2f}':>{w}}" for x, w in zip(c.tpot_ms[::-1], (9, 11)))
        lines.append(f"{head}{c.tps[1]:>9,.0f}{c.tps[0]:>11,.0f}{100 * c.error:>+8.1f}%{tpot}{100 * c.phases:>11.1f}%{100 * c.spread:>7.0f}%")
    return "\n".join(lines + [""] + [f"{title}: mean absolute error of TPS {100 * value:.1f} % over {count} settings"
                                     for title, (value, count) in means(found, cores).items()])


def means(found: list[Compared], cores: int) -> dict[str, tuple[float, int]]:
    """(mean absolute error of TPS, settings) by group."""
    good = [c for c in found if not c.reason]
    groups = {f"all with at most {cores} ranks": [c for c in good if c.setting.ranks <= cores],
              "of these seen": [c for c in good if c.setting.ranks <= cores and c.setting.seen],
              "of these held out": [c for c in good if c.setting.ranks <= cores and not c.setting.seen],
              f"with more than {cores} ranks": [c for c in good if c.setting.ranks > cores]}
    return {title: (statistics.mean(abs(c.error) for c in group), len(group)) for title, group in groups.items() if group}


def run(args) -> int:
    """`hpcmoe calibrate compare`: its exit code. Raises UserError for whatever the user can mend."""
    from hpcmoe import predicting
    from hpcmoe.files import replacing
    comparison = read_comparison(args.comparison)
    predicting.read(args.cluster)
    if args.repeats < 1:
        raise UserError(f"--repeats {args.repeats}: expected a number >= 1")
    mpiexec = args.mpiexec or (launcher() if any(s.ranks > 1 for s in comparison.setting) else "")
    load = os.getloadavg()[0]
    found = compare(comparison, args.cluster, mpiexec, args.repeats, args.only, lambda text: print(text, file=sys.stderr, flush=True))
    cores = memory.cores()
    print(render(found, cores) + f"\nload average {load:.1f} before, {os.getloadavg()[0]:.1f} after, on {cores} cores; median of {args.repeats} run(s)")
    if args.out:
        rows = [{"name": c.setting.name, "ranks": c.setting.ranks, "sets": list(c.setting.sets), "seen": c.setting.seen, "runs": c.runs,
                 "output_tokens_per_s": c.tps[1], "output_tokens_per_s_predicted": c.tps[0], "tpot_ms": c.tpot_ms[1], "tpot_ms_predicted": c.tpot_ms[0],
                 "elapsed_s": c.elapsed_s[1], "elapsed_s_predicted": c.elapsed_s[0], "phases_off": c.phases, "reason": c.reason} for c in found]
        with replacing(args.out) as path, open(path, "w", encoding="utf-8") as file:
            json.dump({"cluster": args.cluster, "settings": rows, "load_average_before": load,
                       "mean_absolute_error": {title: value for title, (value, _) in means(found, cores).items()}}, file, indent=1)
        print(f"figures in {args.out}")
    return 0
