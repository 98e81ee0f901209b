"""Spans of all ranks as a trace for Perfetto (ui.perfetto.dev) or chrome://tracing.

The JSON is the Trace Event Format: a complete event (ph X) per span, metadata (M) for names and
order, flow events (s, f) for the arrows. One process per rank, one thread per micro-batch, and one for what it
does on the GPU.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from hpcmoe.errors import UserError, at
from hpcmoe.files import replacing
from hpcmoe.report.record import KINDS, RankRecord, Span

# Perfetto takes process and thread 0 for the idle task, so both are counted from 1
FIRST_ID = 1


class Slice(NamedTuple):
    """A span as it is drawn: its process, thread, and times in nanoseconds."""

    pid: int
    tid: int
    start: int
    end: int


def write_trace(path: str | Path, records: list[RankRecord]) -> Path:
    """Write the spans of all ranks; the file appears whole or not at all.

    An arrow goes from a stage's SEND to where the next stage takes the rows up, and from the last
    stage's SAMPLE to the next step on stage 0. Raises UserError where the file cannot be written.
    """
    records = sorted(records, key=lambda r: r.rank)
    # aligned clocks can put the first spans shortly before 0, which viewers do not like
    origin = min([0.0] + [s.start_s for r in records for s in r.spans])
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write('{"displayTimeUnit": "ms", "otherData": {"format": "hpcmoe-trace"},\n'
                   '"traceEvents": [\n')
        first = True
        for event in _events(records, origin):
            file.write(("" if first else ",\n") + event)
            first = False
        file.write("\n]}\n")
    return Path(path)


def _events(records: list[RankRecord], origin: float):
    """All events as JSON texts; those of one thread in the order of time."""
    sources, targets = {}, {}
    last_stage = max((r.stage for r in records), default=0)
    for record in records:
        pid = record.rank + FIRST_ID
        role = "leader " if record.leader else ""
        name = f"rank {record.rank} stage {record.stage} place {record.place} {role}{record.host}"
        yield _meta("process_name", pid, 0, {"name": name})
        yield _meta("process_sort_index", pid, 0, {"sort_index": record.rank})
        threads = {}
        for span in sorted(record.spans, key=lambda s: (s.start_s, s.end_s)):
            start, end = (round((t - origin) * 1e9) for t in (span.start_s, span.end_s))
            tid, new = _thread(threads, 2 * span.micro + span.device, start, end)
            if new:
                yield _meta("thread_name", pid, tid, {"name": f"micro-batch {span.micro}" + " on the GPU" * span.device})
                yield _meta("thread_sort_index", pid, tid, {"sort_index": tid})
            place = Slice(pid, tid, start, end)
            yield _complete(span, place)
            if record.leader and not span.device:
                _remember(record, span, place, last_stage, sources, targets)
    yield from _arrows(sources, targets)


def _thread(threads: dict, row: int, start: int, end: int) -> tuple[int, bool]:
    """The thread for a span, and whether it is new.

    Slices of one thread must not overlap in part. Where spans of a micro-batch do (streams of a
    GPU), the later one goes to a further thread of the same name.
    """
    ends = threads.setdefault(row, [])
    for i, last in enumerate(ends):
        if start >= last:
            ends[i] = end
            return _tid(row, i), False
    ends.append(end)
    return _tid(row, len(ends) - 1), True


def _tid(row: int, extra: int) -> int:
    return FIRST_ID + 50 * row + extra


def _remember(record, span: Span, place: Slice, last_stage: int, sources, targets) -> None:
    """Note `span` where an arrow may begin or end, under (replica, stage, place, micro, step)."""
    if span.kind == "SEND" and not span.wait:
        sources[record.dp, record.stage + 1, record.place, span.micro, span.step] = place
    elif span.kind == "SAMPLE" and not span.wait and record.stage == last_stage > 0:
        sources[record.dp, 0, record.place, span.micro, span.step + 1] = place
    elif span.kind == "RECV" or span.kind == "ATTEND" and span.layer == record.layers[0]:
        key = (record.dp, record.stage, record.place, span.micro, span.step)
        targets.setdefault(key, []).append((span.kind != "RECV", not span.wait, place))


def _arrows(sources: dict, targets: dict):
    """Flow events. An arrow ends in the wait for the message; where nobody waited, in the first
    op of the message or its first use that ends after it was sent."""
    number = 0
    for key, source in sources.items():
        if key not in targets:
            continue
        slices = [place for _, _, place in sorted(targets[key])]
        target = next((s for s in slices if s.end > source.start), slices[-1])
        number += 1
        # an arrow must not go back in time, which clocks aligned to some microseconds may ask for
        yield _flow("s", number, source, source.start)
        yield _flow("f", number, target, max(source.start, target.start))


# ---------------------------------------------------------------- events as JSON
def _microseconds(nanoseconds: int) -> str:
    return f"{nanoseconds // 1000}.{nanoseconds % 1000:03d}"


def _meta(name: str, pid: int, tid: int, args: dict) -> str:
    return (f'{{"ph": "M", "name": "{name}", "pid": {pid}, "tid": {tid}, '
            f'"args": {json.dumps(args)}}}')


def _complete(span: Span, place: Slice) -> str:
    name = f"{'wait ' if span.wait else ''}{span.kind} {span.layer}"
    look = ', "cname": "grey"' if span.wait else ""
    return (f'{{"ph": "X", "name": "{name}", "cat": "{"gpu" if span.device else "wait" if span.wait else "op"}"{look}, '
            f'"pid": {place.pid}, "tid": {place.tid}, "ts": {_microseconds(place.start)}, '
            f'"dur": {_microseconds(place.end - place.start)}, "args": {{"kind": "{span.kind}", '
            f'"layer": {span.layer}, "micro": {span.micro}, "step": {span.step}}}}}')


def _flow(phase: str, number: int, place: Slice, at_ns: int) -> str:
    bind = ', "bp": "e"' if phase == "f" else ""  # bind to the slice around it, not the next one
    return (f'{{"ph": "{phase}", "name": "rows", "cat": "flow", "id": {number}{bind}, '
            f'"pid": {place.pid}, "tid": {place.tid}, "ts": {_microseconds(at_ns)}}}')


# ---------------------------------------------------------------- reading one back
def read_trace(path: str | Path) -> list[tuple[str, list[Span]]]:
    """(name, spans) of each rank of a trace that `write_trace` wrote, in the order of ranks.

    Raises UserError where the file is missing, no JSON, or not such a trace.
    """
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot read the trace: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from error
    names, spans = {}, {}
    try:
        for event in document["traceEvents"]:
            if event["ph"] == "M" and event["name"] == "process_name":
                names[event["pid"]] = event["args"]["name"]
            elif event["ph"] == "X":
                spans.setdefault(event["pid"], []).append(_span(event))
        return [(names[pid], spans.get(pid, [])) for pid in sorted(names)]
    except (KeyError, TypeError, AttributeError) as error:
        raise at(str(path), "traceEvents", None, f"a trace of hpcmoe run --trace ({error})") \
            from error


def _span(event: dict) -> Span:
    args = event["args"]
    if args["kind"] not in KINDS:
        raise KeyError(args["kind"])
    start = event["ts"] / 1e6
    return Span(args["kind"], args["layer"], args["micro"], args["step"], start,
                start + event["dur"] / 1e6, event["cat"] == "wait", event["cat"] == "gpu")
