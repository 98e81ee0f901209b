"""Reading report.json back, and refusing what is not one."""

from __future__ import annotations

import json
from pathlib import Path

from hpcmoe.errors import UserError, at
from hpcmoe.report.metrics import FORMAT, VERSION, metrics
from hpcmoe.report.record import RankRecord

LARGEST = 1e30  # no figure of a real run comes near it
FREE = ("config",)  # sections without a form of their own


def read_report(path: str | Path) -> dict:
    """The report in a file, or in the report.json of a folder.

    Raises UserError naming the file, and the field that is missing or holds something else.
    """
    path = Path(path)
    try:
        if path.is_dir():
            path = path / "report.json"
        report = json.loads(path.read_bytes(), parse_constant=_no_number)
    except OSError as error:
        raise UserError(f"{path}: cannot read the report: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a report: not JSON: {error}") from error
    if not isinstance(report, dict) or report.get("format") != FORMAT:
        found = report.get("format") if isinstance(report, dict) else None
        raise at(f"{path}: not a report", "format", found, f'"{FORMAT}"')
    if report.get("format_version") != VERSION:
        raise at(str(path), "format_version", report.get("format_version"), str(VERSION))
    _compare(report, _form(), str(path), "")
    return report


def _no_number(text: str):
    raise ValueError(f"{text} is not a number")


def _form() -> dict:
    """A report with all sections, whose fields any other must have too."""
    record = RankRecord(0, "host", 0, 0, 0, 0, True, [0], [0])
    form = metrics([record], {})
    form["expert_load"]["layers"] = [dict.fromkeys(
        ("layer", "rows", "rows_max", "rows_mean", "max_over_mean_run", "max_over_mean_steps",
         "idle_experts"), 0)]
    return {name: part for name, part in form.items() if name not in FREE}


def _compare(value, form, path: str, field: str) -> None:
    """Raises UserError where `value` lacks a field of `form` or a field has another type."""
    if isinstance(form, dict):
        if not isinstance(value, dict):
            raise _wrong(path, field, value, "a table of fields")
        for name, part in form.items():
            inner = f"{field}.{name}" if field else name
            if name not in value:
                raise UserError(f"{path}: {inner} is missing; this is not a whole report")
            _compare(value[name], part, path, inner)
    elif isinstance(form, list):
        if not isinstance(value, list):
            raise _wrong(path, field, value, "a list")
        for i, item in enumerate(value if form else []):
            _compare(item, form[0], path, f"{field}[{i}]")
    elif isinstance(form, str):
        if not isinstance(value, str):
            raise _wrong(path, field, value, "a text")
    elif not _is_figure(value, may_lack=form is None):
        raise _wrong(path, field, value, "a number")


def _is_figure(value, may_lack: bool) -> bool:
    if value is None:
        return may_lack
    return isinstance(value, (int, float)) and abs(value) < LARGEST


def _wrong(path: str, field: str, value, expected: str) -> UserError:
    text = json.dumps(value)
    if len(text) > 40:
        text = text[:37] + "..."
    return UserError(f"{path}: {field} = {text}: expected {expected}")
