"""Cluster files and calibrations: what is shipped is sound, what is wrong is refused by file, key and value."""

import dataclasses
import re

import numpy as np
import pytest

from hpcmoe.cluster.clusterfile import read_cluster
from hpcmoe.cluster.kernels import find_calibration, read_calibration, shipped
from hpcmoe.cluster.machine import read_machine
from hpcmoe.cluster.network import Network
from hpcmoe.errors import UserError
from mpi import ROOT

CLUSTERS = sorted(ROOT.glob("inputs/clusters/*.toml"))
WHOLE = """
name = "test"
calibration = "h100_sxm"
[nodes]
count = 4
ranks_per_node = 4
[rank]
memory_gib = 1.0
tflop_per_s = 1.0
[inside]
rank_gb_per_s = 100.0
latency_us = 1.0
[nic]
per_node = 2
bandwidth_gb_per_s = 10.0
latency_us = 2.0
[[switch]]
nodes = 2
oversubscription = 2.0
[mpi]
message_us = 0.5
"""


def refused(path, text, *words, read=read_cluster):
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        read(path, simulate=True) if read is read_cluster else read(path)
    message = str(caught.value)
    assert message.count("\n") == 0 and all(word in message for word in (str(path), *words)), message


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda p: p.stem)
def test_shipped_cluster_files_are_sound(path):
    c = read_cluster(path)
    machine = read_machine(str(path))
    assert len(machine.node_of_rank) == c.ranks
    if path.stem == "four_pretend_nodes":  # for `place` alone
        return
    c = read_cluster(path, simulate=True)
    calibration = read_calibration(find_calibration(c.calibration, str(path)))
    peak = calibration.gemm.units * calibration.gemm.unit_gflop_per_s / 1e3
    assert peak == pytest.approx(c.rank.tflop_per_s, rel=0.01), "the file and its calibration speak of the same processor"
    assert np.isfinite(Network(c).bandwidth_l).all() and (Network(c).bandwidth_l > 0).all()


def test_the_machines_asked_for_are_there():
    files = {path.stem: read_cluster(path) for path in CLUSTERS}
    dgx = files["dgx_h100_ndr"]
    assert (dgx.ranks, dgx.nic.per_node, dgx.nic.bandwidth_gb_per_s * 8) == (64, 8, 400)
    assert files["h100_4gpu_2nic"].nodes.ranks_per_node == 2 * files["h100_4gpu_2nic"].nic.per_node == 4
    assert files["dgx_h200_ndr"].rank.memory_gib > dgx.rank.memory_gib
    assert files["slingshot_gh200"].nic.per_node * files["slingshot_gh200"].nic.bandwidth_gb_per_s * 8 == 800


@pytest.mark.parametrize("path", [*CLUSTERS, *sorted(ROOT.glob("inputs/calibrations/*.toml"))], ids=lambda p: p.stem)
def test_every_number_has_its_source(path):
    """In a comment on its line; but for what was fitted or measured, whose source stands above, and made-up nodes."""
    if path.stem in ("four_pretend_nodes", "demo_core"):
        assert path.read_text().startswith("#")
        return
    table, bare = "", []
    for line in path.read_text().splitlines():
        code, _, comment = line.partition("#")
        table = code.strip() if code.startswith("[") else table
        if re.match(r"\w+ = [\d.-]", code) and not comment and table not in ("[gemm]", "[[gemm.tile]]"):
            bare.append(line)
    assert bare == []


@pytest.mark.parametrize("old, new, words", [
    ("rank_gb_per_s = 100.0", "", ["inside", "rank_gb_per_s"]),
    ("rank_gb_per_s = 100.0", "rank_gb_per_s = 0.0", ["inside.rank_gb_per_s = 0.0", "> 0"]),
    ("rank_gb_per_s = 100.0", "rank_gb_per_s = -1", ["inside.rank_gb_per_s = -1", "> 0"]),
    ("rank_gb_per_s = 100.0", "rank_gb_per_s = inf", ["inside.rank_gb_per_s = inf"]),
    ("rank_gb_per_s = 100.0", "rank_gb_per_s = nan", ["inside.rank_gb_per_s = nan"]),
    ("rank_gb_per_s = 100.0", 'rank_gb_per_s = "100"', ["inside.rank_gb_per_s = '100'", "a number"]),
    ("rank_gb_per_s = 100.0", "rank = 100.0", ["inside.rank = 100.0", "rank_gb_per_s"]),  # no unit: not a key
    ("latency_us = 2.0", "latency = 2.0", ["nic.latency = 2.0", "latency_us"]),
    ("latency_us = 2.0", "latency_us = -2.0", ["nic.latency_us = -2.0", ">= 0"]),
    ("latency_us = 2.0", "", ["nic.latency_us is missing"]),
    ("per_node = 2", "per_node = 3", ["nic.per_node = 3", "divisor", "4"]),
    ("per_node = 2", "per_node = 0", ["nic.per_node = 0"]),
    ("oversubscription = 2.0", "", ["switch[0].uplink_gb_per_s", "oversubscription"]),
    ("oversubscription = 2.0", "oversubscription = 2.0\nuplink_gb_per_s = 5.0", ["switch[0].uplink_gb_per_s = 5.0", "either"]),
    ("oversubscription = 2.0", "oversubscription = 0.0", ["switch[0].oversubscription = 0.0", "> 0"]),
    ("[[switch]]", "[switch]", ["switch", "[[switch]]"]),
    ("[mpi]", "[[switch]]\nnodes = 3\nuplink_gb_per_s = 1\n[mpi]", ["switch[1].nodes = 3", "multiple of the 2"]),
    ("[mpi]\nmessage_us = 0.5", "", ["mpi is missing", "simulation"]),
    ('calibration = "h100_sxm"', "", ["calibration is missing"]),
    ("[nic]", "[nics]", ["nics", "nic"]),
    ("message_us = 0.5", "message_us = 0.5\nefficiency = 1", ["mpi.efficiency"]),
    ("latency_us = 2.0", "latency_us = 2.0\nefficiency = 1.5", ["nic.efficiency = 1.5", "at most 1"])])
def test_cluster_files_that_are_wrong_are_refused(tmp_path, old, new, words):
    assert old in WHOLE
    refused(tmp_path / "c.toml", WHOLE.replace(old, new, 1), *words)


def test_several_nodes_without_adapters_are_refused(tmp_path):
    start, end = WHOLE.index("[nic]"), WHOLE.index("[mpi]")
    refused(tmp_path / "c.toml", WHOLE[:start] + WHOLE[end:], "nic is missing", "4 nodes")


def test_levels_of_switches(tmp_path):
    """Uplinks: of 2 nodes with 2 adapters of 10 GB/s, 2 : 1 oversubscribed: 20 GB/s; of two such, 4 : 1: 10 GB/s; as given."""
    text = WHOLE.replace("[mpi]", "[[switch]]\nnodes = 4\noversubscription = 4\n[[switch]]\nnodes = 8\nuplink_gb_per_s = 7\n[mpi]")
    (tmp_path / "c.toml").write_text(text.replace("count = 4", "count = 16"))
    c = read_cluster(tmp_path / "c.toml", simulate=True)
    np.testing.assert_allclose(c.uplinks(), [20e9, 10e9, 7e9])
    machine = read_machine(str(tmp_path / "c.toml"))
    assert machine.switch_n == tuple(n // 2 for n in range(16)) and machine.uplink == pytest.approx(20e9)
    assert machine.bandwidth_n == (20e9,) * 16


def test_a_calibration_is_found_by_name_or_beside_the_file(tmp_path):
    assert {"h100_sxm", "h200_sxm"} <= set(shipped())
    assert find_calibration("h100_sxm", "x/c.toml") == ROOT / "inputs" / "calibrations" / "h100_sxm.toml"
    assert find_calibration("../mine.toml", str(tmp_path / "a" / "c.toml")) == tmp_path / "a" / ".." / "mine.toml"
    with pytest.raises(UserError, match="calibration = 'a100'.*h100_sxm"):
        find_calibration("a100", "c.toml")


@pytest.mark.parametrize("old, new, words", [
    ("floor_us = 2.547", "floor_us = -1.0", ["gemm.floor_us = -1.0"]), ("units = 132", "units = 0", ["gemm.units = 0"]),
    ("efficiency = 0.7435", "efficiency = 1.5", ["gemm.tile[0].efficiency = 1.5"]), ("[host]", "[hosts]", ["hosts"]),
    ("efficiency = 0.7435", "efficiency = 0", ["gemm.tile[0].efficiency = 0"]),
    ("kv_gb_per_s", "kv_bandwidth", ["attention.kv_bandwidth"]), ("splits = [1, ", "splits = [", ["gemm.splits"]),
    ("splits = [1, ", 'splits = ["1", ', ["gemm.splits", "integers"]), ("sync_us = 3.8", "sync_us = nan", ["host.sync_us = nan"])])
def test_calibrations_that_are_wrong_are_refused(tmp_path, old, new, words):
    text = (ROOT / "inputs" / "calibrations" / "h100_sxm.toml").read_text()
    assert old in text
    refused(tmp_path / "k.toml", text.replace(old, new, 1), *words, read=read_calibration)


def test_no_two_fields_share_a_name_with_other_units():
    """Every time is in us or ns, every rate in GB/s, GFLOP/s or TFLOP/s, by name."""
    from hpcmoe.cluster import clusterfile, kernels
    from hpcmoe.cluster.gemm import GemmModel
    plain = {"count", "ranks_per_node", "per_node", "nodes", "efficiency", "oversubscription", "units", "item_bytes", "sharpness",
             "hot_fraction", "splits", "tile", "chunk_part", "extra_keys", "together", "plan_rows"}
    ends = ("_us", "_ns", "_gb_per_s", "_gflop_per_s", "tflop_per_s", "_gib", "_kib")
    for table in (clusterfile.NodesTable, clusterfile.RankTable, clusterfile.InsideTable, clusterfile.NicTable, clusterfile.SwitchTable,
                  clusterfile.MpiTable, clusterfile.CoresTable, GemmModel, kernels.AttentionModel, kernels.ElementwiseModel, kernels.HostModel, kernels.CallsModel):
        for field in dataclasses.fields(table):
            assert field.name in plain or field.name.endswith(ends) or field.name == "gb_per_s", f"{table.__name__}.{field.name}"
