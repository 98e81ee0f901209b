"""Traces: a pipeline worked out by hand, the rules of the Trace Event Format, pictures."""

import json
import sys
from collections import Counter, defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcmoe.errors import UserError
from hpcmoe.report.record import KINDS, RankRecord, Span
from hpcmoe.report.trace import read_trace, write_trace

STAGES, PLACES, MICROS, STEPS = 3, 2, 2, 3


def rank_record(rank, stage, place, leader=True) -> RankRecord:
    return RankRecord(rank, "host", 0, 0, stage, place, leader, layers=[2 * stage, 2 * stage + 1],
                      slots=[place])


def pipeline() -> list[RankRecord]:
    """Three stages, two places, two micro-batches: stage p works one tick after stage p - 1.

    On a stage: RECV is posted, waited for, then ATTEND, EXPERT and SEND (SAMPLE on the last).
    """
    records = []
    for stage in range(STAGES):
        for place in range(PLACES):
            record = rank_record(stage * PLACES + place, stage, place)
            first, last = record.layers
            for step in range(STEPS):
                for micro in range(MICROS):
                    t = 4.0 * step + stage + 0.5 * micro
                    end = "SAMPLE" if stage == STAGES - 1 else "SEND"
                    for kind, layer, start, length, wait in (
                            ("RECV", first, 0.0, 0.05, False), ("RECV", first, 0.05, 0.05, True),
                            ("ATTEND", first, 0.1, 0.1, False), ("EXPERT", last, 0.2, 0.2, False),
                            (end, last, 0.4, 0.1, False)):
                        # the receiver's wait begins before the sender sends and ends after
                        early = 0.6 if kind == "RECV" and stage + step else 0.0
                        stretch = early - 0.01 if kind == "RECV" and wait else 0.0
                        record.spans.append(Span(kind, layer, micro, step, t + start - early,
                                                 t + start - early + length + stretch, wait))
            records.append(record)
    return records


def written(tmp_path, records) -> dict:
    return json.loads(write_trace(tmp_path / "trace.json", records).read_text())


def check_format(document: dict) -> Counter:
    """Asserts the rules of the Trace Event Format that viewers rely on; the number of phases."""
    assert document["displayTimeUnit"] in ("ms", "ns")
    slices, flows, named, threads = defaultdict(list), defaultdict(dict), set(), set()
    for event in document["traceEvents"]:
        assert isinstance(event["pid"], int) and isinstance(event["tid"], int)
        assert event["ph"] in ("M", "X", "s", "f") and event["name"]
        if event["ph"] == "M":
            if event["name"] == "process_name":
                assert event["pid"] not in named
                named.add(event["pid"])
            if event["name"] == "thread_name":
                threads.add((event["pid"], event["tid"]))
            assert event["args"]
            continue
        assert event["ts"] >= 0 and event["cat"]
        if event["ph"] == "X":
            assert event["dur"] >= 0 and event["pid"] > 0 and event["tid"] > 0
            slices[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
        else:
            assert event["ph"] not in flows[event["id"]], "an arrow has one start and one finish"
            flows[event["id"]][event["ph"]] = event
    assert {pid for pid, _ in slices} <= named and set(slices) == threads
    for spans in slices.values():
        for (_, end), (start, _) in zip(spans, spans[1:]):
            assert start >= end - 5e-4, "slices of a thread neither overlap nor go back"
    for ends in flows.values():
        start, finish = ends["s"], ends["f"]
        assert (start["cat"], start["name"]) == (finish["cat"], finish["name"])
        assert finish["ts"] >= start["ts"] and finish["bp"] == "e"
        assert any(a == start["ts"] for a, _ in slices[start["pid"], start["tid"]])
    return Counter(event["ph"] for event in document["traceEvents"])


def enclosing(document: dict, flow: dict) -> list[dict]:
    return [e for e in document["traceEvents"] if e["ph"] == "X"
            and (e["pid"], e["tid"]) == (flow["pid"], flow["tid"])
            and e["ts"] <= flow["ts"] < e["ts"] + e["dur"]]


def test_pipeline(tmp_path):
    document = written(tmp_path, pipeline())
    phases = check_format(document)
    assert phases["X"] == STAGES * PLACES * MICROS * STEPS * 5
    # a SEND per stage but the last, and a SAMPLE into each step but the first
    expected = PLACES * MICROS * ((STAGES - 1) * STEPS + STEPS - 1)
    assert phases["s"] == phases["f"] == expected
    names = [e["args"]["name"] for e in document["traceEvents"] if e["name"] == "process_name"]
    assert names[3] == "rank 3 stage 1 place 1 leader host"
    waits = [e for e in document["traceEvents"] if e.get("cat") == "wait"]
    assert len(waits) == phases["X"] / 5 and waits[0]["name"] == "wait RECV 0"


def test_arrows_join_a_send_with_its_receive(tmp_path):
    document = written(tmp_path, pipeline())
    ends = defaultdict(dict)
    for event in document["traceEvents"]:
        if event["ph"] in "sf":
            slice_, = enclosing(document, event)
            ends[event["id"]][event["ph"]] = slice_
    for pair in ends.values():
        sender, receiver = pair["s"], pair["f"]
        assert receiver["name"].startswith("wait RECV")
        assert sender["args"]["micro"] == receiver["args"]["micro"]
        assert (sender["pid"] - 1) % PLACES == (receiver["pid"] - 1) % PLACES
        stages = ((sender["pid"] - 1) // PLACES, (receiver["pid"] - 1) // PLACES)
        if sender["args"]["kind"] == "SEND":
            assert stages[1] == stages[0] + 1
            assert sender["args"]["step"] == receiver["args"]["step"]
        else:
            assert stages == (STAGES - 1, 0)
            assert sender["args"]["step"] + 1 == receiver["args"]["step"]


@pytest.mark.parametrize("spans, target", [
    # the rows were there before anybody waited: the first op that uses them
    ([("RECV", 0, 0.1, False), ("ATTEND", 2.0, 3.0, False)], "ATTEND 2"),
    # the message was taken up after it had been sent, without a wait
    ([("RECV", 1.5, 1.8, False), ("ATTEND", 2.0, 3.0, False)], "RECV 2"),
    ([("RECV", 0, 0.1, False), ("RECV", 0.5, 1.6, True), ("ATTEND", 2, 3, False)], "wait RECV 2")])
def test_where_an_arrow_ends(tmp_path, spans, target):
    sender, receiver = rank_record(0, 0, 0), rank_record(1, 1, 0)
    sender.spans = [Span("SEND", 1, 0, 0, 1.0, 1.2, False)]
    receiver.spans = [Span(kind, 2, 0, 0, start, end, wait) for kind, start, end, wait in spans]
    document = written(tmp_path, [sender, receiver])
    check_format(document)
    finish, = (e for e in document["traceEvents"] if e["ph"] == "f")
    assert [e["name"] for e in enclosing(document, finish)] == [target]


def test_clocks_that_disagree_by_more_than_a_message(tmp_path):
    """A receive that seems to end before its send: the arrow stands still, it never goes back."""
    sender, receiver = rank_record(0, 0, 0), rank_record(1, 1, 0)
    sender.spans = [Span("SEND", 1, 0, 0, 1.0, 1.2, False)]
    receiver.spans = [Span("RECV", 2, 0, 0, 0.1, 0.9, True)]
    assert check_format(written(tmp_path, [sender, receiver]))["f"] == 1


def test_no_arrows_within_a_rank_or_to_nowhere(tmp_path):
    one = rank_record(0, 0, 0)  # a single stage samples for itself
    one.spans = [Span("SAMPLE", 1, 0, 0, 0.0, 0.1, False), Span("RECV", 0, 0, 1, 0.2, 0.3, False)]
    assert check_format(written(tmp_path, [one]))["s"] == 0
    sender = rank_record(0, 0, 0)
    sender.spans = [Span("SEND", 1, 0, 0, 1.0, 1.2, False)]
    assert check_format(written(tmp_path, [sender, rank_record(1, 1, 0)]))["s"] == 0


def test_times_before_the_start_are_shifted(tmp_path):
    record = rank_record(0, 0, 0)
    record.spans = [Span("ATTEND", 0, 0, 0, -0.25, 0.0, False), Span("GATE", 0, 0, 0, 0.0, 1.0, False)]
    events = [e for e in written(tmp_path, [record])["traceEvents"] if e["ph"] == "X"]
    assert [(e["ts"], e["dur"]) for e in events] == [(0.0, 250_000.0), (250_000.0, 1_000_000.0)]


def test_no_spans_and_no_ranks_are_still_a_trace(tmp_path):
    assert check_format(written(tmp_path, [rank_record(0, 0, 0)]))["X"] == 0
    assert written(tmp_path, [])["traceEvents"] == []


instants = st.integers(0, 10**7).map(lambda n: n * 1e-6)
spans_drawn = st.lists(st.builds(
    lambda kind, layer, micro, step, start, length, wait:
    Span(kind, layer, micro, step, start, start + length, wait),
    st.sampled_from(KINDS), st.integers(0, 3), st.integers(0, 2), st.integers(0, 3), instants,
    instants, st.booleans()), max_size=25)


@settings(max_examples=60, deadline=None)
@given(st.lists(spans_drawn, min_size=1, max_size=4))
def test_any_spans_make_a_legal_trace_that_reads_back(tmp_path_factory, drawn):
    """Spans that overlap, as streams of a GPU do, and arrows whichever way they fall."""
    folder = tmp_path_factory.mktemp("trace")
    records = [rank_record(i, i, 0) for i in range(len(drawn))]
    for record, spans in zip(records, drawn):
        record.spans = spans
    check_format(written(folder, list(reversed(records))))
    ranks = read_trace(folder / "trace.json")
    assert [name.split()[1] for name, _ in ranks] == [str(i) for i in range(len(drawn))]

    def rounded(spans):
        return sorted((*s[:4], round(s.start_s, 6), round(s.end_s, 6), s.wait) for s in spans)
    for (_, spans), record in zip(ranks, records):
        assert rounded(spans) == rounded(record.spans)


def test_a_failure_leaves_nothing_behind(tmp_path):
    records = pipeline()
    records[-1].spans.append(Span("ATTEND", 0, 0, 0, 99.0, "late", False))
    with pytest.raises(TypeError):
        write_trace(tmp_path / "trace.json", records)
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="/dev/null: is a file: expected a folder"):
        write_trace("/dev/null/trace.json", [])


@pytest.mark.parametrize("text, message", [
    ("", "not JSON"), ("[]", "expected a trace"), ('{"traceEvents": 3}', "expected a trace"),
    ('{"traceEvents": [{"ph": "X", "pid": 1, "args": {"kind": "NOP"}}]}', "expected a trace"),
    ('{"traceEvents": [{"ph": "X", "pid": 1, "cat": "op", "ts": "x", "dur": 1, '
     '"args": {"kind": "SEND", "layer": 0, "micro": 0, "step": 0}}]}', "expected a trace")])
def test_files_that_are_no_traces(tmp_path, text, message):
    path = tmp_path / "trace.json"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        read_trace(path)
    assert str(path) in str(caught.value)
    with pytest.raises(UserError, match="cannot read the trace"):
        read_trace(tmp_path / "none.json")


# ---------------------------------------------------------------- a real run
@pytest.mark.mpi
def test_a_real_run(tmp_path):
    """Four ranks in two stages: trace, report and table agree with each other and with the docs."""
    from hpcmoe.config import AttentionConfig, ExpertConfig, ModelConfig, RouterConfig
    from hpcmoe.data.create import create
    from hpcmoe.report import table
    from local import run_job
    from test_report import undocumented
    model = ModelConfig("mixtral", 97, 32, 2, AttentionConfig(4, 2, 8), RouterConfig(4, 2),
                        ExpertConfig(24), 128)
    create(str(tmp_path / "m.h5"), model, dtype="fp32", seed=5)
    sequences, prompt, output = 6, 5, 4
    _, _, report = run_job(4, tmp_path, {
        "task": "throughput", "weights.file": tmp_path / "m.h5", "layout.pp": 2, "layout.ep": 2,
        "throughput.sequences": sequences, "throughput.prompt_tokens": prompt,
        "throughput.output_tokens": output, "output.trace": tmp_path / "trace.json"})
    assert not undocumented(report)
    assert sum(p["share"] for p in report["phases"].values()) == pytest.approx(1)
    t = report["throughput"]
    assert (t["prefill_rows"], t["decode_rows"]) == (sequences * prompt, sequences * (output - 1))
    rows = t["prefill_rows"] + t["decode_rows"]
    assert [x["rows"] for x in report["expert_load"]["layers"]] == [rows * model.router.top_k] * 2
    sent = report["traffic"]["dispatch"]
    assert sent["rows_own"] + sent["rows_within_nodes"] + sent["rows_between_nodes"] == \
        2 * rows * model.router.top_k == report["compute"]["expert_rows"]
    assert "without rows" in table.render(report)

    document = json.loads((tmp_path / "trace.json").read_text())
    assert check_format(document)["s"] > 0
    for event in document["traceEvents"]:
        if event["ph"] == "f":
            assert enclosing(document, event)[0]["args"]["kind"] in ("RECV", "ATTEND")
    # what the spans sum to is what the report says
    for kind, phase in (("EXPERT", "expert"), ("ATTEND", "attention"), ("DISPATCH", "dispatch")):
        spans = [s for _, spans in read_trace(tmp_path / "trace.json") for s in spans]
        seconds = sum(s.end_s - s.start_s for s in spans if s.kind == kind)
        assert seconds / 4 == pytest.approx(report["phases"][phase]["mean_s"], rel=1e-3, abs=1e-5)


# ---------------------------------------------------------------- pictures
def test_picture_of_a_trace(tmp_path):
    pytest.importorskip("matplotlib")
    from hpcmoe.report.plots import COLOURS, WAIT, plot_trace
    write_trace(tmp_path / "trace.json", pipeline())
    from_file = plot_trace(str(tmp_path / "trace.json"), tmp_path / "a.svg").read_text()
    assert plot_trace(pipeline(), tmp_path / "b.svg").read_text() == from_file
    assert "rank 5 stage 2 place 1" in from_file and "host" not in from_file
    for kind in ("ATTEND", "EXPERT", "SEND", "SAMPLE"):
        assert COLOURS[kind] in from_file
    assert WAIT in from_file and COLOURS["COMBINE"] not in from_file
    part = plot_trace(pipeline(), tmp_path / "c.svg", window=(0.0, 0.3)).read_text()
    assert COLOURS["SAMPLE"] not in part
    assert plot_trace(pipeline(), tmp_path / "d.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(UserError, match="spans"):
        plot_trace(pipeline(), tmp_path / "e.svg", window=(500.0, 600.0))
    with pytest.raises(UserError, match="a.svg: is a file"):
        plot_trace(pipeline(), tmp_path / "a.svg" / "f.svg")
    with pytest.raises(UserError, match="unknown"):
        plot_trace(pipeline(), tmp_path / "f.unknown")


def test_picture_of_a_grid(tmp_path):
    pytest.importorskip("matplotlib")
    from hpcmoe.report.plots import COLOURS, plot_grid
    cells = [(f"stage {p}", p + m, kind, 0, m) for p in range(2) for m in range(3)
             for kind in ("EXPERT",)]
    text = plot_grid(cells, tmp_path / "grid.svg").read_text()
    assert "stage 1" in text and COLOURS["EXPERT"] in text
    with pytest.raises(UserError, match="cells"):
        plot_grid([], tmp_path / "none.svg")


def test_pictures_without_matplotlib(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # what an import of an absent one finds
    from hpcmoe.report.plots import plot_trace
    with pytest.raises(UserError, match=r"pip install 'hpcmoe\[plot\]'"):
        plot_trace(pipeline(), tmp_path / "a.svg")
