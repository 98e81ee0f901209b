"""Which exchange `hpcmoe simulate` takes where the job leaves it open: the trial's times message by message, and what comes of it."""

import numpy as np
import pytest

from hpcmoe.cluster.network import Network
from hpcmoe.config import RouterConfig
from hpcmoe.parallel import plan
from hpcmoe.parallel.layout import Layout
from hpcmoe.simulate.choice import ExchangeTrial, exchange_trial
from hpcmoe.simulate.durations import Durations
from hpcmoe.simulate.run import simulate
from test_simulate import CLUSTER, MODEL, by_hand, report_of, told

WIDE = MODEL.__class__(**{**vars(MODEL), "router": RouterConfig(8, 4)})
SLOW_NIC = CLUSTER.replace("bandwidth_gb_per_s = 0.5", "bandwidth_gb_per_s = 0.005")
DEAR_LATENCY = CLUSTER.replace("message_us = 2.0", "message_us = 0.0").replace("latency_us = 3.0", "latency_us = 900.0").replace("latency_us = 10.0", "latency_us = 900.0")


def write(tmp_path, text: str):
    path = tmp_path / "cluster.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("layout", [Layout(1, 1, 8, 1, "all"), Layout(2, 1, 4, 1, "all"), Layout(1, 2, 4, 1, "2"), Layout(1, 1, 4, 2, "all")])
def test_the_flat_trial_message_by_message(tmp_path, layout):
    """All ranks' messages in one matrix: host time of the busiest rank, latency, and the fullest link, for counts, dispatch and combine."""
    cluster = told(write(tmp_path, CLUSTER), 8, [(1, 1)], model=WIDE).cluster
    network = Network(cluster, np.arange(8) // 4)
    durations = Durations(by_hand(), WIDE, WIDE, False, False, False)
    groups = [[dp] for dp in range(layout.dp)]  # each replica for itself
    found = exchange_trial(network, layout, WIDE, durations, groups, 6)
    slots = layout.slots(WIDE.router.experts)
    counts, rows = np.zeros((8, 8)), np.zeros((8, 8))
    for dp in range(layout.dp):
        for stage in range(layout.pp):
            leading = layout.leader_places(network.node_r, dp)[stage]
            for shard in range(layout.tp):
                column = layout.column(dp, stage, shard)
                for i, source in enumerate(column):
                    for target in column:
                        if source != target:
                            counts[source, target] = 4 * (-(-slots // layout.ep) + 4)
                            rows[source, target] = 6 * 4 / layout.ep if i in leading else 0
    expected = 0.0
    for matrix in (counts, rows * durations.row_bytes, rows.T * durations.back_bytes):
        one = network.matrix(np.arange(8), matrix)
        expected += one.host_s + one.latency_s + (one.load_l / network.bandwidth_l).max()
    assert found.rows == 6 and found.flat_s == pytest.approx(expected, rel=1e-9)


def test_rows_of_a_trial_are_those_of_the_engine():
    assert plan.trial_rows(10, 1024, 2) == 10 and plan.trial_rows(10_000, 1024, 2) == 512 and plan.trial_rows(5, 1 << 30, 2) == 1
    assert ExchangeTrial(1, 1.0, 0.89).hierarchical and not ExchangeTrial(1, 1.0, 0.91).hierarchical


@pytest.mark.parametrize("text, chosen", [(SLOW_NIC, "hierarchical"), (DEAR_LATENCY, "flat")])
def test_auto_takes_what_is_quicker(tmp_path, text, chosen):
    """A slow network between nodes, which rows should cross once; one whose latency is all, paid once more by each further hop."""
    path = write(tmp_path, text)
    reports = {name: report_of(simulate(told(path, 8, [(2, 3)] * 16, [f"run.transport={name}"], WIDE))) for name in ("auto", "ialltoallv", "hierarchical")}
    other = {"hierarchical": "ialltoallv", "flat": "hierarchical"}[chosen]
    same = {"hierarchical": "hierarchical", "flat": "ialltoallv"}[chosen]
    assert reports["auto"]["run"]["transport"] == chosen
    assert reports["auto"]["throughput"] == reports[same]["throughput"]
    assert reports["auto"]["elapsed_time"] < reports[other]["elapsed_time"]
    trial = reports["auto"]["run"]["simulated"]["transport_trial"]
    assert trial["rows"] == 2 and (trial["hierarchical_s"] < 0.9 * trial["flat_s"]) == (chosen == "hierarchical")
    assert reports["ialltoallv"]["run"]["simulated"]["transport_trial"] is None


def test_no_trial_where_nodes_do_not_matter(tmp_path):
    """All ranks of a stage on one node, or each on its own."""
    path = write(tmp_path, SLOW_NIC)
    for gpus, sets in ((4, []), (8, ["layout.dp=2", "layout.ep=4"]), (8, ["layout.pp=4", "layout.ep=2"])):
        done = simulate(told(path, gpus, [(1, 1)] * 8, sets, MODEL.__class__(**{**vars(WIDE), "layers": 4})))
        assert done.trial is None and not done.hierarchical
    assert not plan.nodes_matter(Layout(1, 1, 4, 1, "all"), [0, 1, 2, 3]) and plan.nodes_matter(Layout(1, 1, 4, 1, "all"), [0, 0, 1, 2])
