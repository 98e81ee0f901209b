"""What a GPU needs to know of one step of a micro-batch: a block of integers, sent with one copy.

Counts stand in memory, not in launch arguments, so that a captured graph can be replayed with fewer rows.
"""

from __future__ import annotations

import numpy as np

from hpcmoe.compute.step import SAMPLED, Batch, Choices
from hpcmoe.device import Gpu
from hpcmoe.kernels.attention import Work as AttentionWork, tiles_of
from hpcmoe.kernels.sample import Draw

BUCKETS = sorted({*range(1, 9), *range(8, 65, 8), *range(64, 257, 32), *range(256, 1025, 128)})  # rows of captured graphs
DRAW_TYPES = (np.float64, np.int32, np.float64, np.uint64, np.uint64, np.int64, np.int32)
# A wanted row: its place, the fields of Draw; its answer: token, log-probability. In the order of `_columns`' blocks.
ROW_TYPES = (np.int32, *DRAW_TYPES, np.int32, np.float64)
ROW_BYTES = sum(np.dtype(t).itemsize for t in ROW_TYPES)
ANSWER_BYTES = ROW_BYTES - 12  # where the answers of all rows begin, per row
COUNTS = 16  # integers before the lists: rows, rows in decode, prefill tiles


def bucket_of(rows: int, most: int) -> int:
    """The smallest bucket that holds so many rows; 0 where there is none within `most`."""
    return next((b for b in BUCKETS if rows <= b <= most), 0)


class Step:
    """One micro-batch's facts on host and device. rows: of this step; decode: those of single-row segments.

    On the device, int32: token_t, position_t, slot_t; decode_b and tile_w4 as attention takes them;
    counts of rows, decode rows and tiles in n_rows, n_decode, n_tiles.
    """

    def __init__(self, gpu: Gpu, rows: int):
        self.gpu, self.most = gpu, rows
        wide = rows + -rows % 4  # lists of four integers stand on 16 bytes
        tiles = wide // 2 + 4
        size = COUNTS + 4 * wide + 4 * tiles
        self.host, self.device = gpu.pinned(size, np.int32), gpu.empty(size, np.int32)
        self.places = {"token": COUNTS, "position": COUNTS + wide, "slot": COUNTS + 2 * wide, "decode": COUNTS + 3 * wide,
                       "tile": COUNTS + 4 * wide}
        self.n_rows, self.n_decode, self.n_tiles = (self.device[i:i + 1] for i in range(3))
        self.token_t, self.position_t, self.slot_t, self.decode_b = (
            self.device[self.places[name]:self.places[name] + rows] for name in ("token", "position", "slot", "decode"))
        self.tile_w4 = self.device[self.places["tile"]:].reshape(tiles, 4)
        self.batch: Batch | None = None
        self.rows = self.decode = self.tiles = self.longest = 0

    def set(self, batch: Batch, token_t: np.ndarray | None) -> None:
        """Queues the facts of a step."""
        s = batch.segments
        first_q = np.cumsum(s.count_q) - s.count_q
        single_q = s.count_q == 1
        tile_w4 = tiles_of(first_q[~single_q], s.count_q[~single_q], s.slot_q[~single_q], s.start_q[~single_q])
        self.batch, self.rows, self.decode, self.tiles = batch, batch.rows, int(single_q.sum()), len(tile_w4)
        self.longest = int(s.position_t.max()) + 1 if batch.rows else 0
        self.host[:3] = batch.rows, self.decode, len(tile_w4)
        self._put("token", token_t)
        self._put("position", s.position_t)
        self._put("slot", s.slot_t)
        self._put("decode", first_q[single_q])
        self._put("tile", tile_w4.reshape(-1))
        self.gpu.copy(self.device, self.host)

    def _put(self, name: str, values) -> None:
        if values is not None:
            self.host[self.places[name]:self.places[name] + len(values)] = values

    def work(self, rows: int, exact: bool) -> AttentionWork:
        """What attention does in a step of `rows` rows. exact: the numbers are this step's, not those of a bucket."""
        if exact:
            return AttentionWork(self.decode_b[:self.decode], None, self.tile_w4[:self.tiles], None)
        return AttentionWork(self.decode_b[:rows], self.n_decode, self.tile_w4[:0], None)


def _columns(block, rows: int) -> list:
    """The columns of ROW_TYPES in a block of bytes: those of eight bytes first, then the others; the answers last."""
    order = sorted(range(len(ROW_TYPES)), key=lambda i: (i >= len(ROW_TYPES) - 2, -np.dtype(ROW_TYPES[i]).itemsize))
    found: list = [None] * len(ROW_TYPES)
    first = 0
    for i in order:
        end = first + rows * np.dtype(ROW_TYPES[i]).itemsize
        found[i] = block[first:end].view(ROW_TYPES[i])
        first = end
    return found


class Wanted:
    """The rows of steps whose next tokens are wanted, and how they are chosen: parameters by row, sent with one copy,
    and the answers, which come with another. choices: of all requests.
    """

    def __init__(self, gpu: Gpu, rows: int, choices: Choices):
        rows += rows % 2  # numbers of eight bytes stand on eight
        self.gpu, self.most = gpu, rows
        self.table = [column.astype(t, copy=False) for column, t in zip(choices.sampling, DRAW_TYPES)]
        self.host, self.device = gpu.pinned(rows * ROW_BYTES, np.uint8), gpu.empty(rows * ROW_BYTES, np.uint8)
        self.row_host, *self.columns_host, self.token_host, self.logprob_host = _columns(self.host, rows)
        self.row, *self.columns, self.token, self.logprob = _columns(self.device, rows)
        self.count = 0

    def set(self, batch: Batch) -> None:
        """Queues the rows of a step: the last of each sampled segment; all but a text's last where texts are scored."""
        s = batch.segments
        request_t = np.repeat(batch.request_q, s.count_q)
        given_t = np.full(len(request_t), -2, np.int64)
        if len(batch.next_t):
            given_t = np.where(batch.next_t >= 0, batch.next_t, given_t)
        given_t[np.cumsum(s.count_q)[batch.emit_q == SAMPLED] - 1] = -1
        row_n = np.flatnonzero(given_t > -2)
        self.count = n = len(row_n)
        request_n = request_t[row_n]
        self.row_host[:n] = row_n
        for host, column in zip(self.columns_host, self.table):
            host[:n] = column[request_n]
        self.columns_host[5][:n] = s.position_t[row_n] + 1
        self.columns_host[6][:n] = given_t[row_n]
        if n:
            self.gpu.copy(self.device, self.host)

    def draw(self, part: slice) -> Draw:
        return Draw(*(a[part] for a in self.columns))

    def fetch(self) -> None:
        """Queues the way back of the answers."""
        if self.count:
            answers = slice(self.most * ANSWER_BYTES, None)
            self.gpu.copy(self.host[answers], self.device[answers])

    def answer(self) -> tuple[np.ndarray, np.ndarray]:
        """(a token per sampled row, a log-probability per row), once fetched."""
        chosen = self.columns_host[6][:self.count] < 0
        return self.token_host[:self.count][chosen].astype(np.int64), self.logprob_host[:self.count].copy()
