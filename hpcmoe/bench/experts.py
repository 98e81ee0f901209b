"""Sections `expert`, `wide` and `gemm`: dense products on resident weights, and the expert step made of two of them."""

from __future__ import annotations

from typing import NamedTuple

from hpcmoe.bench import anchors
from hpcmoe.bench.bed import Bed
from hpcmoe.bench.record import LATE, Section
from hpcmoe.bench.timing import Deadline, ring
from hpcmoe.kernels import swiglu

ROWS = (4, 16, 64, 128, 256, 1024)
PEER_ROWS = 64


class Pair(NamedTuple):
    """One expert's weights and buffers for t rows: gate|up [2f, d], down [d, f], both of the 16-bit type."""

    both_weight_fd: object
    down_weight_df: object
    x_td: object
    both_tf: object
    mid_tf: object
    out_td: object

    @classmethod
    def random(cls, bed: Bed, t: int, d: int, f: int, weights: tuple | None = None) -> "Pair":
        both, down = weights or (bed.normal((2 * f, d), d**-0.5), bed.normal((d, f), f**-0.5))
        return cls(both, down, bed.normal((t, d)), bed.empty((t, 2 * f), bed.t_dtype), bed.normal((t, f)),
                   bed.empty((t, d), bed.t_dtype))

    def bare(self, gpu) -> None:
        """The two products alone."""
        gpu.gemm(self.x_td, self.both_weight_fd, self.both_tf)
        gpu.gemm(self.mid_tf, self.down_weight_df, self.out_td)

    def step(self, gpu, m) -> None:
        """The expert: down(silu(gate x) * up x)."""
        gpu.gemm(self.x_td, self.both_weight_fd, self.both_tf)
        swiglu.swiglu(m, self.both_tf, self.mid_tf, act="silu")
        gpu.gemm(self.mid_tf, self.down_weight_df, self.out_td)


def expert(bed: Bed, section: Section, deadline: Deadline) -> None:
    """The step at one expert per GPU against its two bare products, and beside public figures."""
    d, f = (64, 96) if bed.small else (5120, 8192)
    rows = (4, 64) if bed.small else ROWS
    _curve(bed, section, deadline, d, f, rows)
    for point in section.points.get("expert", []):
        section.goal(f"expert {d} x {f}, {point['rows']} rows: step / bare pair", "<=", 1.05, point["step_over_pair_ratio"])
        if not bed.small:
            point |= anchors.expert(bed.gpu.name, point["rows"])
            if "public_pair_ms" in point:
                point["step_over_public_pair_ratio"] = point["step_ms"] / point["public_pair_ms"]
    section.notes.append(f"public_*: {anchors.SOURCE}")


def wide(bed: Bed, section: Section, deadline: Deadline) -> None:
    """The paper's assumed expert, hidden 8192 and width 32768, at 128 rows: how near to reading its weights at the copy rate."""
    d, f = (64, 128) if bed.small else (8192, 32768)
    _curve(bed, section, deadline, d, f, (8,) if bed.small else (128,))
    for point in section.points.get("expert", []):
        section.goal(f"expert {d} x {f}, {point['rows']} rows: share of copy", ">=", 0.85, point["weights_share_of_copy"])


def _curve(bed: Bed, section: Section, deadline: Deadline, d: int, f: int, rows) -> None:
    gpu, m, copy = bed.gpu, bed.kernels(), bed.copy_gb_per_s()
    section.figures["copy_gb_per_s"] = copy
    nbytes = 3 * d * f * 2
    weights = [(bed.normal((2 * f, d), d**-0.5), bed.normal((d, f), f**-0.5)) for _ in range(ring(nbytes, bed.small))]
    for t in rows:
        if deadline.over:
            section.status, section.error = LATE, f"{t} rows and more were left out"
            return
        pairs = [Pair.random(bed, t, d, f, w) for w in weights]
        bare = bed.timer([lambda p=p: p.bare(gpu) for p in pairs])
        step = bed.timer([lambda p=p: p.step(gpu, m) for p in pairs])
        again = bed.timer([lambda p=p: p.bare(gpu) for p in pairs])  # before and after: the clock may move
        bare_ms = (bare.ms + again.ms) / 2
        section.add_point("expert", rows=t, pair_ms=bare_ms, step_ms=step.ms, step_over_pair_ratio=step.ms / bare_ms,
                          pair_spread_ms=abs(bare.ms - again.ms), weights_gb_per_s=1e-6 * nbytes / step.ms,
                          weights_share_of_copy=1e-6 * nbytes / step.ms / copy, step_tflop_per_s=6e-9 * t * d * f / step.ms)
        del pairs


# ---------------------------------------------------------------- products for the simulator
GEMM_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
GEMM_NK = ((16384, 5120), (5120, 8192), (28672, 4096), (4096, 14336), (65536, 8192), (8192, 32768), (6144, 4096), (4096, 4096),
           (7168, 5120), (5120, 5120))


def gemm(bed: Bed, section: Section, deadline: Deadline) -> None:
    """Milliseconds of y[m, n] = x[m, k] W[n, k]^T over rows and shapes: what the simulator is calibrated with."""
    gpu = bed.gpu
    section.figures["copy_gb_per_s"] = bed.copy_gb_per_s()
    for n, k in ((96, 64),) if bed.small else GEMM_NK:
        weights = [bed.normal((n, k), k**-0.5) for _ in range(ring(2 * n * k, bed.small))]
        for m in (1, 8) if bed.small else GEMM_ROWS:
            if deadline.over:
                section.status, section.error = LATE, f"m {m} n {n} k {k} and what follows it were left out"
                return
            x_mk, y_mn = bed.normal((m, k)), bed.empty((m, n), bed.t_dtype)
            timed = bed.timer([lambda w=w: gpu.gemm(x_mk, w, y_mn) for w in weights], 0.03)
            section.add_point("gemm", m=m, n=n, k=k, time_ms=timed.ms, rate_tflop_per_s=2e-9 * m * n * k / timed.ms)
        del weights
