"""What one rank measured in a run, as plain picklable data.

An executor (the engine, or a simulator) fills one RankRecord per rank; metrics, tables, traces
and plots are made from lists of them and know nothing else of how the run was done.
Times are seconds on one clock aligned over the ranks, 0 being the start of the run loop.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

KINDS = ("RECV", "EMBED", "ATTEND", "REDUCE_ATTEND", "GATE", "COUNTS", "DISPATCH", "EXPERT", "COMBINE", "MERGE",
         "REDUCE_MERGE", "SEND", "SAMPLE")
# kinds that move rows between ranks; only these have traffic counters
MOVES = ("EMBED", "REDUCE_ATTEND", "COUNTS", "DISPATCH", "COMBINE", "REDUCE_MERGE", "SEND", "SAMPLE")


class Span(NamedTuple):
    """One stretch of time of one op. wait: the rank awaited the op's result (exposed time);
    otherwise it ran or posted the op. device: the time is the GPU's, not the host's."""

    kind: str
    layer: int
    micro: int
    step: int
    start_s: float
    end_s: float
    wait: bool
    device: bool = False


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


class Seated(NamedTuple):
    """The experts in a rank's slots, int [local layer, local slot], from a step on."""

    step: int
    expert_ls: np.ndarray


@dataclass
class Rebalancing:
    """One layer whose experts took other seats. window: rounds [first, end) whose load was looked at; decided_s: when; moved,
    moved_bytes: experts that travelled; heaviest_before, heaviest_after: the heaviest place over the mean, of the window's rows, as
    they were seated and as they would be; gain_s, cost_s: what the decision expected; switch_round, switched_s: the first round
    with the new seats, and when it began (-1: the run ended before)."""

    layer: int
    window_first: int
    window_end: int
    decided_s: float
    moved: int
    moved_bytes: int
    heaviest_before: float
    heaviest_after: float
    gain_s: float
    cost_s: float
    switch_round: int = -1
    switched_s: float = -1.0


@dataclass
class RankRecord:
    """All that one rank tells about a run.

    layers, slots: global numbers of what this rank has, in the order of `load`'s axes (shard: a tensor shard of it);
    seated: which experts were in the slots, from which step on (empty: slots are experts).
    busy_s, wait_s: seconds per kind, over all spans whether traced or not; post_s: of busy_s, those in which messages were
    posted or handed on; run_s: wall time of the run loop.
    device_s: seconds per kind that the GPU needed (empty on a CPU, where busy_s says it). spans: empty unless
    traced. steps: on leaders of stage 0. requests: each finished request stands in exactly one rank's record.
    rows_*, bytes_*: per kind of MOVES, counted where they are sent; own: stays on the rank,
    intra: to another rank of the same node, inter: to another node.
    layer_inter: of rows_inter, those of each (kind, layer).
    over_capacity: of a leader with a capacity factor, {layer: [rows rerouted, rows dropped]}.
    load: rows received, int [step, local layer, local slot].
    weights_predicted_bytes: what the layout says of weights_bytes. load_s, bytes_read: reading this rank's
    weights. device: what computes, and why this one. expert_rows, expert_flop: totals of EXPERT. rebalancings: of the stage
    (with tensor shards, of this shard), on its first place.
    """

    rank: int
    host: str
    node: int
    dp: int
    stage: int
    place: int
    leader: bool
    layers: list[int]
    slots: list[int]
    shard: int = 0
    busy_s: dict[str, float] = field(default_factory=dict)
    wait_s: dict[str, float] = field(default_factory=dict)
    post_s: dict[str, float] = field(default_factory=dict)
    device_s: dict[str, float] = field(default_factory=dict)
    run_s: float = 0.0
    spans: list[Span] = field(default_factory=list)
    steps: list[StepRow] = field(default_factory=list)
    requests: list[RequestTimes] = field(default_factory=list)
    rows_own: dict[str, int] = field(default_factory=dict)
    rows_intra: dict[str, int] = field(default_factory=dict)
    rows_inter: dict[str, int] = field(default_factory=dict)
    layer_inter: dict[tuple[str, int], int] = field(default_factory=dict)
    bytes_intra: dict[str, int] = field(default_factory=dict)
    bytes_inter: dict[str, int] = field(default_factory=dict)
    seated: list[Seated] = field(default_factory=list)
    over_capacity: dict[int, list[int]] = field(default_factory=dict)
    load: np.ndarray = field(default_factory=lambda: np.zeros((0, 0, 0), dtype=np.int64))
    weights_bytes: int = 0
    weights_predicted_bytes: int = 0
    kv_bytes: int = 0
    buffer_bytes: int = 0
    peak_rss_bytes: int = 0
    load_s: float = 0.0
    bytes_read: int = 0
    device: str = "CPU"
    expert_rows: int = 0
    expert_flop: float = 0
    rebalancings: list[Rebalancing] = field(default_factory=list)

    def __post_init__(self):
        if not self.seated:
            self.seated = [Seated(0, np.tile(np.array(self.slots, dtype=np.int64), (len(self.layers), 1)))]

    def loads(self) -> list[tuple[range, np.ndarray]]:
        """(steps, the experts in the slots) of the steps that this rank took, in order."""
        ends = [s.step for s in self.seated[1:]] + [len(self.load)]
        return [(range(min(s.step, len(self.load)), min(end, len(self.load))), s.expert_ls) for s, end in zip(self.seated, ends)]

    def work_s(self, kind: str) -> float:
        """Seconds of a kind's arithmetic: the GPU's where there is one, since the host only queues it."""
        return (self.device_s or self.busy_s).get(kind, 0.0)

    def count(self, op, intra: int = 0, inter: int = 0, row_bytes: float = 0, own: int = 0) -> None:
        """Books rows that this rank sends in an op (its kind and layer), of row_bytes each."""
        for table, amount in ((self.rows_own, own), (self.rows_intra, intra), (self.rows_inter, inter),
                              (self.bytes_intra, intra * row_bytes), (self.bytes_inter, inter * row_bytes)):
            table[op.kind] = table.get(op.kind, 0) + int(amount)
        self.layer_inter[op.kind, op.layer] = self.layer_inter.get((op.kind, op.layer), 0) + int(inter)
