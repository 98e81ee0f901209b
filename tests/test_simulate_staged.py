"""`staged` in the simulator: copies message by message, and a step by hand."""

from dataclasses import replace

import numpy as np
import pytest

from hpcmoe.cluster.clusterfile import read_cluster
from hpcmoe.cluster.kernels import CopyModel
from hpcmoe.cluster.network import Network
from hpcmoe.errors import UserError
from hpcmoe.parallel.plan import STAGED_BYTES
from hpcmoe.simulate.run import simulate
from hpcmoe.simulate.staged import StagedNetwork
from test_simulate import CLUSTER, by_hand, report_of, told

COPIES = CopyModel(to_host_gb_per_s=4.0, to_device_gb_per_s=2.0, floor_us=5.0)
GPU = replace(by_hand(launch_us=1.0, sync_us=20.0, units=2), copies=COPIES)


@pytest.fixture
def path(tmp_path):
    (tmp_path / "c.toml").write_text(CLUSTER.replace("rank_gb_per_s = 1.0", "rank_gb_per_s = 1.0\nhost_rank_gb_per_s = 0.25"))
    return tmp_path / "c.toml"


@pytest.fixture
def network(path):
    return StagedNetwork(read_cluster(path), np.arange(8) // 4, GPU)


def test_copies_message_by_message(network):
    """Seconds of each rank's stream, by a loop over messages; what comes on top; messages of several pieces."""
    rng = np.random.default_rng(0)
    ranks, bytes_rr = np.array([0, 2, 3, 5, 6]), rng.choice([0, 700, 9e4, 2.5 * STAGED_BYTES], (5, 5))
    seconds, pieces = np.zeros(8), np.zeros(8)
    for i, a in enumerate(ranks):
        for j, b in enumerate(ranks):
            if i != j and bytes_rr[i, j]:
                seconds[a] += bytes_rr[i, j] / 4e9
                seconds[b] += bytes_rr[i, j] / 2e9
    sent, got = ((bytes_rr > 0) & ~np.eye(5, dtype=bool)).sum(axis=1), ((bytes_rr > 0) & ~np.eye(5, dtype=bool)).sum(axis=0)
    off = bytes_rr * ~np.eye(5, dtype=bool)
    pieces[ranks] = np.maximum(sent, off.sum(axis=1) / STAGED_BYTES) + np.maximum(got, off.sum(axis=0) / STAGED_BYTES)
    found, plain = network.matrix(ranks, bytes_rr), Network.matrix(network, ranks, bytes_rr)
    np.testing.assert_allclose(found.load_l[-8:] / network.bandwidth_l[-8:], seconds + 5e-6 * pieces, rtol=1e-12)
    np.testing.assert_allclose(found.load_l[:-8], plain.load_l[:-8])
    assert found.host_s - plain.host_s == pytest.approx(1e-6 * pieces.max())
    assert found.latency_s - plain.latency_s == pytest.approx(2 * 5e-6 + STAGED_BYTES / 4e9 + STAGED_BYTES / 2e9 + 20e-6)


def test_products_and_pairs_are_the_matrix(network):
    ranks, send, share = np.array([1, 2, 4, 7]), np.array([3e4, 0, 5e3, 100.0]), np.array([0.5, 0.25, 0, 0.25])
    whole, quick = network.matrix(ranks, np.outer(send, share)), network.product(ranks, send, share)
    i, j = np.nonzero(np.outer(send, share))
    pairs = network.pairs(ranks[i], ranks[j], np.outer(send, share)[i, j])
    for other in (quick, pairs):
        np.testing.assert_allclose(other.load_l, whole.load_l)
        assert other.host_s == pytest.approx(whole.host_s)
    assert pairs.latency_s == pytest.approx(whole.latency_s)  # of the largest message that there is
    assert quick.latency_s == pytest.approx(whole.latency_s + (3e4 * 0.5 - 3e4 * 0.25) * (1 / 4e9 + 1 / 2e9))  # its own to itself would be larger


def test_a_step_by_hand(path):
    """Two ranks of a node, one sequence each, two experts each: of its two choices each sends one, a row of 128 bytes, to the other
    rank. Against rows that MPI takes from the device: DISPATCH and COMBINE take the host's slower way, and the copies."""
    sets = ["run.schedule=plain", "run.device=gpu", "layout.ep=2"]
    times = {}
    for name in ("ialltoallv", "staged"):
        done = simulate(told(path, 2, [(1, 2)] * 2, [*sets, f"run.transport={name}"], calibration=GPU))
        times[name] = done.records[0].steps[1].end_s - done.records[0].steps[1].start_s
        assert report_of(done)["run"]["transport"] == ("staged" if name == "staged" else "flat")
    nbytes = 1 * 128  # one row of 64 numbers of 2 bytes, to the other rank and from it
    copying = 2 * 5e-6 + nbytes / 4e9 + nbytes / 2e9            # on each rank's stream, hides no link: these are quicker
    direct = 2 * nbytes / 2e9                                   # node's memory, both ways; the ports give 1 GB/s: 128 / 1e9
    wires = max(nbytes / 0.25e9, 2 * nbytes / 2e9, copying), max(nbytes / 1e9, direct)
    counts = 4 * (2 + 4) / 0.25e9 - max(4 * (2 + 4) / 1e9, 2 * 4 * (2 + 4) / 2e9)  # counts are on the host, whose way is slower, too
    each = wires[0] - wires[1] + (2 * 5e-6 + nbytes / 4e9 + nbytes / 2e9 + 20e-6)
    launches = 2 * 1e-6  # of DISPATCH's two copies; COMBINE's are queued while the experts compute
    assert times["staged"] - times["ialltoallv"] == pytest.approx(2 * each + launches + counts, rel=1e-6)


def test_what_is_missing_is_named(path, tmp_path):
    (tmp_path / "bare.toml").write_text(CLUSTER)
    sets = ["run.device=gpu", "run.transport=staged"]
    with pytest.raises(UserError, match="inside.host_rank_gb_per_s is missing in the cluster 'by hand'"):
        simulate(told(tmp_path / "bare.toml", 8, [(1, 1)] * 8, sets, calibration=GPU))
    with pytest.raises(UserError, match="copies is missing in the calibration of 'by hand'"):
        simulate(told(path, 8, [(1, 1)] * 8, sets, calibration=by_hand(units=2)))
