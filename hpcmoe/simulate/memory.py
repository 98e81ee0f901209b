"""Whether a layout fits the memory of a cluster's ranks, and which one would: weights, buffers, and the KV cache of the batch."""

from __future__ import annotations

import math
from typing import NamedTuple

from hpcmoe.cluster.clusterfile import ClusterFile
from hpcmoe.compute.base import Sizes
from hpcmoe.compute.footprint import weights_bytes
from hpcmoe.compute.holdings import Share
from hpcmoe.compute.room import fit_pages, fit_slots
from hpcmoe.config import ModelConfig, RunJob
from hpcmoe.errors import UserError
from hpcmoe.model.kvcache import bytes_per_sequence
from hpcmoe.model.shard import Shard
from hpcmoe.parallel.layout import Layout
from hpcmoe.parallel.schedule import Role
from hpcmoe.report.table import size

HEAD_ROWS, HIDDEN_ROWS = 1024, 2048  # rows whose logits, and whose hidden values, a GPU holds at once (compute/gpu_leader.py, gpu_experts.py)


class Held(NamedTuple):
    """Bytes on the fullest rank of a role."""

    weights: int
    buffers: int
    kv: int


def shard_of(model: ModelConfig, tp: int) -> Shard:
    """The tensor shard that has most to do: the last one, by the way shares are cut."""
    return Shard.of(model, tp - 1, tp)


def held_weights(model: ModelConfig, layout: Layout, role: Role, item: int, gpu: bool) -> int:
    """Of the place with most experts."""
    shard = shard_of(model, layout.tp)
    share = Share(list(layout.layers_of(role.stage, model.layers)), list(layout.slots_of(0, model.router.experts)), role.leader,
                  role.stage == 0, role.stage == layout.pp - 1, shard)
    return weights_bytes(shard.model, share, item, item, gpu)


def buffers(model: ModelConfig, sizes: Sizes, role: Role, last: bool, item: int, gpu: bool) -> int:
    """Of rows on their way through a layer, per lane, and of the residual stream, per micro-batch; model: as a shard sees it. An estimate:
    the large arrays of a GPU's rank, and of a CPU's as many as it has seen at the same sizes."""
    d, f, received = model.d, model.expert.f, max(1, sizes.received)
    hidden, moved = min(received, HIDDEN_ROWS), item if gpu else 4
    lane = received * 2 * d * moved + hidden * 3 * f * item
    if not role.leader:
        return sizes.lanes * lane
    a, rows, k = model.attention, sizes.rows, model.router.top_k
    wide = (2 * a.heads + 2 * a.kv_heads) * a.head_dim
    lane += rows * ((2 * d + wide + a.heads * a.head_dim) * item + 2 * k * d * moved) + last * min(rows, HEAD_ROWS) * 4 * model.vocab
    return sizes.lanes * lane + sizes.micros * 2 * rows * d * 4


def fit(c: ClusterFile, model: ModelConfig, layout: Layout, run: RunJob, wanted: Sizes, leaders: int, item: int, gpu: bool) -> tuple[Sizes, dict[Role, Held]]:
    """(the batch that fits, what ranks of each role hold). Raises UserError, saying by how much, where weights and buffers or a single
    sequence do not fit."""
    local, memory = shard_of(model, layout.tp).model, c.rank.memory_gib * 2**30
    usable = int(memory * (run.gpu_memory_fraction if gpu else 1))
    fitting, held = [], {}
    for stage in range(layout.pp):
        for role in (Role(stage, True), Role(stage, False)):
            weights = held_weights(model, layout, role, item, gpu)
            taken = buffers(local, wanted, role, stage == layout.pp - 1, item, gpu)
            if weights + taken > usable:
                raise UserError(f"{layout}: {role}: weights of {size(weights)} and buffers of about {size(taken)} are {size(weights + taken - usable)} "
                                f"more than the {size(usable)} that a rank of {c.name} can use")
            held[role] = Held(weights, taken, 0)
            if role.leader:
                where, layers, free = f"{role} of {c.name}", len(layout.layers_of(stage, model.layers)), usable - weights - taken
                if gpu:
                    fitting.append(fit_pages(local, layers, wanted, run, free, leaders, where))
                else:
                    fitting.append(wanted._replace(slots=fit_slots(local, layers, wanted, run, free, leaders, where)))
    sizes = wanted._replace(slots=min(s.slots for s in fitting), pages=min(s.pages for s in fitting), page_tokens=fitting[0].page_tokens)
    for role in held:
        if role.leader:
            held[role] = held[role]._replace(kv=_kv(local, len(layout.layers_of(role.stage, model.layers)), sizes, gpu))
    return sizes, held


def _kv(model: ModelConfig, layers: int, sizes: Sizes, gpu: bool) -> int:
    a = model.attention
    if gpu:
        return 4 * layers * a.kv_heads * a.head_dim * sizes.page_tokens * sizes.pages
    return sizes.slots * sizes.micros * bytes_per_sequence(layers, a.kv_heads, a.head_dim, sizes.context)


# ---------------------------------------------------------------- which layout would fit
def nearest(layout: Layout, model: ModelConfig, ranks: int, most: int, fits) -> str:
    """In words the layout that fits (fits(layout) says so) and is nearest to this one: on as many ranks, or on the fewest more that the
    cluster has (most)."""
    for count in sorted({ranks, *(ranks * n for n in (2, 4, 8, 16) if ranks * n <= most), most}):
        if count < ranks:
            continue
        for other in sorted(_layouts(model, count, layout), key=lambda x: (_distance(x, layout), -x.ep)):
            if fits(other):
                return f"the nearest that fits: {other}" + (f" on {count} ranks" if count != ranks else "")
    return f"no layout fits up to {most} ranks of this cluster"


def _layouts(model: ModelConfig, ranks: int, like: Layout) -> list[Layout]:
    """dp x pp x ep x tp layouts of so many ranks, without copies of experts."""
    found, splits = [], model.expert.f
    for tp in (n for n in range(1, min(ranks, 16) + 1) if ranks % n == 0 and splits % n == 0 and (n == 1 or model.attention.heads >= n)):
        for ep in (n for n in range(1, model.router.experts + 1) if ranks // tp % n == 0):
            for pp in (n for n in range(1, model.layers + 1) if ranks // tp // ep % n == 0):
                leaders = like.leaders if not like.leaders.isdecimal() else str(min(int(like.leaders), ep))
                found.append(Layout(ranks // (tp * ep * pp), pp, ep, tp, leaders))
    return found


def _distance(a: Layout, b: Layout) -> float:
    return sum(abs(math.log(getattr(a, name) / getattr(b, name))) for name in ("dp", "pp", "ep", "tp"))
