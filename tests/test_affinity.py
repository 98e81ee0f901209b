"""The GPU of each rank: machines of many shapes as sysfs trees, binding by launchers, and what is said."""

import itertools
import os
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcmoe.affinity import (Seen, adapters, address, assign, choose_gpu, core_list, core_nodes, nearest_adapters, no_gpu, pci_node,
                             place, seen, words)
from hpcmoe.errors import UserError


class Gpu(NamedTuple):
    index: int
    pci: str
    name: str = "NVIDIA H100 80GB HBM3"


def gpus(*addresses):
    return [Gpu(i, pci) for i, pci in enumerate(addresses)]


class Tree:
    """A sysfs of a machine: devices below bridges, NUMA nodes, adapters."""

    def __init__(self, root):
        self.root = root
        (root / "bus/pci/devices").mkdir(parents=True)

    def device(self, path: str, node: int):
        """A PCI device at a path of bridges such as "pci0000:15/0000:15:01.0/0000:1b:00.0"; its folder."""
        folder = self.root / "devices" / path
        folder.mkdir(parents=True)
        (folder / "numa_node").write_text(f"{node}\n")
        (self.root / "bus/pci/devices" / folder.name).symlink_to(os.path.relpath(folder, self.root / "bus/pci/devices"))
        return folder

    def adapter(self, kind: str, name: str, path: str, node: int, state: str = ""):
        entry = self.root / "class" / kind / name
        entry.mkdir(parents=True)
        (entry / "device").symlink_to(self.device(path, node))
        if state:
            (entry / "ports/1").mkdir(parents=True)
            (entry / "ports/1/state").write_text(state)

    def cores(self, *lists: str):
        for node, text in enumerate(lists):
            folder = self.root / "devices/system/node" / f"node{node}"
            folder.mkdir(parents=True)
            (folder / "cpulist").write_text(text + "\n")


@pytest.fixture
def tree(tmp_path):
    return Tree(tmp_path / "sys")


def dgx_h100(tree):
    """Two sockets, 8 GPUs, each below a switch with an adapter; two adapters for storage, one without a link."""
    tree.cores("0-55,112-167", "56-111,168-223")
    buses = ("15", "3a", "4b", "5c", "97", "b7", "c7", "d7")
    found = []
    for i, bus in enumerate(buses):
        switch = f"pci0000:{bus}/0000:{bus}:01.0/0000:{bus}:02.0"
        tree.device(f"{switch}/0000:{bus}:03.0/0000:{bus}:1b.0", i // 4)
        tree.adapter("infiniband", f"mlx5_{i + 2}", f"{switch}/0000:{bus}:04.0/0000:{bus}:18.0", i // 4, "4: ACTIVE\n")
        found.append(f"0000:{bus.upper()}:1B.0")
    tree.adapter("infiniband", "mlx5_0", "pci0000:26/0000:26:01.0/0000:29:00.0", 0, "4: ACTIVE\n")
    tree.adapter("infiniband", "mlx5_1", "pci0000:a5/0000:a5:01.0/0000:aa:00.0", 1, "1: DOWN\n")
    return gpus(*found)


def polaris(tree):
    """One socket in four NUMA nodes: the GPUs count down where the cores count up; two Slingshot adapters."""
    tree.cores("0-7,32-39", "8-15,40-47", "16-23,48-55", "24-31,56-63")
    buses = {"07": 3, "46": 2, "85": 1, "c7": 0}
    for bus, node in buses.items():
        tree.device(f"pci0000:{bus}/0000:{bus}:01.0/0000:{bus}:00.0", node)
    tree.adapter("cxi", "cxi0", "pci0000:20/0000:20:01.0/0000:21:00.0", 1)
    tree.adapter("cxi", "cxi1", "pci0000:a0/0000:a0:01.0/0000:a1:00.0", 3)
    return gpus(*(f"0000:{bus}:00.0" for bus in buses))


# ---------------------------------------------------------------- machines
def test_dgx_with_ranks_on_the_sockets_in_turn(tree):
    """Slurm's cyclic distribution: even ranks on the first socket, odd ranks on the second."""
    found = dgx_h100(tree)
    cores = [{i // 2} if i % 2 == 0 else {56 + i // 2} for i in range(8)]
    assert assign(cores, found, tree.root) == [0, 4, 1, 5, 2, 6, 3, 7]
    assert assign([{56 * (i // 4) + i} for i in range(8)], found, tree.root) == list(range(8))


def test_dgx_adapters_behind_the_same_switch(tree):
    found = dgx_h100(tree)
    assert nearest_adapters(found, tree.root) == [f"mlx5_{i + 2}" for i in range(8)]
    assert "mlx5_1" not in adapters(tree.root)
    assert words(found[3], "mlx5_5", tree.root) == "GPU 3 (0000:5c:1b.0, NUMA node 0), NIC mlx5_5"


def test_polaris_has_the_gpus_reversed(tree):
    found = polaris(tree)
    ranks = [Seen(frozenset(range(8 * i, 8 * i + 8)), tuple(found)) for i in range(4)]
    chosen = place(ranks, {}, tree.root)
    assert [choice.index for choice in chosen] == [3, 2, 1, 0]
    assert {choice.why for choice in chosen} == {"on the NUMA node of the rank's cores"}
    assert not any(choice.warnings for choice in chosen)
    assert [choice.nic for choice in chosen] == ["cxi1", "cxi0", "cxi0", "cxi1"]


def test_polaris_unbound_ranks_take_the_gpus_in_order(tree):
    found = polaris(tree)
    chosen = place([Seen(frozenset(range(64)), tuple(found))] * 4, {}, tree.root)
    assert [choice.index for choice in chosen] == [0, 1, 2, 3]
    assert chosen[0].why == "by local rank"


def test_ranks_that_cannot_all_be_near_take_the_gpus_in_order(tree):
    """Four ranks on cores of two nodes: matching some and not others would help nobody understand."""
    found = polaris(tree)
    assert assign([{0}, {1}, {8}, {9}], found, tree.root) == [0, 1, 2, 3]


def test_fewer_ranks_than_gpus(tree):
    found = polaris(tree)
    assert assign([{16}, {8}], found, tree.root) == [1, 2]
    assert assign([{0, 8, 16, 24}] * 2, found, tree.root) == [0, 1]


def test_one_socket_that_does_not_tell(tree):
    tree.cores("0-15")
    for bus in ("01", "02"):
        tree.device(f"pci0000:00/0000:00:01.0/0000:{bus}:00.0", -1)
    found = gpus("0000:01:00.0", "0000:02:00.0")
    assert assign([{0}, {1}], found, tree.root) == [0, 1]
    assert words(found[1], "", tree.root) == "GPU 1 (0000:02:00.0)"


def test_no_sysfs(tmp_path):
    found = gpus("0000:01:00.0", "0000:02:00.0", "0000:03:00.0")
    root = tmp_path / "nothing"
    assert assign([{0}, {1}, {2}], found, root) == [0, 1, 2]
    assert (adapters(root), core_nodes(root), pci_node("0000:01:00.0", root)) == ({}, {}, -1)
    assert nearest_adapters(found, root) == ["", "", ""]


# ---------------------------------------------------------------- launchers
def test_each_rank_sees_one_gpu_of_its_own(tree):
    """srun --gpus-per-task=1 with binding: every rank's GPU is its number 0, whatever its local rank."""
    found = polaris(tree)
    ranks = [Seen(frozenset({8 * i}), (Gpu(0, gpu.pci),)) for i, gpu in enumerate(found)]
    chosen = place(ranks, {"SLURM_JOB_ID": "1"}, tree.root)
    assert [choice.index for choice in chosen] == [0] * 4
    assert {choice.why for choice in chosen} == {"the only one that this rank sees"}
    assert not any(choice.warnings for choice in chosen)
    assert sorted(choice.nic for choice in chosen) == ["cxi0", "cxi0", "cxi1", "cxi1"]


def test_each_socket_sees_its_gpus(tree):
    """srun --gpu-bind=closest: the ranks of a socket see its four GPUs as 0 to 3."""
    found = dgx_h100(tree)
    ranks = [Seen(frozenset({56 * (i // 4)}), tuple(Gpu(j, found[4 * (i // 4) + j].pci) for j in range(4))) for i in range(8)]
    chosen = place(ranks, {}, tree.root)
    assert [choice.index for choice in chosen] == [0, 1, 2, 3] * 2
    assert not any(choice.warnings for choice in chosen)


def test_lists_that_overlap(tmp_path):
    """The first rank must leave its first choice to the rank that has no other."""
    a, b = gpus("0000:01:00.0", "0000:02:00.0")
    ranks = [Seen(frozenset(), (a, b)), Seen(frozenset(), (Gpu(0, a.pci),))]
    assert [choice.index for choice in place(ranks, {}, tmp_path)] == [1, 0]


def test_parts_of_one_gpu_are_not_shared(tmp_path):
    gpu = gpus("0000:01:00.0")[0]
    parts = [Seen(frozenset(), (gpu,), f"MIG-{i}") for i in range(2)]
    assert not any(choice.warnings for choice in place(parts, {}, tmp_path))
    assert all(choice.warnings for choice in place([Seen(frozenset(), (gpu,))] * 2, {}, tmp_path))


@pytest.mark.parametrize("env, line", [
    ({"SLURM_JOB_ID": "7"}, "`srun --ntasks-per-node=4 --gpus-per-node=4 ...`, or ask for more GPUs per node"),
    ({"OMPI_COMM_WORLD_SIZE": "8"}, "`mpirun --map-by ppr:4:node ...`"),
    ({"PMI_SIZE": "8"}, "`mpiexec -ppn 4 ...`"),
])
def test_more_ranks_than_gpus(tree, env, line):
    found = polaris(tree)
    ranks = [Seen(frozenset({4 * i}), tuple(found)) for i in range(8)]
    chosen = place(ranks, env, tree.root)
    assert [choice.index for choice in chosen] == [3, 3, 2, 2, 1, 1, 0, 0]
    said = {text for choice in chosen for text in choice.warnings}
    assert len(said) == 1 and "8 ranks of a node share 4 GPUs" in said.copy().pop() and line in said.pop()


def test_a_rank_without_a_gpu():
    with pytest.raises(UserError, match="local rank 1: no GPU is visible"):
        place([Seen(frozenset(), tuple(gpus("0000:01:00.0"))), Seen(frozenset(), ())], {})
    assert no_gpu({"CUDA_VISIBLE_DEVICES": "", "SLURM_JOB_ID": "1"}) == \
        "no GPU is visible (CUDA_VISIBLE_DEVICES = ''); ask for some: --gpus-per-task=1"


def test_this_process():
    mine = seen([], {"CUDA_VISIBLE_DEVICES": "MIG-abc"})
    assert mine.cores == frozenset(os.sched_getaffinity(0)) and mine.part == "MIG-abc"
    assert seen([], {"CUDA_VISIBLE_DEVICES": "0"}).part == ""


# ---------------------------------------------------------------- one rank by itself
FOUR = gpus(*(f"0000:0{i}:00.0" for i in range(1, 5)))


@pytest.mark.parametrize("local_rank, local_size, count, env, index, warned", [
    (2, 4, 4, {}, 2, False),
    (6, 8, 4, {}, 2, True),
    (3, 4, 1, {"CUDA_VISIBLE_DEVICES": "3"}, 0, False),
    (3, 4, 1, {"CUDA_VISIBLE_DEVICES": "0,1"}, 0, True),  # the driver found one of the two
    (3, 4, 1, {}, 0, True),
    (0, 1, 1, {}, 0, False),
    (None, None, 4, {}, 0, False),
])
def test_choose_gpu(tmp_path, local_rank, local_size, count, env, index, warned):
    choice = choose_gpu(local_rank, local_size, FOUR[:count], env, tmp_path)
    assert (choice.index, bool(choice.warnings)) == (index, warned)


def test_choose_gpu_says_why(tmp_path):
    for visible, rank, why in ((FOUR[:1], 0, "the only one that this rank sees"), (FOUR, 0, "by local rank"),
                               (FOUR, None, "the first: no local rank is known")):
        assert choose_gpu(rank, 1, visible, {}, tmp_path).why == why


def test_choose_gpu_without_one():
    with pytest.raises(UserError, match="no GPU is visible"):
        choose_gpu(0, 1, [], {})


# ---------------------------------------------------------------- any machine
def distances(nodes_of_ranks, node_of_gpu, chosen):
    return all(node_of_gpu[index] in nodes for nodes, index in zip(nodes_of_ranks, chosen))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=5), st.data())
def test_near_if_and_only_if_possible(tmp_path_factory, node_of_gpu, data):
    """Against all permutations: one GPU per rank always, near where any permutation is near for all."""
    nodes_of_ranks = data.draw(st.lists(st.sets(st.integers(0, 3), min_size=1), min_size=1, max_size=len(node_of_gpu)))
    tree = Tree(tmp_path_factory.mktemp("any") / "sys")
    tree.cores("0", "1", "2", "3")
    for i, node in enumerate(node_of_gpu):
        tree.device(f"pci0000:00/0000:0{i}:00.0", node)
    chosen = assign(nodes_of_ranks, gpus(*(f"0000:0{i}:00.0" for i in range(len(node_of_gpu)))), tree.root)
    assert len(set(chosen)) == len(chosen)
    possible = any(distances(nodes_of_ranks, node_of_gpu, p) for p in itertools.permutations(range(len(node_of_gpu)), len(nodes_of_ranks)))
    if possible:
        assert distances(nodes_of_ranks, node_of_gpu, chosen)
    else:
        assert chosen == list(range(len(chosen)))


@settings(max_examples=50, deadline=None)
@given(st.sets(st.integers(0, 300)))
def test_core_list_reads_what_linux_writes(cores):
    parts = []
    for _, group in itertools.groupby(enumerate(sorted(cores)), lambda pair: pair[1] - pair[0]):
        run = [core for _, core in group]
        parts.append(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}")
    assert core_list(",".join(parts)) == sorted(cores)


def test_address():
    assert address("00000000:4E:00.0") == address("0000:4e:00.0") == "0000:4e:00.0"
    assert address("10000:01:00.0") == "10000:01:00.0"
