"""Slots that hold copies, as experts of their own: what makes a placement with copies a placement of experts.

A slot of expert e with c copies gets 1/c of its rows. That is so within one row on every leader, which deals an expert's rows to
its copies by turns. Which copy of e and which of e' a token goes to is taken to be independent: q_ee' / (c c'). Turns
of two experts are not drawn, so this is an expectation, while the rows of each slot are not.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from hpcmoe.cluster.cost import Load, Site


def as_slots(load: Load, expert_s: np.ndarray) -> Load:
    """The load by slot. Two copies of one expert have no token in common, as q of an expert with itself is 0."""
    count_s = np.bincount(expert_s, minlength=len(load.p_e))[expert_s]
    return Load(load.p_e[expert_s] / count_s, load.q_ee[np.ix_(expert_s, expert_s)] / np.outer(count_s, count_s), load.k)


def by_place(site: Site, load_s: Load, place_s: np.ndarray) -> tuple[Site, Load]:
    """(the site with one thing per place, the load by what stands on a place together): to exchange whole places.

    Pairs within a place stay on one node wherever that is, so they are taken off its visits once and for all.
    The load of the heaviest rank is the same in all exchanges and is left out.
    """
    on_rs = np.eye(len(site.room_r))[:, place_s]
    q_rr = on_rs @ load_s.q_ee @ on_rs.T
    within_r = q_rr.diagonal() / 2
    visits_r = on_rs @ load_s.p_e - site.overlap * within_r
    return replace(site, room_r=np.ones_like(site.room_r), rank_s=0.0), Load(visits_r, q_rr - np.diag(q_rr.diagonal()), load_s.k)
