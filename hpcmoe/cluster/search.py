"""A good placement of a layer where trying all is too much: greedy, then exchanges of two experts while they help."""

from __future__ import annotations

import numpy as np

from hpcmoe.cluster.cost import Load, Site, cost, rank_rows

STARTS = 512   # experts x starts, about
SWEEPS = 50
LEAST = 1e-9   # relative gain of an exchange that counts


def solve(site: Site, load: Load, starts: list[np.ndarray], seed: int = 0, kind_e: np.ndarray | None = None) -> np.ndarray:
    """The place of each expert [e]: the best of what local search makes of the given starts, a greedy one and some
    random ones, as many as the number of experts leaves time for. It costs no more than any of `starts`.
    kind_e: only experts of one kind may exchange their places; None: all may."""
    rng = np.random.default_rng(seed)
    kind_e = np.zeros(len(load.p_e), dtype=int) if kind_e is None else kind_e
    count = int(np.clip(STARTS // len(load.p_e), 2, 24))
    own = [greedy(site, load)] if not np.ptp(kind_e) else []
    starts = [*starts, *own, *(_shuffled(starts[0], kind_e, rng) for _ in range(count - 2))]
    starts = sorted(starts, key=lambda place_e: cost(site, load, place_e))[:count]
    ends = [Search(site, load, start, kind_e).run() for start in starts]
    return min(ends, key=lambda place_e: cost(site, load, place_e))


def _shuffled(place_e: np.ndarray, kind_e: np.ndarray, rng) -> np.ndarray:
    """Places dealt anew at random, within each kind."""
    place_e = place_e.copy()
    for kind in np.unique(kind_e):
        place_e[kind_e == kind] = rng.permutation(place_e[kind_e == kind])
    return place_e


def greedy(site: Site, load: Load) -> np.ndarray:
    """Hottest expert first, each where it adds least to the cost."""
    places, nodes = len(site.room_r), site.nodes
    left_r, rows_r, visit_n = site.room_r.copy(), np.zeros(places), np.zeros(nodes)
    near_en = np.zeros((len(load.p_e), nodes))  # q of each expert with those already on a node
    place_e = np.empty(len(load.p_e), dtype=np.int64)
    for e in np.argsort(-load.p_e, kind="stable"):
        more_n = load.p_e[e] - site.overlap * near_en[e]
        link_n = (site.link_ln @ visit_n)[:, None] + site.link_ln * more_n
        cost_n = link_n.max(axis=0) + site.mean_n * more_n
        cost_r = cost_n[site.node_r] + site.rank_s * np.maximum(rows_r.max(), rows_r + load.p_e[e]) + 1e-12 * rows_r
        r = int(np.where(left_r > 0, cost_r, np.inf).argmin())
        n = site.node_r[r]
        place_e[e] = r
        left_r[r] -= 1
        rows_r[r] += load.p_e[e]
        visit_n[n] += more_n[n]
        near_en[:, n] += load.q_ee[:, e]
    return place_e


class Search:
    """A placement and what its cost is made of, kept up to date under exchanges."""

    def __init__(self, site: Site, load: Load, place_e: np.ndarray, kind_e: np.ndarray):
        self.site, self.load, self.place_e, self.kind_e = site, load, place_e.copy(), kind_e
        self.several = site.room_r.max() > 1
        self.into_n = np.diag(site.link_ln[:site.nodes]).copy()
        self._count()

    def _count(self) -> None:
        site, load = self.site, self.load
        self.node_e = site.node_r[self.place_e]
        on_ne = np.eye(site.nodes)[:, self.node_e]
        self.near_ne = on_ne @ load.q_ee
        self.visit_n = on_ne @ load.p_e - site.overlap * (self.near_ne * on_ne).sum(axis=1) / 2
        self.rows_r = rank_rows(load, self.place_e, len(site.room_r))

    def run(self) -> np.ndarray:
        """Sweeps over all experts, each exchanged with its best partner, until a sweep finds nothing."""
        for _ in range(SWEEPS):
            if not any([self._improve(e) for e in range(len(self.place_e))]):
                break
            self._count()  # rounding errors of many small changes do not add up
        return self.place_e

    def _improve(self, e: int) -> bool:
        """The best exchange of expert e with another one, made if it lowers the cost.

        The links into nodes, of which an exchange changes two, leave few candidates; all links are looked at for these.
        """
        site = self.site
        link_l = site.link_ln @ self.visit_n
        limit = (link_l.max() + site.mean_n @ self.visit_n + site.rank_s * self.rows_r.max()) * (1 - LEAST)
        leave_f, enter_f, rest_f, into_f = self._exchanges(e)
        maybe = np.flatnonzero((rest_f + into_f < limit) & (self.kind_e == self.kind_e[e]))
        if not len(maybe):
            return False
        link_lf = link_l[:, None] + site.link_ln[:, self.node_e[e], None] * leave_f[maybe] \
            + site.link_ln[:, self.node_e[maybe]] * enter_f[maybe]
        seconds = link_lf.max(axis=0) + rest_f[maybe]
        best = int(seconds.argmin())
        if seconds[best] >= limit:
            return False
        f = int(maybe[best])
        self._exchange(e, f, leave_f[f], enter_f[f])
        return True

    def _exchange(self, e: int, f: int, leave: float, enter: float) -> None:
        a, b = self.node_e[e], self.node_e[f]
        self.visit_n[a] += leave
        self.visit_n[b] += enter
        moved_e = self.load.q_ee[f] - self.load.q_ee[e]
        self.near_ne[a] += moved_e
        self.near_ne[b] -= moved_e
        gain = self.load.p_e[f] - self.load.p_e[e]
        self.rows_r[self.place_e[e]] += gain
        self.rows_r[self.place_e[f]] -= gain
        for table in (self.place_e, self.node_e):
            table[e], table[f] = table[f], table[e]

    def _exchanges(self, e: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """For each f, after exchanging e and f: what the visits of e's and of f's node gain, the cost without the
        busiest link, and the busiest link into a node."""
        site, load = self.site, self.load
        a, b_f, q_f = self.node_e[e], self.node_e, load.q_ee[e]
        gain_f, away = load.p_e - load.p_e[e], b_f != a
        own_f = self.near_ne[b_f, np.arange(len(b_f))]
        leave_f = away * (gain_f - site.overlap * (self.near_ne[a] - q_f - self.near_ne[a, e]))
        enter_f = away * (-gain_f - site.overlap * (self.near_ne[b_f, e] - q_f - own_f))
        rest_f = site.mean_n @ self.visit_n + site.mean_n[a] * leave_f + site.mean_n[b_f] * enter_f
        if self.several:
            place_f, rows_r = self.place_e, self.rows_r
            both = place_f == place_f[e]
            rest_f += site.rank_s * _busiest(rows_r, place_f[e], place_f, rows_r[place_f[e]] + ~both * gain_f, rows_r[place_f] - ~both * gain_f)
        else:
            rest_f += site.rank_s * self.rows_r.max()
        into_n = self.into_n * self.visit_n
        return leave_f, enter_f, rest_f, _busiest(into_n, a, b_f, into_n[a] + self.into_n[a] * leave_f, into_n[b_f] + self.into_n[b_f] * enter_f)


def _busiest(value_n: np.ndarray, a: int, b_f: np.ndarray, a_f: np.ndarray, new_bf: np.ndarray) -> np.ndarray:
    """The largest of value_n once its entries a and b_f are a_f and new_bf: [f]."""
    most_f = np.maximum(a_f, new_bf)
    first, *more = [n for n in np.argsort(value_n)[:-4:-1] if n != a] or [a]  # one of the two largest others is not b
    if first == a:
        return most_f
    second = value_n[more[0]] if more else -np.inf
    return np.maximum(most_f, np.where(b_f == first, second, value_n[first]))
