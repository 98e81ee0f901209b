"""The hierarchical exchange of made-up rows in device memory, over pretended nodes, all kinds of leaders and numbers of rows:
right sums, the same bits again, what crosses between nodes by plain loops, and what is queued per layer; and what a job's start
chooses by name and by measurement. Arguments: `direct`, MPI is given
device memory; `staged`, pinned host memory.

Run on the CuPy look-alike, where an access by the CPU to device memory ends the process.
"""

import sys
from collections import Counter

import cupy
from mpi4py import MPI

from hpcmoe.config import AttentionConfig, ExpertConfig, ModelConfig, RouterConfig, RunJob
from hpcmoe.device import Gpu
from hpcmoe.parallel.layout import Layout
from hpcmoe.parallel.trial import Trial, choose, layer, made_up
from hpcmoe.parallel.world import World

comm, gpu = MPI.COMM_WORLD, Gpu(0)
# leaders, ranks per node, experts, choices, rows of a leader, d, bytes of a row on its way out
CASES = [("all", 1, 16, 4, 9, 8, 16), ("all", 2, 16, 4, 9, 8, 16), ("all", 3, 16, 4, 9, 8, 16), ("2", 2, 7, 1, 1, 6, 12),
         ("node", 4, 5, 5, 3, 12, 32), ("all", 4, 3, 2, 0, 8, 16), ("all", 9, 16, 2, 5, 8, 16), ("all", 2, 12, 6, 150, 1024, 2048)]


def crossings(world: World, rows) -> int:
    """(token, other node) pairs over all leaders."""
    owner_e, here, pairs = world.layout.owner_of_slot(len(rows.route.n_send_e)) if rows.routed else [], world.node_r[world.here.place], 0
    for expert_k in rows.expert_tk if rows.routed else []:
        pairs += len({world.node_r[owner_e[e]] for e in expert_k} - {here})
    return comm.allreduce(pairs)


queued = []
for how in sys.argv[1:]:
    for leaders, per_node, experts, k, rows, d, width in CASES:
        world = World(comm, Layout(1, 1, comm.size, leaders=leaders), 1, [f"host {r // per_node}" for r in range(comm.size)])
        world.direct, router = how == "direct", RouterConfig(experts, k)
        trial = Trial(world, router, made_up(world, router, d, width, rows, gpu), ("hierarchical",), True)
        assert trial.right("hierarchical"), (how, leaders, per_node)
        record, expected = trial.records["hierarchical"], crossings(world, trial.rows)
        for kind, row_bytes in (("DISPATCH", width + 8 * k), ("COMBINE", 2 * d)):
            assert comm.allreduce(record.rows_inter[kind]) == expected, (kind, expected)
            assert comm.allreduce(record.bytes_inter[kind]) == expected * row_bytes
        first = trial.rows.x_td.get() if trial.rows.routed else None
        trial.rows.checking, before = False, Counter(cupy.launches)
        layer(trial.exchanges["hierarchical"], trial.rows, trial.wait)
        made = Counter(cupy.launches) - before
        assert first is None or first.tobytes() == trial.rows.x_td.get().tobytes()
        if how == "direct" and (experts, k, d) == (16, 4, 8):
            queued.append(max(comm.allgather(sorted(made.items())), key=lambda items: sum(n for _, n in items)))
said: list[str] = []
world = World(comm, Layout(1, 1, comm.size), 1, [f"host {r // 2}" for r in range(comm.size)])
model = ModelConfig("mixtral", 61, 32, 2, AttentionConfig(4, 2, 8), RouterConfig(8, 2), ExpertConfig(24), 64)
for name, dtype in (("auto", "auto"), ("hierarchical", "fp8")):
    choose(world, RunJob(transport=name, dispatch_dtype=dtype), model, gpu, 0, 16, True, said.append)
    assert world.direct and world.transport in ("ialltoallv", "hierarchical") and name in ("auto", world.transport)
    assert len(said) == 1 and said[0].count(" ms") == 2  # measured by `auto`
comm.Barrier()
if comm.rank == 0:
    for items in queued:
        print("LAUNCHES", sum(n for _, n in items), *(f"{name}x{n}" for name, n in items))
    print("relayed", *sys.argv[1:])
