"""Section `correct`: every kernel against its NumPy twin, and the products against fp64, in both 16-bit types."""

from __future__ import annotations

import numpy as np

from hpcmoe.bench import cases
from hpcmoe.bench.bed import Bed
from hpcmoe.bench.record import FAILED, LATE, Section
from hpcmoe.bench.timing import Deadline
from hpcmoe.device import to_host
from hpcmoe.kernels.loader import T_DTYPE
from hpcmoe.model.dtypes import from_fp32, to_fp32

PRODUCTS = ((1, 8, 8), (3, 33, 17), (64, 512, 256), (257, 1000, 520))  # t, n, k; cuBLAS takes odd ones as well
SMALL_PRODUCTS = PRODUCTS[:2]


def correct(bed: Bed, section: Section, deadline: Deadline) -> None:
    """Runs all cases; the section fails where one does, and names it."""
    faults, count = [], 0
    for dtype in T_DTYPE:
        for name, check in _checks(bed, dtype):
            if deadline.over:
                section.status, section.error = LATE, f"{dtype}, {name} and what follows it were left out"
                break
            count += 1
            fault = _fault(bed, check)
            if fault:
                faults.append(f"{dtype}, {name}: {fault}")
    section.figures |= {"cases": count, "failed_cases": len(faults)}
    section.notes += faults
    section.goal("kernels and products that differ from their reference", "<=", 0, float(len(faults)))
    if faults:
        section.status, section.error = FAILED, faults[0]


def _fault(bed: Bed, check) -> str:
    """What check() says; a kernel that does not compile or run is a fault as well, and the next one has its turn."""
    try:
        with bed.timer.lane:
            return check()
    except Exception as error:  # pylint: disable=broad-except
        return f"{type(error).__name__}: {str(error)[:2000]}"


def _checks(bed: Bed, dtype: str):
    """(name, function that returns a fault or "")."""
    for case in cases.cases(dtype, small=bed.small):
        yield case.name, lambda case=case: cases.run(bed.kernels(dtype), case, bed.upload, to_host)
    for t, n, k in SMALL_PRODUCTS if bed.small else PRODUCTS:
        for out in (T_DTYPE[dtype], np.dtype(np.float32)):
            yield f"product {t} x {n} x {k} -> {out}", lambda s=(t, n, k), out=out: product(bed, dtype, s, out)


def product(bed: Bed, dtype: str, shape: tuple[int, int, int], out: np.dtype) -> str:
    """A product of random values against its value in fp64."""
    t, n, k = shape
    rng = np.random.default_rng(t + n + k)
    x_tk, weight_nk = (from_fp32(rng.standard_normal(size, np.float32), dtype) for size in ((t, k), (n, k)))
    out_tn = bed.empty((t, n), out)
    bed.gpu.gemm(bed.upload(x_tk), bed.upload(weight_nk), out_tn)
    want = to_fp32(x_tk).astype(np.float64) @ to_fp32(weight_nk).T.astype(np.float64)
    got = to_host(out_tn)
    error = np.abs(to_fp32(got) - want)
    bound = 1e-5 * np.sqrt(k) + (cases.ULP[dtype] if out.itemsize == 2 else 0.0) * np.abs(want)
    return "" if (error <= bound).all() else f"largest error {error.max():.3g}"
