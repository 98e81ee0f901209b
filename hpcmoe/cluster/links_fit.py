"""Fits what GPUs of a node reach over their links to a table of NCCL's collectives.

    time = min(small start + W / small rate, large start + V / large rate) + step * (gpus - 2)

V: bytes that leave a GPU: (gpus - 1) / gpus of the buffer for all-to-all, all-gather and reduce-scatter (the buffer:
all that a GPU has before or after), twice that for all-reduce (rings; Thakur et al., IJHPCA 19 (2005) 1). W is V for
rings; in an all-to-all messages to different GPUs go side by side, and W is one of them. Two protocols: one for small
messages that starts early and has a low rate (NCCL's LL), one for large ones the other way round.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from hpcmoe.cluster.fit import FitError, least_squares
from hpcmoe.errors import UserError, at

OPS = {"alltoall": 1.0, "all_gather": 1.0, "reduce_scatter": 1.0, "all_reduce": 2.0}  # V over (gpus - 1) / gpus of the buffer
COLUMNS = ("op_name", "num_gpus", "elements_fp16", "latency_ms")


class Collectives(NamedTuple):
    """Measured collectives: name, GPUs, bytes of the whole buffer, s: [i]."""

    op: np.ndarray
    gpus: np.ndarray
    nbytes: np.ndarray
    seconds: np.ndarray

    def where(self, keep) -> Collectives:
        return Collectives(*(x[keep] for x in self))

    def leaving(self) -> np.ndarray:
        """V, bytes that leave each GPU: [i]."""
        passes = np.array([OPS[op] for op in self.op])
        return passes * self.nbytes * (self.gpus - 1) / self.gpus

    def in_a_row(self) -> np.ndarray:
        """W, of those the bytes that go one after the other: [i]."""
        return np.where(self.op == "alltoall", self.nbytes / self.gpus, self.leaving())


def read_collectives(path: str) -> Collectives:
    """The rows of a CSV file with the columns COLUMNS. UserError with line and value where one is wrong."""
    rows = []
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            missing = set(COLUMNS) - set(reader.fieldnames or [])
            if missing:
                raise UserError(f"{path}: no column {', '.join(sorted(missing))}: expected {', '.join(COLUMNS)}")
            for line, row in enumerate(reader, 2):
                if row["op_name"] not in OPS:
                    raise at(f"{path}: line {line}", "op_name", row["op_name"], "one of " + ", ".join(OPS))
                try:
                    numbers = int(row["num_gpus"]), 2 * int(row["elements_fp16"]), float(row["latency_ms"]) * 1e-3
                except (TypeError, ValueError):
                    numbers = (0, 0, 0.0)
                if not (numbers[0] >= 2 and numbers[1] > 0 and 0 < numbers[2] < float("inf")):
                    raise at(f"{path}: line {line}", "", list(row.values()), "num_gpus >= 2, numbers > 0")
                rows.append((row["op_name"], *numbers))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not rows:
        raise UserError(f"{path}: no rows")
    return Collectives(*(np.array(x) for x in zip(*rows)))


@dataclass(frozen=True)
class LinkModel:
    """One collective. small_*: of the protocol for small messages; large_*: for large ones; step_us: per GPU beyond two."""

    small_us: float
    small_gb_per_s: float
    large_us: float
    large_gb_per_s: float
    step_us: float

    def seconds(self, rows: Collectives) -> np.ndarray:
        small = self.small_us * 1e-6 + rows.in_a_row() / (self.small_gb_per_s * 1e9)
        large = self.large_us * 1e-6 + rows.leaving() / (self.large_gb_per_s * 1e9)
        return np.minimum(small, large) + self.step_us * 1e-6 * (rows.gpus - 2)


START = LinkModel(6.0, 30.0, 10.0, 300.0, 0.5)


def fit_links(rows: Collectives) -> LinkModel:
    """The model of one collective, nearest to its rows."""
    names = list(vars(START))

    def model(x) -> LinkModel:
        return LinkModel(**dict(zip(names, map(float, np.exp(x)))))

    x = least_squares(lambda x: model(x).seconds(rows), np.log(list(vars(START).values())), rows.seconds)
    return LinkModel(**{name: float(f"{value:.4g}") for name, value in vars(model(x)).items()})


def link_error(model: LinkModel, rows: Collectives) -> FitError:
    return FitError.of(model.seconds(rows), rows.seconds)
