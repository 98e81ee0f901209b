"""Which GPU each rank of a node drives, and what lies near it. No GPU library is needed here.

GPUs are given as items with .index (CUDA's number in this process), .pci and .name, such as
device.GpuInfo. What is near comes from sysfs, whose folder is an argument: the NUMA nodes of PCI
devices and of cores, and the network adapters (InfiniBand and RoCE, Slingshot's cxi).
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Mapping, NamedTuple, Sequence

from hpcmoe.errors import UserError

SYSFS = "/sys"


class Choice(NamedTuple):
    """index: the GPU's number in this process; why: in words; nic: the network adapter near it, "" where
    none is known; warnings: what the user should mend."""

    index: int
    why: str
    nic: str = ""
    warnings: tuple[str, ...] = ()


class Seen(NamedTuple):
    """What one rank sees: cores it may run on, GPUs, and the part of a GPU ("" for the whole) that it was given."""

    cores: frozenset[int]
    gpus: tuple
    part: str = ""

    def keys(self) -> list[tuple[str, str]]:
        """A name for each GPU that is the same for every rank of the node."""
        return [(address(gpu.pci), self.part) for gpu in self.gpus]


def seen(gpus: Sequence, env: Mapping[str, str]) -> Seen:
    """What this process sees, to be gathered from the ranks of a node for `place`."""
    shown = env.get("CUDA_VISIBLE_DEVICES", "")
    return Seen(frozenset(os.sched_getaffinity(0)), tuple(gpus), shown if shown.startswith("MIG-") else "")


# ---------------------------------------------------------------- the choice
def place(ranks: Sequence[Seen], env: Mapping[str, str], root=SYSFS) -> list[Choice]:
    """A GPU for each rank of one node; `ranks` by local rank, the same on all of them.

    One GPU per rank; where all can have one on a NUMA node of their cores they get it, else they
    take the GPUs in order. Ranks share, with a warning, where there are too few. Raises UserError
    where a rank sees none.
    """
    for local_rank, rank in enumerate(ranks):
        if not rank.gpus:
            raise UserError(f"local rank {local_rank}: {no_gpu(env)}")
    keys = [rank.keys() for rank in ranks]
    near = _near(ranks, root)
    bound = near and near != keys
    taken, why = None, ""
    for most in range(1, len(ranks) + 1):  # ranks on one GPU, at most
        local = bound and _match(near, most)
        taken = local or _match(keys, most)
        if taken:
            why = "on the NUMA node of the rank's cores" if local else "by local rank"
            break
    if max(map(len, keys)) == 1:
        why = "the only one that this rank sees"
    sharing = Counter(taken)
    whole = {key: gpu for rank in ranks for key, gpu in zip(rank.keys(), rank.gpus)}
    nics = dict(zip(sorted(whole), nearest_adapters([whole[key] for key in sorted(whole)], root)))
    warning = (sharing_words(len(ranks), len(whole), env),)
    return [Choice(rank.gpus[mine.index(key)].index, why, nics[key], warning if sharing[key] > 1 else ())
            for rank, mine, key in zip(ranks, keys, taken)]


def place_here(everyone: Sequence[tuple[str, Seen]], rank: int, env: Mapping[str, str], root=SYSFS) -> Choice:
    """The GPU of one rank by `place`; everyone: the node of each rank of the job, and what it sees."""
    node = [r for r, (name, _) in enumerate(everyone) if name == everyone[rank][0]]
    return place([everyone[r][1] for r in node], env, root)[node.index(rank)]


def assign(cores: Sequence[set[int]], gpus: Sequence, root=SYSFS) -> list[int]:
    """`place` for ranks that all see the same GPUs: the GPU of each local rank, from the cores of each."""
    return [choice.index for choice in place([Seen(frozenset(mine), tuple(gpus)) for mine in cores], {}, root)]


def choose_gpu(local_rank: int | None, local_size: int | None, visible: Sequence, env: Mapping[str, str], root=SYSFS) -> Choice:
    """The GPU of a rank that knows nothing of the others: the only one, or the one of its number.

    CUDA_VISIBLE_DEVICES has been applied by the driver: `visible` is what is left, and its indices
    are relative. Raises UserError where nothing is visible.
    """
    if not visible:
        raise UserError(no_gpu(env))
    mine, size, count = local_rank or 0, local_size or 1, len(visible)
    nics = nearest_adapters(visible, root)
    given = "," not in env.get("CUDA_VISIBLE_DEVICES", ",")
    if count == 1 and (given or size == 1):
        return Choice(visible[0].index, "the only one that this rank sees", nics[0])
    warnings = (sharing_words(size, count, env),) if size > count else ()
    why = "the first: no local rank is known" if local_rank is None else "by local rank"
    return Choice(visible[mine % count].index, why, nics[mine % count], warnings)


def no_gpu(env: Mapping[str, str]) -> str:
    """Why no GPU may be visible, and what to ask the launcher for."""
    shown = env.get("CUDA_VISIBLE_DEVICES")
    said = "" if shown is None else f" (CUDA_VISIBLE_DEVICES = {shown!r})"
    ask = "; ask for some: --gpus-per-task=1" if "SLURM_JOB_ID" in env else ""
    return f"no GPU is visible{said}{ask}"


def sharing_words(ranks: int, gpus: int, env: Mapping[str, str]) -> str:
    """The warning that ranks share a GPU, with the line that would give each its own."""
    start = f"srun --ntasks-per-node={gpus} --gpus-per-node={gpus}"
    if "OMPI_COMM_WORLD_SIZE" in env:
        start = f"mpirun --map-by ppr:{gpus}:node"
    elif "PMI_SIZE" in env:
        start = f"mpiexec -ppn {gpus}"
    more = ", or ask for more GPUs per node" if "SLURM_JOB_ID" in env else ""
    return (f"{ranks} ranks of a node share {gpus} GPU{'s' * (gpus > 1)}, and each is slower for it: "
            f"one rank per GPU is `{start} ...`{more}")


def _near(ranks: Sequence[Seen], root) -> list[list] | None:
    """For each rank the GPUs on a NUMA node of its cores; None where sysfs does not tell of all cores."""
    node_of_gpu = {address(gpu.pci): pci_node(gpu.pci, root) for rank in ranks for gpu in rank.gpus}
    node_of_core = core_nodes(root)
    if not all(core in node_of_core for rank in ranks for core in rank.cores):
        return None
    nodes = [{node_of_core[core] for core in rank.cores} for rank in ranks]
    return [[key for key in rank.keys() if node_of_gpu[key[0]] in mine] for rank, mine in zip(ranks, nodes)]


def _match(choices: list[list], most: int) -> list | None:
    """One of its choices for each, none taken more than `most` times; None where that cannot be.

    In order where that is possible, else by augmenting paths (Kuhn's matching); then the ranks with the
    same choices have them in ascending order, so that neighbours stay neighbours.
    """
    in_order = [mine[i % len(mine)] if mine else None for i, mine in enumerate(choices)]
    if len({tuple(mine) for mine in choices}) == 1 and choices[0] and max(Counter(in_order).values()) <= most:
        return in_order
    owners: dict = {}

    def find(rank: int, tried: set) -> bool:
        for key in choices[rank]:
            if key in tried:
                continue
            tried.add(key)
            mine = owners.setdefault(key, [])
            if len(mine) < most:
                mine.append(rank)
                return True
            for i, other in enumerate(mine):
                if find(other, tried):
                    mine[i] = rank
                    return True
        return False

    if not all(find(rank, set()) for rank in range(len(choices))):
        return None
    taken = {rank: key for key, mine in owners.items() for rank in mine}
    for alike in {tuple(mine) for mine in choices}:
        ranks = [rank for rank, mine in enumerate(choices) if tuple(mine) == alike]
        for rank, key in zip(ranks, sorted((taken[rank] for rank in ranks), key=alike.index)):
            taken[rank] = key
    return [taken[rank] for rank in range(len(choices))]


# ---------------------------------------------------------------- sysfs
def address(pci: str) -> str:
    """A PCI address as sysfs writes it.

    >>> address("00000000:4E:00.0")
    '0000:4e:00.0'
    """
    domain, _, rest = pci.lower().partition(":")
    return f"{int(domain, 16):04x}:{rest}"


def pci_node(pci: str, root=SYSFS) -> int:
    """The NUMA node of a PCI device, -1 where sysfs does not tell."""
    text = _text(Path(root, "bus", "pci", "devices", address(pci), "numa_node"))
    return int(text) if text else -1


def core_nodes(root=SYSFS) -> dict[int, int]:
    """Core -> NUMA node, for the cores that sysfs tells of."""
    found = {}
    for path in Path(root, "devices", "system", "node").glob("node[0-9]*"):
        for core in core_list(_text(path / "cpulist")):
            found[core] = int(path.name[4:])
    return found


def core_list(text: str) -> list[int]:
    """Linux' short form of a list of cores, written out.

    >>> core_list("0-2,8")
    [0, 1, 2, 8]
    """
    cores: list[int] = []
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        cores += range(int(first), int(last or first) + 1)
    return cores


def _text(path: Path) -> str:
    """What the file says, "" where there is no such file."""
    try:
        return path.read_text().strip()
    except OSError:  # sysfs has no such entry, or (ENXIO, EINVAL) the device cannot tell
        return ""


def adapters(root=SYSFS) -> dict[str, str]:
    """Network adapters for MPI: name -> sysfs folder of the PCI device; only those with a link, where some have one."""
    found, linked = {}, set()
    for kind in ("infiniband", "cxi"):
        for path in sorted(Path(root, "class", kind).glob("*")):
            found[path.name] = os.path.realpath(path / "device")
            ports = list(path.glob("ports/*/state"))
            if not ports or any("ACTIVE" in _text(port) for port in ports):
                linked.add(path.name)
    return {name: folder for name, folder in found.items() if name in linked or not linked}


def nearest_adapters(gpus: Sequence, root=SYSFS) -> list[str]:
    """For each GPU the adapter with the fewest bridges between, else on its NUMA node; "" where there is none.

    Of equally near ones, the one with the fewest GPUs before it. MPI chooses by itself: this is for
    reports, and for the settings by which a user can tell it.
    """
    nics, used = adapters(root), Counter()
    names = []
    for gpu in gpus:
        folder = Path(os.path.realpath(Path(root, "bus", "pci", "devices", address(gpu.pci))))
        node = pci_node(gpu.pci, root)

        def distance(name: str) -> tuple:
            shared = len(os.path.commonpath([folder, nics[name]]).split(os.sep))
            return -shared, node != pci_node(Path(nics[name]).name, root), used[name]

        best = min(nics, key=distance, default="")
        used[best] += 1
        names.append(best)
    return names


def words(gpu, adapter: str = "", root=SYSFS) -> str:
    """ "GPU 3 (0000:4e:00.0, NUMA node 1), NIC mlx5_2": for the start line and the report."""
    node = pci_node(gpu.pci, root)
    place_words = address(gpu.pci) + (f", NUMA node {node}" if node >= 0 else "")
    return f"GPU {gpu.index} ({place_words})" + (f", NIC {adapter}" if adapter else "")
