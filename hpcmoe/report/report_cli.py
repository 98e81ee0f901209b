"""The sub-command `hpcmoe report`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from hpcmoe.errors import EXIT_OK, UserError
from hpcmoe.report import compare, table
from hpcmoe.report.reading import read_report

EXAMPLES = """examples:
  hpcmoe report hpcmoe-out                       the table of one run
  hpcmoe report ep16/report.json ep64            two runs side by side, per rank and in
                                                 parallel efficiency; the first is the reference
  hpcmoe report --json ep16 ep64 > both.json     for other programs
  hpcmoe report --plot-trace trace.json trace.svg --window 0.5 0.6
"""


def add_parser(subparsers) -> argparse.ArgumentParser:
    """Adds `report`; its `handler` is a function of args -> exit code."""
    parser = subparsers.add_parser(
        "report", help="print a run's report, or compare several",
        description="Print the report of a run, or set several side by side.",
        epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", metavar="FILE",
                        help="a report.json, or the folder that holds one")
    parser.add_argument("--json", action="store_true",
                        help="print the report (a list of them for several) as JSON")
    parser.add_argument("--plot-trace", nargs=2, metavar=("TRACE.json", "OUT.svg"),
                        help="draw a trace (needs the extra [plot])")
    parser.add_argument("--window", nargs=2, type=float, metavar=("FROM", "TO"),
                        help="seconds of the trace to draw; all of it when not given")
    parser.set_defaults(handler=handler)
    return parser


def handler(args) -> int:
    """Runs the sub-command; UserError for files that are no reports or traces."""
    if not args.files and not args.plot_trace:
        raise UserError("hpcmoe report: give at least one report.json, or --plot-trace")
    if args.plot_trace:
        from hpcmoe.report.plots import plot_trace
        window = tuple(args.window) if args.window else None
        print(f"wrote {plot_trace(*args.plot_trace, window)}")
    reports = [read_report(file) for file in args.files]
    if args.json and reports:
        print(json.dumps(reports[0] if len(reports) == 1 else reports, indent=1))
    elif len(reports) == 1:
        print(table.render(reports[0]))
    elif reports:
        print(compare.render(reports, [_title(file) for file in args.files]))
    return EXIT_OK


def _title(file: str) -> str:
    """The folder of a report.json, which tells runs apart; otherwise the file as given."""
    path = Path(file)
    return str(path.parent) if path.name == "report.json" and path.parent.name else str(path)
