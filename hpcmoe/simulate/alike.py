"""Which replicas are alike: those that do the same at the same times."""

from __future__ import annotations

from typing import Hashable

import numpy as np

from hpcmoe.cluster.network import Network
from hpcmoe.parallel.layout import Layout


def alike(layout: Layout, network: Network, work_dp: list[Hashable]) -> list[list[int]]:
    """The replicas in groups, each in ascending order. work_dp: what each has to do.

    Alike are replicas with equal work, whose ranks lie on links in the same way, and share them with replicas that are alike again: the
    coarsest such partition, by colour refinement (Cardon and Crochemore, Theoretical Computer Science 19, 1982). Then nothing tells two
    of a group apart at any time, so one stands for all.
    """
    size = layout.pp * layout.stage_size
    ranks_dp = np.arange(layout.dp * size).reshape(layout.dp, size)
    way_dp = [tuple(tuple((kind.link_r[ranks] - kind.link_r[ranks[0]]).tolist()) for kind in network.kinds) for ranks in ranks_dp]
    colour_dp = _numbered(list(zip(work_dp, way_dp)))
    while True:
        finer_dp = _numbered([(colour, *shared) for colour, shared in zip(colour_dp, _shared(network, ranks_dp, colour_dp))])
        if max(finer_dp) == max(colour_dp):
            break
        colour_dp = finer_dp
    return [[dp for dp, colour in enumerate(colour_dp) if colour == number] for number in range(max(colour_dp) + 1)]


def _numbered(values: list[Hashable]) -> list[int]:
    """Equal values by equal numbers, in the order in which they come."""
    number: dict[Hashable, int] = {}
    return [number.setdefault(value, len(number)) for value in values]


def _shared(network: Network, ranks_dp: np.ndarray, colour_dp: list[int]) -> list[tuple]:
    """For each replica, by kind of link and rank: which ranks of which colours, by their place in their replica, are on the rank's link."""
    dp, size = ranks_dp.shape
    who_r = (np.array(colour_dp)[:, None] * size + np.arange(size)).reshape(-1)
    found: list[tuple] = [()] * dp
    for kind in network.kinds:
        link_r = kind.link_r[:dp * size]
        order = np.lexsort((who_r, link_r))
        ends = np.cumsum(np.bincount(link_r, minlength=kind.count))[:-1]
        name_l = _numbered([part.tobytes() for part in np.split(who_r[order], ends)])
        found = [mine + (tuple(name_l[link] for link in link_r[ranks]),) for mine, ranks in zip(found, ranks_dp)]
    return found
