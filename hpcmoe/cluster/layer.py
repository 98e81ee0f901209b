"""The exchanges of one MoE layer on a cluster's links, from the choices of its tokens: what a trial of the engine's exchanges has to take.

Letters: r, s places of a stage; e experts; t a leader's tokens; k their choices.
"""

from __future__ import annotations

from typing import Sequence

import numpy as np

from hpcmoe.cluster.network import Exchange, Network
from hpcmoe.cluster.traffic import flat_rows, hierarchical_rows
from hpcmoe.parallel.nodes import Nodes

FLAGS, INT32 = 4, 4  # numbers that leaders tell beside the counts (parallel/flat.py)


def flat_layer(network: Network, expert_tk_r: Sequence[np.ndarray], owner_e, send_bytes: float, back_bytes: float) -> list[Exchange]:
    """Counts, dispatch, combine. expert_tk_r: choices of each place's tokens; owner_e: the place of each expert; bytes of a row out and back."""
    places, rows_rs = np.arange(len(expert_tk_r)), flat_rows(expert_tk_r, owner_e)
    counts = np.full(rows_rs.shape, float(INT32 * (np.bincount(owner_e).max() + FLAGS)))
    return [network.matrix(places, counts), network.matrix(places, rows_rs * send_bytes), network.matrix(places, rows_rs.T * back_bytes)]


def hierarchical_layer(network: Network, expert_tk_r: Sequence[np.ndarray], owner_e, send_bytes: float, back_bytes: float) -> list[Exchange]:
    """Both hops of counts, of dispatch and of combine (parallel/hierarchical.py); experts and weights of parcels travel ahead of their rows,
    between the hops of counts."""
    owner_e, places, nodes = np.asarray(owner_e), np.arange(len(expert_tk_r)), Nodes(network.node_r.tolist(), 0)
    hops, top_k = hierarchical_rows(expert_tk_r, owner_e, network.node_r), expert_tk_r[0].shape[1]
    to_forwarder_rs = np.zeros((len(places), len(places)))
    for r in places:
        for n, members in enumerate(nodes.members):
            if n != nodes.number_r[r]:
                to_forwarder_rs[r, nodes.forwarder(int(r), n)] = INT32 * (1 + FLAGS + np.isin(owner_e, members).sum())
    together = nodes.number_r[:, None] == nodes.number_r
    to_mates_rs = together * float(INT32 * (np.bincount(owner_e).max() + FLAGS + max(map(len, nodes.members))))
    heads_rs = hops.between_rs * 2 * INT32 * top_k
    return [network.matrix(places, bytes_rs) for bytes_rs in (
        to_forwarder_rs, to_mates_rs + heads_rs, hops.between_rs * send_bytes, hops.within_rs * send_bytes,
        hops.within_rs.T * back_bytes, hops.between_rs.T * back_bytes)]


def between_bytes(network: Network, exchanges: list[Exchange]) -> float:
    """What crosses between nodes, all of them together."""
    kind = next(kind for kind in network.kinds if kind.name == "adapter out")
    return float(sum(e.load_l[kind.first:kind.first + kind.count].sum() for e in exchanges))
