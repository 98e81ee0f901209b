"""What one rank measured in a run, as plain picklable data.

An executor (the engine, or a simulator) fills one RankRecord per rank; metrics, tables, traces
and plots are made from lists of them and know nothing else of how the run was done.
Times are seconds on one clock aligned over the ranks, 0 being the start of the run loop.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

KINDS = ("RECV", "ATTEND", "GATE", "COUNTS", "DISPATCH", "EXPERT", "COMBINE", "MERGE",
         "REDUCE", "SEND", "SAMPLE")
# kinds that move rows between ranks; only these have traffic counters
MOVES = ("COUNTS", "DISPATCH", "COMBINE", "SEND", "SAMPLE")


class Span(NamedTuple):
    """One stretch of time of one op. wait: the rank awaited the op's result (exposed time);
    otherwise it ran or posted the op."""

    kind: str
    layer: int
    micro: int
    step: int
    start_s: float
    end_s: float
    wait: bool


class StepRow(NamedTuple):
    """One step of one micro-batch as a leader of stage 0 saw it, with its own token rows."""

    step: int
    micro: int
    start_s: float
    end_s: float
    prefill_rows: int
    decode_rows: int


@dataclass
class RequestTimes:
    """One finished request; it arrived at 0, the start of the run.

    index: its place in the input; admitted_s: when its first step began; first_token_s and
    end_s: when its first and last token were sampled (for a scored text, both are its end).
    """

    index: int
    prompt_tokens: int
    output_tokens: int
    admitted_s: float
    first_token_s: float
    end_s: float


@dataclass
class RankRecord:
    """All that one rank tells about a run.

    layers, experts: global numbers of what this rank holds, in the order of `load`'s axes.
    busy_s, wait_s: seconds per kind, over all spans whether traced or not; run_s: wall time
    of the run loop. spans: empty unless traced. steps: on leaders of stage 0. requests: each
    finished request stands in exactly one rank's record.
    rows_*, bytes_*: per kind of MOVES, counted where they are sent; own: stays on the rank,
    intra: to another rank of the same node, inter: to another node.
    load: rows received, int [step, local layer, local expert].
    load_s, bytes_read: reading this rank's weights. expert_rows, expert_flop: totals of EXPERT.
    """

    rank: int
    host: str
    node: int
    dp: int
    stage: int
    place: int
    leader: bool
    layers: list[int]
    experts: list[int]
    busy_s: dict[str, float] = field(default_factory=dict)
    wait_s: dict[str, float] = field(default_factory=dict)
    run_s: float = 0.0
    spans: list[Span] = field(default_factory=list)
    steps: list[StepRow] = field(default_factory=list)
    requests: list[RequestTimes] = field(default_factory=list)
    rows_own: dict[str, int] = field(default_factory=dict)
    rows_intra: dict[str, int] = field(default_factory=dict)
    rows_inter: dict[str, int] = field(default_factory=dict)
    bytes_intra: dict[str, int] = field(default_factory=dict)
    bytes_inter: dict[str, int] = field(default_factory=dict)
    load: np.ndarray = field(default_factory=lambda: np.zeros((0, 0, 0), dtype=np.int64))
    weights_bytes: int = 0
    kv_bytes: int = 0
    buffer_bytes: int = 0
    peak_rss_bytes: int = 0
    load_s: float = 0.0
    bytes_read: int = 0
    expert_rows: int = 0
    expert_flop: float = 0
