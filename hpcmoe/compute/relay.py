"""Rows by way of forwarders (the hierarchical exchange): what is gathered and added between its messages, as an interface,
and on the CPU.

`u`: a leader's parcels, one row for one other node; `j`: parcels that came here; `s`: rows handed on inside the node.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import numpy as np

from hpcmoe.model.route import sum_chosen

NOWHERE = -1  # in place of a slot or a row: there is none here


class Chosen(NamedTuple):
    """What a leader's gate chose, on the host: expert_tk, weight_tk (fp32); and its rows as they travel, where the
    computing is: x, some rows of send width, row_t: the one of each token."""

    expert_tk: np.ndarray
    weight_tk: np.ndarray
    x: Any
    row_t: np.ndarray


class Way(NamedTuple):
    """The indices of one layer's rows on one rank, on the host.

    row_u: the row of Chosen.x that a parcel is; row_s: the row that is handed on, of x and behind it the parcels that
    came, sorted by the mate that gets it; slot_jk, weight_jk: the rows that come back for a parcel; slot_tk, weight_tk:
    those for a token, of the own node's experts (slots s) and behind them (s + u) the sums of other nodes. Slots may be
    NOWHERE, the first of a parcel is not.
    """

    row_u: np.ndarray
    row_s: np.ndarray
    slot_jk: np.ndarray
    weight_jk: np.ndarray
    slot_tk: np.ndarray
    weight_tk: np.ndarray


class Terms(NamedTuple):
    """Weighted sums to be added: x_td += sum over k of weight_tk * y[slot_tk] in order, where slots are not NOWHERE."""

    y: Any
    weight_tk: Any
    slot_tk: Any


class Relay(ABC):
    """One lane's rows, one layer after the other; methods are called in their order, and queue on the current lane."""

    @abstractmethod
    def begin(self, own: Chosen | None, way: Way) -> None:
        """Takes a layer's indices; own: on a leader."""

    @abstractmethod
    def parcels_out(self):
        """The rows of the own parcels: [u, send width]."""

    @abstractmethod
    def parcels_in(self):
        """Where parcels come to: [j, send width]."""

    @abstractmethod
    def hand_on(self, part: slice, out=None):
        """Rows `part` of those that are handed on: [part of s, send width]; in host memory `out`, where that is given."""

    @abstractmethod
    def handed(self, count: int):
        """Where experts' rows come back to: [s, back width]."""

    @abstractmethod
    def sums_out(self, y_sd):
        """The weighted sums of each parcel's rows: [j, back width]."""

    @abstractmethod
    def sums_in(self):
        """Where the sums for the own parcels come to: [u, back width]."""

    @abstractmethod
    def terms(self, y_sd) -> list[Terms]:
        """What is added to the own tokens."""


class Scratch:
    """Buffers of one lane, grown as needed and used again: an exchange's rows change in number at every step."""

    def __init__(self):
        self.buffers: dict[str, np.ndarray] = {}

    def rows(self, name: str, count: int, width: int, dtype=np.float32) -> np.ndarray:
        buffer = self.buffers.get(name)
        if buffer is None or len(buffer) < count:
            buffer = self.buffers[name] = np.empty((max(count, 16) * 5 // 4, width), dtype=dtype)
        return buffer[:count]

    @property
    def nbytes(self) -> int:
        return sum(b.nbytes for b in self.buffers.values())


class HostRelay(Relay):
    """On the CPU: rows on their way as bytes, sums fp32. send_width: bytes; d: numbers of a row that comes back."""

    def __init__(self, scratch: Scratch, send_width: int, d: int):
        self.scratch, self.send_width, self.d = scratch, send_width, d

    def begin(self, own: Chosen | None, way: Way) -> None:
        self.way = way
        self.own = rows_as_bytes(own.x) if own is not None else np.empty((0, self.send_width), np.uint8)

    def parcels_out(self) -> np.ndarray:
        out = self.scratch.rows("parcels out", len(self.way.row_u), self.send_width, np.uint8)
        return np.take(self.own, self.way.row_u, axis=0, out=out, mode="clip") if len(out) else out

    def parcels_in(self) -> np.ndarray:
        self.parcels = self.scratch.rows("parcels in", len(self.way.slot_jk), self.send_width, np.uint8)
        return self.parcels

    def hand_on(self, part: slice, out: np.ndarray | None = None) -> np.ndarray:
        row_s = self.way.row_s[part]
        if out is None:
            out = self.scratch.rows("handed on", len(row_s), self.send_width, np.uint8)
        first = 0
        for source in (self.own, self.parcels):
            here = np.flatnonzero((row_s >= first) & (row_s < first + len(source)))
            if len(here) == len(out):
                np.take(source, row_s - first, axis=0, out=out, mode="clip")
            elif len(here):
                out[here] = source[row_s[here] - first]
            first += len(source)
        return out

    def handed(self, count: int) -> np.ndarray:
        return self.scratch.rows("handed", count, self.d)

    def sums_out(self, y_sd: np.ndarray) -> np.ndarray:
        out = self.scratch.rows("sums out", len(self.way.slot_jk), self.d)
        if len(out):
            sum_chosen(out, y_sd, self.way.weight_jk, self.way.slot_jk)
        return out

    def sums_in(self) -> np.ndarray:
        self.sums = self.scratch.rows("sums in", len(self.way.row_u), self.d)
        return self.sums

    def terms(self, y_sd: np.ndarray) -> list[Terms]:
        """Two blocks of memory: the own node's rows may be in a window."""
        slot_tk, weight_tk, n = self.way.slot_tk, self.way.weight_tk, len(y_sd)
        return [Terms(y_sd, weight_tk, np.where(slot_tk < n, slot_tk, NOWHERE)),
                Terms(self.sums, weight_tk, np.where(slot_tk >= n, slot_tk - n, NOWHERE))]


def rows_as_bytes(rows: np.ndarray) -> np.ndarray:
    """Rows as bytes, uint8 [rows, width]: a view."""
    return rows.view(np.uint8).reshape(len(rows), rows.shape[1] * rows.itemsize)
