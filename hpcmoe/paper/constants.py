"""The numbers that everything rests on, and what each of them stands on: read from the comments of cluster and calibration file.

A comment that says "assumed" makes its number assumed; "fitted" or "measured" say what they say; any other comment is a source that is cited.
Numbers of [gemm] have one source together, the file's `source`.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from hpcmoe.errors import UserError
from hpcmoe.paper.steady import Machine

ASSUMED, FITTED, MEASURED, CITED = "assumed", "fitted", "measured", "cited"
MUCH = 1e6  # a rate so many times larger takes no time
LINE = re.compile(r"^(\w+) = ([^#]*?)\s*(?:#\s*(.*))?$")
FORMS = ("count", "ranks_per_node", "per_node", "nodes", "oversubscription", "chunk_part", "memory_gib")  # a machine's form, not how fast it is


class Constant(NamedTuple):
    """place: "cluster" or "calibration"; table: its TOML table, "switch[0]" of several; standing: one of the four above; source: the comment."""

    place: str
    table: str
    key: str
    value: float
    standing: str
    source: str

    @property
    def name(self) -> str:
        return f"{self.table}.{self.key}"


def read_constants(cluster: str | Path, calibration: str | Path) -> list[Constant]:
    """Of both files, in their order, without [gemm] (see gemm_source)."""
    return [*_read(Path(cluster), "cluster"), *_read(Path(calibration), "calibration")]


def gemm_standing(source: str) -> str:
    return MEASURED if MEASURED in source else FITTED


def _read(path: Path, place: str) -> list[Constant]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    found, table, several = [], "", {}
    for line in lines:
        text = line.strip()
        if text.startswith("[["):
            name = text[2:text.index("]")]
            several[name] = several.get(name, -1) + 1
            table = f"{name}[{several[name]}]"
        elif text.startswith("["):
            table = text[1:text.index("]")]
        elif text.startswith("#") and line[0].isspace() and found:  # goes on with the comment above
            found[-1] = found[-1]._replace(source=f"{found[-1].source} {text.lstrip('# ')}")
        elif table and not table.startswith("gemm") and (match := LINE.match(text)):
            key, value, comment = match.groups()
            found.append(Constant(place, table, key, float(value.replace("_", "")), "", comment or ""))
    return [c._replace(standing=_standing(c.source)) for c in found if c.key not in FORMS]


def _standing(comment: str) -> str:
    return next((word for word in (ASSUMED, MEASURED, FITTED) if re.search(rf"\b{word}\b", comment)), CITED if comment else ASSUMED)


# ---------------------------------------------------------------- were it free
def free(machine: Machine, constants: list[Constant]) -> Machine:
    """The machine with these constants at their best: times 0, efficiencies 1, rates without limit."""
    for c in constants:
        machine = _with(machine, c, 1.0 if c.key == "efficiency" else 0.0 if c.key.endswith(("_us", "_ns", "_keys")) else c.value * MUCH)
    return machine


def _with(machine: Machine, c: Constant, value: float) -> Machine:
    whole = getattr(machine, c.place)
    name, _, number = c.table.partition("[")
    table = getattr(whole, name)
    if number:
        i = int(number.rstrip("]"))
        table = (*table[:i], replace(table[i], **{c.key: value}), *table[i + 1:])
    else:
        table = replace(table, **{c.key: value})
    return machine._replace(**{c.place: replace(whole, **{name: table})})


def network(machine: Machine, factor: float, waits: bool = True) -> Machine:
    """The machine with all links `factor` times as fast; waits: with latencies and host time per message as they are, else none."""
    c, times, wait = machine.cluster, lambda x: None if x is None else x * factor, float(waits)
    inside = replace(c.inside, latency_us=wait * c.inside.latency_us, rank_gb_per_s=times(c.inside.rank_gb_per_s),
                     node_gb_per_s=times(c.inside.node_gb_per_s))
    nic = c.nic and replace(c.nic, latency_us=wait * c.nic.latency_us, bandwidth_gb_per_s=c.nic.bandwidth_gb_per_s * factor,
                            rank_gb_per_s=times(c.nic.rank_gb_per_s), node_gb_per_s=times(c.nic.node_gb_per_s))
    switch = tuple(replace(level, latency_us=wait * level.latency_us, uplink_gb_per_s=times(level.uplink_gb_per_s)) for level in c.switch)
    mpi = replace(c.mpi, message_us=wait * c.mpi.message_us)
    return machine._replace(cluster=replace(c, inside=inside, nic=nic, switch=switch, mpi=mpi))


def no_network(machine: Machine) -> Machine:
    """The machine with messages that take no time, on links or of hosts."""
    return network(machine, MUCH, waits=False)
