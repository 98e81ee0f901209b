"""Section `peers`: PyTorch's and transformers' experts beside ours; and how peers.py is started."""

from __future__ import annotations

import json
from pathlib import Path

from hpcmoe.bench import jobs
from hpcmoe.bench.bed import Bed
from hpcmoe.bench.experts import PEER_ROWS, ROWS, expert
from hpcmoe.bench.record import SKIPPED, Section
from hpcmoe.bench.timing import Deadline

SCRIPT = Path(__file__).with_name("peers.py")


def missing(python: str) -> str:
    """"" where that Python has torch, else what it lacks."""
    try:
        jobs.start([python, "-c", "import importlib.util as u; raise SystemExit(u.find_spec('torch') is None)"], Deadline(30))
    except jobs.JobFailed:
        return f"PyTorch is not installed for {python}"
    return ""


def ask(job: dict, options, deadline: Deadline) -> dict:
    """What peers.py answers to one job. Raises jobs.JobFailed."""
    out = jobs.start([options.peer_python, str(SCRIPT)], deadline, json.dumps(job))
    return json.loads(out.splitlines()[-1])


def peers(bed: Bed, section: Section, deadline: Deadline) -> None:
    """The expert step of PyTorch and transformers at one expert per GPU; the goal is against the fastest that takes
    experts with rows of their own (torch_bmm takes as many rows for each, here the plain product)."""
    d, f = (64, 96) if bed.small else (5120, 8192)
    rows = (4, 64) if bed.small else ROWS
    what = f"expert {d} x {f}, {PEER_ROWS} rows: fastest grouped peer / our step"
    lacking = missing(bed.options.peer_python)
    if lacking:
        section.status, section.error = SKIPPED, lacking
        section.goal(what, ">=", 2.0, None, lacking)
        return
    ours = Section("ours")
    expert(bed, ours, Deadline(deadline.left() / 3))
    step_ms = {point["rows"]: point["step_ms"] for point in ours.points.get("expert", [])}
    bed.release()
    answer = ask({"what": "experts", "d": d, "f": f, "rows": rows, "dtype": "bf16", "seconds": 0.02 if bed.small else 0.2},
                 bed.options, deadline)
    for point in answer["points"]:
        theirs = [value for name, value in point.items() if name.endswith("grouped_mm_ms")]
        mine = step_ms.get(point["rows"])
        ratio = min(theirs) / mine if theirs and mine else None
        section.add_point("peers", **point, hpcmoe_step_ms=mine, fastest_grouped_over_step_ratio=ratio)
        if point["rows"] == PEER_ROWS:
            section.goal(what, ">=", 2.0, ratio)
    section.notes += answer["notes"]
    section.notes.append(f"peers compute in bf16, torch {answer['torch']}, transformers {answer['transformers'] or 'not installed'}")
