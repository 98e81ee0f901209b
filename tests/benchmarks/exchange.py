"""How long a MoE layer takes by each transport, and what crosses between nodes: start it under mpiexec, on several hosts.

    mpiexec -n 16 python -m mpi4py tests/benchmarks/exchange.py --rows 16,64 --top-k 2,8

One stage over all ranks, all of them leaders, random choices. A layer is counts, dispatch, experts, combine
and merge. HPCMOE_RANKS_PER_NODE=n pretends nodes, which are then as near as the others. Rows that cross are
counted twice: by the exchange, and from the choices by plain loops; the program fails where these differ.
"""

from __future__ import annotations

import argparse

import numpy as np
from mpi4py import MPI

from hpcmoe import memory
from hpcmoe.config import RouterConfig
from hpcmoe.parallel.layout import Layout
from hpcmoe.parallel.trial import MadeUpRows, Trial
from hpcmoe.parallel.world import World, node_names


class WithProducts(MadeUpRows):
    """Made-up rows, with the arithmetic of an expert of hidden width f on them (the result is thrown away)."""

    def __init__(self, f: int, *rest):
        super().__init__(*rest)
        rng = np.random.default_rng(0)
        self.up_dg, self.down_fd = (rng.random(shape, dtype=np.float32) for shape in ((self.d, 2 * f), (f, self.d)))

    def expert(self, x_iw, n_recv_re):
        h_ig = np.ones((len(x_iw), self.d), dtype=np.float32) @ self.up_dg
        h_ig[:, :len(self.down_fd)] @ self.down_fd
        return super().expert(x_iw, n_recv_re)


def closed_form(world: World, rows: MadeUpRows) -> tuple[int, int]:
    """(pairs whose expert lives on another node, (token, other node) pairs), over all leaders: plain loops."""
    owner_e, flat, parcels = world.layout.owner_of_slot(len(rows.route.n_send_e)), 0, 0
    for expert_k in rows.expert_tk:
        nodes = [world.node_r[owner_e[e]] for e in expert_k]
        away = [n for n in nodes if n != world.node_r[world.here.place]]
        flat += len(away)
        parcels += len(set(away))
    return tuple(world.comm.allreduce(np.array([flat, parcels])))


def between(comm, record, layers: int) -> tuple[int, int, int]:
    """Per layer, over all ranks: messages' rows of dispatch and of combine between nodes, bytes of all kinds between nodes."""
    own = [record.rows_inter.get("DISPATCH", 0), record.rows_inter.get("COMBINE", 0), sum(record.bytes_inter.values())]
    return tuple(comm.allreduce(np.array(own)) // layers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    numbers = dict(type=lambda text: [int(n) for n in text.split(",")])
    parser.add_argument("--rows", default=[4, 16, 64], help="of a leader", **numbers)
    parser.add_argument("--top-k", default=[2, 8], **numbers)
    parser.add_argument("--experts", default=16, type=int)
    parser.add_argument("--d", default=1024, type=int, help="width of a row, fp32")
    parser.add_argument("--f", default=0, type=int, help="hidden width of an expert; 0: no products")
    parser.add_argument("--repeats", default=7, type=int)
    parser.add_argument("--transports", default="ialltoallv,pairwise,staged,hierarchical")
    args = parser.parse_args()
    comm, names = MPI.COMM_WORLD, args.transports.split(",")
    world = World(comm, Layout(1, 1, comm.size), 1, node_names(comm))
    nodes = len(set(world.hosts))
    crowded = world.ranks_on_node > memory.cores() // nodes
    if comm.rank == 0:
        print(f"{comm.size} ranks on {nodes} nodes, {args.experts} experts, rows of {4 * args.d} bytes, f={args.f}; "
              f"ms: median of {args.repeats}, of the slowest rank; rows and MB between nodes: per layer, all ranks")
        print("top-k  rows  " + "  ".join(f"{name + ' ms':>15}" for name in names) + "  flat/hier   flat rows  hier rows   flat MB  hier MB")
    for top_k in args.top_k:
        for count in args.rows:
            experts = list(world.layout.slots_of(world.here.place, args.experts))
            router = RouterConfig(args.experts, top_k)
            facts = (router, args.d, 4 * args.d, count, experts, 1 + comm.rank)
            trial = Trial(world, router, WithProducts(args.f, *facts) if args.f else MadeUpRows(*facts), tuple(names), crowded)
            assert all(trial.right(name) for name in names), "wrong sums"
            seconds = trial.medians(args.repeats, float("inf"))
            flat, parcels = closed_form(world, trial.rows)
            sent = {name: between(comm, trial.records[name], args.repeats + 1) for name in names}
            for name, (out, back, _) in sent.items():
                assert out == back == (parcels if name == "hierarchical" else flat), (name, out, back, flat, parcels)
            trial.close()
            if comm.rank == 0:
                best = min(s for name, s in seconds.items() if name != "hierarchical")
                print(f"{top_k:5d} {count:5d}  " + "  ".join(f"{seconds[name] * 1e3:15.2f}" for name in names) +
                      f"  {best / seconds[names[-1]]:9.2f}   {flat:9d}  {parcels:9d}  {sent[names[0]][2] / 1e6:8.2f} {sent[names[-1]][2] / 1e6:8.2f}",
                      flush=True)


if __name__ == "__main__":
    main()
