"""What a benchmark run found: figures, points of curves, goals; as JSON and as a table.

Every figure's name ends in its unit (`_ms`, `_us`, `_gb_per_s`, `_tflop_per_s`, `_tokens_per_s`); a
`share`, a `ratio` and an `error` have none.
"""

from __future__ import annotations

import json
import math
import operator
from dataclasses import dataclass, field

from hpcmoe.files import replacing
from hpcmoe.report.table import number, words

FORMAT = "hpcmoe-bench-gpu"
VERSION = 1
COMPARE = {"<=": operator.le, ">=": operator.ge}
DONE, FAILED, SKIPPED, LATE = "done", "failed", "skipped", "out of time"


@dataclass
class Goal:
    """A figure held against what it should reach; met is None where it was not measured (why: the reason)."""

    what: str
    relation: str
    wanted: float
    measured: float | None
    why: str = ""

    @property
    def met(self) -> bool | None:
        return None if self.measured is None else bool(COMPARE[self.relation](self.measured, self.wanted))


@dataclass
class Section:
    """One section's result. status: done, failed (error says how), skipped or out of time (error says why)."""

    name: str
    status: str = DONE
    error: str = ""
    seconds: float = 0.0
    figures: dict = field(default_factory=dict)
    points: dict[str, list[dict]] = field(default_factory=dict)
    goals: list[Goal] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def goal(self, what: str, relation: str, wanted: float, measured: float | None, why: str = "") -> None:
        self.goals.append(Goal(what, relation, wanted, measured, why))

    def add_point(self, curve: str, **values) -> dict:
        """One row of a curve; returns it, so that more can be added."""
        self.points.setdefault(curve, []).append(values)
        return values

    def as_dict(self) -> dict:
        goals = [{"what": g.what, "goal": f"{g.relation} {g.wanted:g}", "measured": g.measured, "met": g.met,
                  **({"why": g.why} if g.why else {})} for g in self.goals]
        return {"status": self.status, "error": self.error, "section_s": round(self.seconds, 3), "figures": self.figures,
                "points": self.points, "goals": goals, "notes": self.notes}


def as_json(head: dict, sections: list[Section]) -> dict:
    """The content of the file. head: date, command, device, versions, scale, elapsed_s, ..."""
    return {"format": FORMAT, "format_version": VERSION, **head, "sections": {s.name: s.as_dict() for s in sections}}


def write(path: str, head: dict, sections: list[Section]) -> None:
    """Writes the file, whole or not at all. Raises UserError where that is impossible; ValueError for a NaN."""
    with replacing(path) as temporary:
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(_plain(as_json(head, sections)), file, indent=1, allow_nan=False)
            file.write("\n")


def _plain(value):
    """Without NumPy scalars; a figure that is not finite becomes its name, since JSON has none."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


# ---------------------------------------------------------------- the table
def table(head: dict, sections: list[Section]) -> str:
    """Goals, then the curves of each section, then what failed."""
    lines = ["=" * 100, *_facts(head), ""]
    if not head.get("measured", True) or head.get("scale") == "small":
        lines += ["NOT A MEASUREMENT: tiny sizes, or a device that is no GPU; goals mean nothing here", ""]
    goals = [(s.name, g) for s in sections for g in s.goals]
    if goals:
        lines.append(f"{'goal':<62}{'wanted':>12}{'measured':>12}{'met':>14}")
        for name, g in goals:
            met = {True: "yes", False: "NO", None: "not measured"}[g.met]
            lines.append(f"{f'{name}: {g.what}':<62}{f'{g.relation} {g.wanted:g}':>12}{number(g.measured):>12}{met:>14}"
                         + (f"  {g.why}" if g.why else ""))
    for s in sections:
        lines += ["", f"{s.name}  ({s.status}{': ' + s.error.splitlines()[-1] if s.error else ''}; {s.seconds:.1f} s)"]
        lines += [f"  {name:<58}{_cell(value):>14}" for name, value in s.figures.items()]
        for curve, points in s.points.items():
            lines += _curve(curve, points)
        lines += [f"  {note}" for note in s.notes]
    return "\n".join(lines + ["=" * 100])


def _facts(head: dict) -> list[str]:
    device = head.get("device", {})
    shown = {k: words(v) for k, v in device.items() if k != "name" and v != {}}
    return [f"{device.get('name', '?')}; " + ", ".join(f"{k} {v}" for k, v in shown.items()),
            f"{head.get('date_utc', '')}; scale {head.get('scale', '')}; {head.get('elapsed_s', 0):.0f} s; "
            + ", ".join(f"{k} {v}" for k, v in head.get("versions", {}).items())]


def _cell(value) -> str:
    return number(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else str(value)


def _curve(name: str, points: list[dict]) -> list[str]:
    """One line per point under the names of its values."""
    keys = list(dict.fromkeys(key for point in points for key in point))
    cells = [[_cell(point[key]) if key in point else "" for key in keys] for point in points]
    widths = [max(len(key), *(len(row[i]) for row in cells)) for i, key in enumerate(keys)]
    lines = [f"  {name}", "    " + "  ".join(f"{key:>{w}}" for key, w in zip(keys, widths))]
    return lines + ["    " + "  ".join(f"{cell:>{w}}" for cell, w in zip(row, widths)) for row in cells]
