"""What a rank's kernels take, in seconds: from a calibration file (inputs/calibrations/*.toml).

Attention is a roofline with efficiencies: the longer of arithmetic and reading keys and values. Whatever passes over
rows once (norms, rotary positions, routing, permuting, merging) is priced by its bytes.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from hpcmoe.cluster.gemm import GemmModel
from hpcmoe.config import from_dict
from hpcmoe.errors import at
from hpcmoe.files import read_toml

SHIPPED = Path(__file__).resolve().parents[2] / "inputs" / "calibrations"


@dataclass(frozen=True)
class AttentionModel:
    """What attention takes.

    prefill_gflop_per_s, decode_gflop_per_s: of the two products with keys and values; kv_gb_per_s: of reading them; score_ns:
    for each score of each head besides (softmax, where it is not hidden); chunk_part: of a chunk's own square of scores
    that is computed: 0.5 where what no row may see is left out, 1 where it is masked. floor_us: of one call; segment_us:
    of each prefill chunk, row_us: of each decode row besides. extra_keys: a chunk's row costs as if it saw so many more (tiles that
    are not full, their beginning and end); ramp_us: the most that reading takes besides, half of it where reading itself takes so long.
    """

    prefill_gflop_per_s: float
    decode_gflop_per_s: float
    kv_gb_per_s: float
    score_ns: float
    chunk_part: float
    floor_us: float
    segment_us: float
    row_us: float
    extra_keys: float = 0.0
    ramp_us: float = 0.0


@dataclass(frozen=True)
class ElementwiseModel:
    """What a pass over rows reaches: gb_per_s, bytes read and written together; floor_us: of one call."""

    gb_per_s: float
    floor_us: float


@dataclass(frozen=True)
class HostModel:
    """launch_us: what the host needs to start a kernel; sync_us: what passes after the device's last kernel until the host
    goes on. On a CPU, where nothing is launched, both are what a call costs. graph_us: to start a CUDA graph (left out: as a
    kernel)."""

    launch_us: float
    sync_us: float
    graph_us: float | None = None


@dataclass(frozen=True)
class CopyModel:
    """Copies between a device and pinned host memory: rates each way; floor_us: of one copy."""

    to_host_gb_per_s: float
    to_device_gb_per_s: float
    floor_us: float


@dataclass(frozen=True)
class CallsModel:
    """What a CPU's ops take besides their products, attention and passes over rows: the program's own work. Of a GPU's host: op_us alone.

    KIND_us: of an op, KIND_row_us: of each of its rows; expert_one_us: of each expert that has rows; draw_us, draw_ns: of an op that
    draws tokens, and of each such row and entry of the vocabulary; step_us, step_row_us: of putting a step together, and of each
    sequence in it; plan_us, expert_plan_us: of a product, and of an expert, on a number of rows that it has not had before, where
    plan_rows are the most of one call (0: no limit). Of the engine: op_us of every op, counts_us of COUNTS, move_us of DISPATCH and of COMBINE besides.
    """

    begin_us: float = 0.0
    begin_row_us: float = 0.0
    attend_us: float = 0.0
    attend_row_us: float = 0.0
    gate_us: float = 0.0
    gate_row_us: float = 0.0
    dispatch_us: float = 0.0
    dispatch_row_us: float = 0.0
    expert_us: float = 0.0
    expert_one_us: float = 0.0
    expert_row_us: float = 0.0
    merge_us: float = 0.0
    merge_row_us: float = 0.0
    sample_us: float = 0.0
    sample_row_us: float = 0.0
    draw_us: float = 0.0
    draw_ns: float = 0.0
    step_us: float = 0.0
    step_row_us: float = 0.0
    plan_us: float = 0.0
    expert_plan_us: float = 0.0
    plan_rows: int = 0
    op_us: float = 0.0
    counts_us: float = 0.0
    move_us: float = 0.0


@dataclass(frozen=True)
class Calibration:
    """A calibration file: kernels of one rank of the machine `machine`; source: where the numbers come from; copies: where a device
    has a memory of its own and they are known; processor: the rank's, in its own words ("": not known)."""

    machine: str
    source: str
    gemm: GemmModel
    attention: AttentionModel
    elementwise: ElementwiseModel
    host: HostModel
    copies: CopyModel | None = None
    calls: CallsModel = CallsModel()
    processor: str = ""

    def gemm_s(self, m, n, k) -> np.ndarray:
        """Products x[m, k] W[k, n]; sizes are broadcast."""
        return self.gemm.seconds(m, n, k)

    def prefill_s(self, start_q, count_q, heads: int, kv_heads: int, head_dim: int) -> float:
        """Attention of one call over chunks of prompts: count_q rows from position start_q on.

        4 head_dim flop per score: two for q k, two for the weighted value; keys and values of a chunk are read once.
        """
        a, start_q, count_q = self.attention, np.asarray(start_q, dtype=float), np.asarray(count_q, dtype=float)
        if not count_q.any():
            return 0.0
        scores = heads * float((count_q * (start_q + a.chunk_part * count_q + a.extra_keys)).sum())
        arithmetic = scores * (4 * head_dim / (a.prefill_gflop_per_s * 1e9) + a.score_ns * 1e-9)
        keys, rows = float((start_q + count_q).sum()), float(count_q.sum())
        body = max(arithmetic, self._moved_s(keys, rows, heads, kv_heads, head_dim))
        return (a.floor_us + a.segment_us * len(count_q)) * 1e-6 + body

    def decode_s(self, keys, rows, heads: int, kv_heads: int, head_dim: int) -> np.ndarray:
        """Attention of one new token of each of `rows` sequences, with `keys` tokens in their caches altogether."""
        a, keys, rows = self.attention, np.asarray(keys, dtype=float), np.asarray(rows, dtype=float)
        arithmetic = heads * keys * (4 * head_dim / (a.decode_gflop_per_s * 1e9) + a.score_ns * 1e-9)
        body = np.maximum(arithmetic, self._moved_s(keys, rows, heads, kv_heads, head_dim))
        return np.where(rows > 0, (a.floor_us + a.row_us * rows) * 1e-6 + body, 0.0)

    def _moved_s(self, keys, rows, heads: int, kv_heads: int, head_dim: int):
        """Reading keys, values and queries, writing rows."""
        seconds = self.gemm.item_bytes * head_dim * (2 * keys * kv_heads + 2 * rows * heads) / (self.attention.kv_gb_per_s * 1e9)
        ramp = self.attention.ramp_us * 1e-6
        return seconds * (1 + ramp / (seconds + ramp)) if ramp else seconds

    def elementwise_s(self, nbytes) -> np.ndarray:
        """One pass that reads and writes so many bytes altogether; 0 for none."""
        nbytes = np.asarray(nbytes, dtype=float)
        return np.where(nbytes > 0, self.elementwise.floor_us * 1e-6 + nbytes / (self.elementwise.gb_per_s * 1e9), 0.0)

    @property
    def launch_s(self) -> float:
        """Host time to start a kernel."""
        return self.host.launch_us * 1e-6

    @property
    def graph_s(self) -> float:
        """Host time to start what is replayed as a graph."""
        return self.launch_s if self.host.graph_us is None else self.host.graph_us * 1e-6

    @property
    def sync_s(self) -> float:
        """From the device's last kernel until the host goes on."""
        return self.host.sync_us * 1e-6


# ---------------------------------------------------------------- files
def find_calibration(name: str, beside: str) -> Path:
    """The file that a cluster file names: a path relative to it (NAME.toml), or a shipped calibration's name."""
    if name.endswith(".toml"):
        return Path(beside).parent / name
    path = SHIPPED / f"{name}.toml"
    if not path.exists():
        raise at(beside, "calibration", name, "a path ending in .toml, or one of " + ", ".join(shipped()))
    return path


def shipped() -> list[str]:
    """Names of the calibrations that come with the project."""
    return sorted(path.stem for path in SHIPPED.glob("*.toml"))


def read_calibration(path: str | Path) -> Calibration:
    """Raises UserError naming file, key and value."""
    where = str(path)
    found = from_dict(Calibration, read_toml(path), where)
    _check_positive(asdict(found), where)
    for i, tile in enumerate(found.gemm.tile):
        if tile.efficiency > 1:
            raise at(where, f"gemm.tile[{i}].efficiency", tile.efficiency, "a part of the peak: above 0, at most 1")
    if not found.gemm.tile or min(found.gemm.splits, default=0) != 1:
        raise at(where, "gemm.splits", list(found.gemm.splits), "1 among them, and at least one [[gemm.tile]]")
    return found


def kind_of(name: str) -> str:
    """ "H100" or "H200" for the SXM parts that CUDA calls "NVIDIA H100 80GB HBM3", "NVIDIA H200"; "" for others.

    >>> kind_of("NVIDIA H200"), kind_of("NVIDIA H100 PCIe"), kind_of("NVIDIA GH200 480GB")
    ('H200', '', '')
    """
    words = name.upper().split()
    if "PCIE" in words or "NVL" in words:
        return ""
    return next((kind for kind in ("H100", "H200") if kind in words), "")


def same_kind(a: str, b: str) -> bool:
    """Whether two names of machines are one, or of one kind of GPU.

    >>> same_kind("NVIDIA H200", "NVIDIA H200 SXM 141 GB"), same_kind("NVIDIA H100 80GB HBM3", "NVIDIA H200")
    (True, False)
    """
    return a == b or "" != kind_of(a) == kind_of(b)


MAY_BE_ZERO = {"hot_fraction", "launch_us", "sync_us", "floor_us", "wave_us", "split_us", "score_ns", "segment_us", "row_us", "extra_keys",
               "ramp_us", "graph_us", *vars(CallsModel())}


def _check_positive(values: dict, where: str, prefix: str = "") -> None:
    """Every number > 0, a few >= 0, all finite."""
    for name, value in values.items():
        if isinstance(value, dict):
            _check_positive(value, where, f"{prefix}{name}.")
        elif isinstance(value, (list, tuple)):
            for i, item in enumerate(value):
                here = f"{prefix}{name}[{i}]"
                _check_positive(*((item, where, here + ".") if isinstance(item, dict) else ({"": item}, where, here)))
        elif isinstance(value, (int, float)):
            if not (0 < value < float("inf") or (value == 0 and name in MAY_BE_ZERO)):
                raise at(where, prefix + name, value, f"a number {'>=' if name in MAY_BE_ZERO else '>'} 0")


def gemm_toml(model: GemmModel) -> str:
    """[gemm] of a calibration file."""
    values = {name: value for name, value in vars(model).items() if name != "tile"}
    return table_toml("gemm", values) + "".join("\n" + table_toml("[gemm.tile]", vars(tile)) for tile in model.tile)


def calibration_toml(c: Calibration) -> str:
    """A calibration file's text."""
    tables = [table_toml(name, vars(getattr(c, name))) for name in ("attention", "elementwise", "host", "calls", "copies") if getattr(c, name)]
    heads = "".join(f"{name} = {json.dumps(getattr(c, name))}\n" for name in ("machine", "source", "processor"))
    return f"{heads}\n{gemm_toml(c.gemm)}\n" + "\n".join(tables)


def table_toml(name: str, values: dict) -> str:
    """One table of a calibration file; None is left out."""
    return "".join([f"[{name}]\n"] + [f"{key} = {list(value) if isinstance(value, tuple) else value!r}\n" for key, value in values.items()
                                      if value is not None])
