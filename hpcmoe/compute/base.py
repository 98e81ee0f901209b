"""What a rank computes between messages: the interface of the CPU's and the GPU's way.

A micro-batch is named by its number `m`; it runs on lane m % lanes. Every method queues its work on
that lane (on a CPU: does it) and returns; arrays are the device's. Index letters: docs/letters.md.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Callable, NamedTuple

import numpy as np

from hpcmoe.device import Device, Event, Lane
from hpcmoe.compute.relay import Chosen, Relay, Terms
from hpcmoe.compute.step import Batch
from hpcmoe.model.capacity import Capacity


class RelaySizes(NamedTuple):
    """Most of a rank's rows in a hierarchical exchange: parcels that come, parcels that leave, rows handed on."""

    parcels: int
    leaving: int
    handed: int


class Sizes(NamedTuple):
    """Most of everything on one rank: micro-batches, lanes; as a leader slots of one micro-batch, rows
    of a step, tokens of a sequence, pages of the KV cache and tokens of a page (0: a page is a slot);
    received rows of an exchange. All ranks of a replica agree on them, but for relay: of a hierarchical exchange."""

    micros: int
    lanes: int
    slots: int
    rows: int
    context: int
    pages: int
    page_tokens: int
    received: int
    relay: RelaySizes | None = None


class Pending(NamedTuple):
    """A result on its way to the host: `read()` once `event.done`."""

    event: Event
    read: Callable[[], tuple]


class Compute(ABC):
    """One rank's arithmetic. device; lanes: one per micro-batch in flight on a stage.

    send_width, back_width: bytes of a row of dispatch and of combine. nbytes: of buffers; kv_nbytes: of the cache.
    pairs: on leaders of a run with routing statistics, {layer: counts [e, e]} (route.together), else empty.
    capacity: on leaders of a run with a capacity factor, else None.
    """

    device: Device
    lanes: list[Lane]
    send_width: int
    back_width: int
    pairs: dict[int, np.ndarray]
    capacity: Capacity | None = None

    def launched(self) -> dict[str, int]:
        """What the host has queued on a GPU so far: kernels, products, graph_replays; {} on a CPU.

        Kernels and products that are recorded into a graph count once, when they are.
        """
        return {}

    def lane(self, m: int) -> Lane:
        return self.lanes[m % len(self.lanes)]

    @abstractmethod
    def open_cache(self, sizes: Sizes) -> None:
        """Makes room for keys and values, once their size is agreed upon."""

    # ------------------------------------------------------------ a leader's rows
    @abstractmethod
    def begin(self, m: int, batch: Batch, token_t: np.ndarray | None) -> None:
        """The rows of a step: embedded tokens, or (None) what has come into `rows_in`."""

    @abstractmethod
    def rows_in(self, m: int):
        """Where the stage before puts its rows: fp32 [most rows, d]."""

    @abstractmethod
    def rows_out(self, m: int):
        """The step's rows for the next stage: fp32 [t, d]."""

    @abstractmethod
    def attend(self, m: int, layer: int) -> None:
        """x_td += attention(norm(x_td)); keys and values go to the cache."""

    @abstractmethod
    def gate(self, m: int, layer: int) -> Pending:
        """Chooses experts, their copies, and weights; reads (n_send_e,): rows per slot of the layer, int64 on the host."""

    @abstractmethod
    def seat(self, layer: int, expert_s) -> None:
        """From the next gate on, the experts in the slots of a layer; this rank's own are exchanged by the caller. Between rounds."""

    @abstractmethod
    def outgoing(self, m: int):
        """The rows of all (token, choice) pairs in the order of their send slots: [s, send width]."""

    @abstractmethod
    def merge(self, m: int, y_sd) -> None:
        """x_td += sum over k of weight_tk * y_sd, choices in order."""

    @abstractmethod
    def next_tokens(self, m: int) -> Pending:
        """Reads (a token per sampled segment, a log-probability per token or scored row) of the step's rows."""

    # ------------------------------------------------------------ rows by way of forwarders (hierarchical exchange)
    @abstractmethod
    def relay(self, m: int) -> Relay:
        """What handles rows between the messages of m's lane."""

    @abstractmethod
    def chosen(self, m: int) -> Chosen:
        """What the gate chose, once its result can be read; good until m's next gate."""

    @abstractmethod
    def merge_terms(self, m: int, terms: list[Terms]) -> None:
        """x_td += terms, in their order."""

    # ------------------------------------------------------------ tensor shards (tp > 1)
    # `what` is the op whose result is one shard's part of a sum: EMBED, ATTEND or MERGE.
    @abstractmethod
    def part(self, m: int, what: str):
        """This shard's part of the step's rows: [t, d]."""

    @abstractmethod
    def parts(self, m: int, count: int):
        """Where parts of all shards come to, one shard's after the other's: [count, d]."""

    @abstractmethod
    def sum_parts(self, m: int, parts, shards: int):
        """The sum of `shards` parts of equally many rows, added in the shards' order: [rows, d]."""

    @abstractmethod
    def total(self, m: int, what: str):
        """Where the sums of all rows come to: [t, d]; in the type of `part`."""

    @abstractmethod
    def add_total(self, m: int, what: str) -> None:
        """x_td += total."""

    @abstractmethod
    def wanted(self, m: int) -> list[slice]:
        """The step's rows whose logits are wanted, in parts that are few enough at once; the same on all shards."""

    @abstractmethod
    def logits(self, m: int, part: slice):
        """This shard's logits of those of the wanted rows: fp32 [n, v of the shard]."""

    @abstractmethod
    def logits_room(self, m: int, shard: int, rows: int, vocab: int):
        """Where another shard's logits come to: fp32 [rows, vocab]."""

    @abstractmethod
    def draw(self, m: int, part: slice, blocks: list) -> None:
        """Takes next tokens from the logits of all shards, in order; `drawn` reads them."""

    @abstractmethod
    def drawn(self, m: int) -> Pending:
        """What `next_tokens` reads, once `draw` has had all wanted rows."""

    # ------------------------------------------------------------ experts
    @abstractmethod
    def incoming(self, m: int, count: int):
        """Where received rows go: [i, send width]."""

    @abstractmethod
    def expert(self, m: int, layer: int, x_id, n_recv_re: np.ndarray):
        """y [i, back width] of received rows, which stand by sender and, within one, by expert."""

    @abstractmethod
    def returning(self, m: int, count: int):
        """Where the experts' answers come back to: [s, back width]."""
