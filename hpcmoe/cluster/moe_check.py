"""Measured MoE layers of another engine against the kernel model, which was not fitted to them.

A row is one GPU's share of a layer of experts: the busiest rank's, without exchange. Predicted are its products and the
activation between: as grouped products (one over all of the rank's experts, as that engine has it), and one expert after the other (as
this program's EXPERT has it). That engine (vLLM's fused experts) also passes over the rows of all tokens of the group, not only of
its own experts: it sorts them, writes zeros where another rank's expert is due, activates them, and sums over choices. They are predicted apart.
"""

from __future__ import annotations

import csv
import math
import re
from typing import Iterator, NamedTuple

import numpy as np

from hpcmoe.cluster.kernels import Calibration
from hpcmoe.errors import UserError, at

SIZES = ("num_tokens", "hidden_size", "inter_size", "topk", "num_experts", "moe_tp_size", "moe_ep_size")
POWER_LAW = re.compile(r"power_law_(\d+(?:\.\d+)?)")
DRAWS = 5  # of a power law, whose mean time counts: as the table was measured


class Case(NamedTuple):
    """One row of a table: tokens of all ranks of the expert group; d, f: widths; tp, ep: ranks; distribution: balanced or
    power_law_EXPONENT; seconds: measured; gated: whether experts have three matrices, else two."""

    tokens: int
    d: int
    f: int
    top_k: int
    experts: int
    tp: int
    ep: int
    distribution: str
    seconds: float
    gated: bool = True


def read_layers(path: str, ungated=()) -> list[Case]:
    """ungated: widths of experts without a gate. UserError with line and value where a row is wrong."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            missing = {*SIZES, "distribution", "latency_ms"} - set(reader.fieldnames or [])
            if missing:
                raise UserError(f"{path}: no column {', '.join(sorted(missing))}: expected {', '.join(SIZES)}, distribution, latency_ms")
            cases = [_case(f"{path}: line {line}", row) for line, row in enumerate(reader, 2)]
            cases = [case._replace(gated=case.f not in ungated) for case in cases]
    except (OSError, UnicodeDecodeError) as wrong:
        raise UserError(f"{path}: cannot be read: {getattr(wrong, 'strerror', None) or wrong}") from wrong
    if not cases:
        raise UserError(f"{path}: no rows")
    return cases


def _case(where: str, row: dict) -> Case:
    values = []
    for name in SIZES:
        if not re.fullmatch(r"[1-9]\d*", row[name] or ""):
            raise at(where, name, row[name], "an integer > 0")
        values.append(int(row[name]))
    try:
        ms = float(row["latency_ms"])
    except (TypeError, ValueError):
        ms = 0.0
    if not 0 < ms < math.inf:
        raise at(where, "latency_ms", row["latency_ms"], "a number > 0")
    case = Case(*values, row["distribution"], ms * 1e-3)
    if case.distribution != "balanced" and not POWER_LAW.fullmatch(case.distribution or ""):
        raise at(where, "distribution", case.distribution, "balanced or power_law_EXPONENT")
    if case.experts % case.ep or case.f % case.tp or case.top_k > case.experts:
        raise UserError(f"{where}: {case.experts} experts, top-{case.top_k}, on ep = {case.ep}, width {case.f} on tp = {case.tp}: expected "
                        "shares that are whole, and at least as many experts as choices")
    return case


# ---------------------------------------------------------------- rows of the busiest rank's experts
def rows_of(case: Case) -> np.ndarray:
    """Rows of each expert of the measured rank, in each draw: [draw, e]."""
    if case.distribution == "balanced":
        return _balanced(case)[None]
    exponent = float(POWER_LAW.fullmatch(case.distribution)[1])
    return np.stack([_power_law(case, exponent, np.random.default_rng(seed)) for seed in range(DRAWS)])


def _balanced(case: Case) -> np.ndarray:
    """Token t's choice i is expert t + i E / k, or spread evenly where tokens are few (collector/helper.py of AIConfigurator)."""
    stride = math.ceil(case.experts / case.top_k)
    t, i = np.arange(case.tokens)[:, None], np.arange(case.top_k)
    chosen = (t if case.tokens >= stride else t * stride // case.tokens) + i * stride
    return np.bincount(chosen.reshape(-1) % case.experts, minlength=case.experts)[:case.experts // case.ep]


def _power_law(case: Case, exponent: float, rng) -> np.ndarray:
    """Experts' shares are drawn from density x^-exponent on [1, 0.8 tokens] (few tokens: [0.01, 2]); the rank with most rows is the one
    that is measured (collector/helper.py of AIConfigurator, with this generator's numbers)."""
    total = case.tokens * case.top_k
    low, high = (1.0, 0.8 * case.tokens) if total > case.experts else (0.01, 2.0)
    power = 1 - exponent
    share_e = rng.random(case.experts)
    share_e = np.exp(np.log(low) + np.log(high / low) * share_e) if power == 0 else ((high**power - low**power) * share_e + low**power) ** (1 / power)
    rows_e = np.round(share_e / share_e.sum() * total).astype(np.int64)
    order, left = np.argsort(-rows_e, kind="stable"), int(total - rows_e.sum())
    for j in range(abs(left)):  # roundings: the largest get what is left, the smallest that have some give
        if left > 0:
            rows_e[order[j % case.experts]] += 1
        else:
            rows_e[order[np.flatnonzero(rows_e[order])[-1]]] -= 1
    by_rank = rows_e.reshape(case.ep, -1)
    return by_rank[by_rank.sum(axis=1).argmax()]


# ---------------------------------------------------------------- predictions
class Ratios(NamedTuple):
    """predicted / measured of each case [i]: as grouped products; these and the passes over all tokens; one expert after the other."""

    grouped: np.ndarray
    with_passes: np.ndarray
    one_by_one: np.ndarray

    def where(self, keep: np.ndarray) -> Ratios:
        return Ratios(*(x[keep] for x in self))

    def __str__(self) -> str:
        cells = [f"{median:>9.2f}{low:>7.2f}{high:>7.2f}" for low, median, high in (np.percentile(x, (5, 50, 95)) for x in self[:2])]
        return f"{len(self.grouped):>7,}{''.join(cells)}{np.median(self.one_by_one):>12.2f}"


def ratios(c: Calibration, cases: list[Case]) -> Ratios:
    found = np.zeros((3, len(cases)))
    same: dict[tuple, list[int]] = {}
    for i, case in enumerate(cases):
        same.setdefault((case.d, case.f // case.tp, case.experts // case.ep, case.gated), []).append(i)
    for (d, f, _, gated), places in same.items():
        wide = (1 + gated) * f
        rows = [rows_of(cases[i]) for i in places]
        rows_ie, draws = np.concatenate(rows), [len(x) for x in rows]
        seconds = np.zeros((2, len(rows_ie))) + c.elementwise_s(rows_ie.sum(axis=1) * (wide + f) * c.gemm.item_bytes)
        kinds, of_ie = np.unique(rows_ie, return_inverse=True)
        for n, k in ((wide, d), (d, f)):
            seconds[0] += c.gemm.grouped_seconds(rows_ie, np.full(len(rows_ie), n), np.full(len(rows_ie), k))
            seconds[1] += c.gemm_s(kinds, n, k)[of_ie.reshape(rows_ie.shape)].sum(axis=1)
        first = np.cumsum([0, *draws[:-1]])
        found[0, places], found[2, places] = np.add.reduceat(seconds, first, axis=1) / draws
        own = np.add.reduceat(rows_ie.sum(axis=1), first) / draws
        found[1, places] = found[0, places] + [passes_s(c, cases[i], rows) for i, rows in zip(places, own)]
    return Ratios(*(found / [case.seconds for case in cases]))


def passes_s(c: Calibration, case: Case, own: float) -> float:
    """Seconds of the passes over all tokens' choices, of which `own` are this rank's: sorted (numbers of experts and of rows, 4 bytes each),
    the others' products as zeros, their activation, the sum over choices."""
    choices, f, item = case.tokens * case.top_k, case.f // case.tp, c.gemm.item_bytes
    wide = (1 + case.gated) * f
    others, rate = choices - own, c.elementwise.gb_per_s * 1e9
    sort = 2 * float(c.elementwise_s(8 * choices))
    return sort + others * (wide + case.d + wide + f) * item / rate + float(c.elementwise_s((choices + case.tokens) * case.d * item))


def table(cases: list[Case], found: Ratios) -> Iterator[str]:
    """Lines: by geometry, then by what else may matter, then of all."""
    def part(title: str, names: list[str]) -> Iterator[str]:
        yield f"{title:<38}{'rows':>7}{'median':>9}{'p5':>7}{'p95':>7}{'median':>9}{'p5':>7}{'p95':>7}{'median':>12}"
        names_i = np.array(names)
        for name in dict.fromkeys(names):
            yield f"  {name:<36}{found.where(names_i == name)}"
        yield ""

    yield f"predicted / measured{'':<25}{'grouped products':>23}{'and its passes':>23}{'one by one':>12}"
    yield from part("hidden x width, experts, choices", [f"{c.d} x {c.f}, {c.experts}, top-{c.top_k}" for c in cases])
    yield from part("rows of an expert, mean", [_about(c.tokens * c.top_k / c.experts) for c in cases])
    yield from part("layout", [f"ep = {c.ep}, tp = {c.tp}" for c in cases])
    yield from part("distribution", [c.distribution for c in cases])
    yield from part("all", ["rows"] * len(cases))


def _about(rows: float) -> str:
    return next((f"up to {most}" for most in (1, 8, 64, 512) if rows <= most), "more")
