"""Which rank does what: replicas x stages x expert places x tensor shards, as arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from hpcmoe.config import LayoutJob, ModelConfig
from hpcmoe.errors import UserError, at


class Place(NamedTuple):
    """Where a rank stands: replica, stage, expert place within the stage, tensor shard."""

    dp: int
    stage: int
    place: int
    shard: int


def share(total: int, parts: int, part: int) -> range:
    """The part-th of `parts` consecutive ranges that differ by one at most, longer ones first."""
    size, longer = divmod(total, parts)
    start = part * size + min(part, longer)
    return range(start, start + size + (part < longer))


@dataclass(frozen=True)
class Layout:
    """dp replicas x pp stages x ep expert places x tp shards; ranks are numbered in this order.

    leaders: "all", "node" (one per node) or a number per stage, as text. replicas: spare slots of each layer: a
    layer has as many slots as experts and spares together, each holds a copy of an expert, and they are dealt over the places.
    """

    dp: int
    pp: int
    ep: int
    tp: int = 1
    leaders: str = "all"
    replicas: int = 0

    @property
    def size(self) -> int:
        return self.dp * self.pp * self.ep * self.tp

    @property
    def stage_size(self) -> int:
        return self.ep * self.tp

    def place(self, rank: int) -> Place:
        rest, shard = divmod(rank, self.tp)
        rest, place = divmod(rest, self.ep)
        return Place(*divmod(rest, self.pp), place, shard)

    def column(self, dp: int, stage: int, shard: int = 0) -> range:
        """World ranks of one stage with the same shard, in the order of their expert places: they exchange rows."""
        first = (dp * self.pp + stage) * self.stage_size
        return range(first + shard, first + self.stage_size, self.tp)

    def layers_of(self, stage: int, layers: int) -> range:
        return share(layers, self.pp, stage)

    def slots(self, experts: int) -> int:
        """Of a layer."""
        return experts + self.replicas

    def slots_of(self, place: int, experts: int) -> range:
        return share(self.slots(experts), self.ep, place)

    def owner_of_slot(self, experts: int) -> list[int]:
        """For each slot of a layer, the place that has it."""
        return [p for p in range(self.ep) for _ in self.slots_of(p, experts)]

    def leader_places(self, node_of_rank, dp: int) -> list[list[int]]:
        """For each stage of a replica, the places that lead: as many in every stage, since leader j hands on to leader j."""
        if self.leaders == "all":
            return [list(range(self.ep))] * self.pp
        if self.leaders.isdecimal():
            return [list(range(int(self.leaders)))] * self.pp
        per_stage = []
        for stage in range(self.pp):
            nodes = [node_of_rank[r] for r in self.column(dp, stage)]
            per_stage.append([place for place, node in enumerate(nodes) if node not in nodes[:place]])
        count = min(len(places) for places in per_stage)
        return [places[:count] for places in per_stage]

    def node_pattern(self, node_of_rank, dp: int) -> tuple[int, ...]:
        """The nodes of a replica's expert places (of their first shards), numbered by their first rank in it."""
        nodes = [node_of_rank[r] for stage in range(self.pp) for r in self.column(dp, stage)]
        number = {node: i for i, node in enumerate(dict.fromkeys(nodes))}
        return tuple(number[node] for node in nodes)

    def __str__(self) -> str:
        return f"dp={self.dp} pp={self.pp} ep={self.ep} tp={self.tp}"


def choose(job: LayoutJob, ranks: int, model: ModelConfig) -> tuple[Layout, str]:
    """The layout for a job on so many ranks, and in words why.

    What the job leaves open (0) is chosen: as many expert places as divide the ranks, then
    stages, then replicas; tensor shards and spare slots only where they are asked for. More expert places than
    experts ask for spare slots: every place has one slot. Raises UserError, with the nearest layouts that fit, where none does.
    """
    check_leaders(job.leaders)
    for name in ("dp", "pp", "ep", "tp"):
        if getattr(job, name) < 0:
            raise at("layout", name, getattr(job, name), "a number >= 1, or 0 to have it chosen")
    if job.replicas < 0:
        raise at("layout", "replicas", job.replicas, "a number of spare slots per layer, 0 for none")
    tp = job.tp or 1
    check_tp(model, tp)
    experts = model.router.experts
    most = max(experts + job.replicas, 0 if job.replicas else job.ep)  # expert places
    fitting = [Layout(dp, pp, ep, tp, job.leaders, job.replicas or max(0, ep - experts)) for dp, pp, ep in _divisions(ranks // tp)
               if ep <= most and pp <= model.layers] if ranks % tp == 0 else []
    asked = {name: getattr(job, name) for name in ("dp", "pp", "ep") if getattr(job, name)}
    matching = [x for x in fitting if all(getattr(x, name) == v for name, v in asked.items())]
    if not matching:
        raise UserError(_refusal(asked, tp, ranks, model, fitting, job.replicas))
    best = max(matching, key=lambda x: (x.ep, x.pp))
    if job.leaders.isdecimal() and int(job.leaders) > best.ep:
        raise at("layout", "leaders", int(job.leaders), f"at most the {best.ep} {'expert places' if tp > 1 else 'ranks'} of a stage")
    if best.replicas > experts * (best.ep - 1):  # a place that holds an expert has nothing of a second copy
        raise at("layout", "replicas", best.replicas, f"at most {experts * (best.ep - 1)}, with which each of the {best.ep} expert "
                 f"places of a stage holds each of {experts} experts: {best}")
    return best, _reason(best, asked, ranks, model)


def check_leaders(leaders: str) -> None:
    if leaders not in ("all", "node") and not (leaders.isdecimal() and int(leaders) >= 1):
        raise at("layout", "leaders", leaders, '"all", "node" or a number of ranks per stage')


def check_tp(model: ModelConfig, tp: int) -> None:
    """UserError where tp shards cannot share the model, with the nearest number that can."""
    if tp > 1 and model.attention.qk_norm == "full":
        raise at("layout", "tp", tp, "1: this model's query and key norms run over all heads, which tensor shards would divide")
    if not _splits(model, tp):
        near = sorted((n for n in range(1, model.expert.f + 1) if _splits(model, n)), key=lambda n: (abs(n - tp), -n))[:3]
        raise at("layout", "tp", tp, f"a divisor of the experts' hidden width {model.expert.f}; nearest: {', '.join(map(str, near))}")


def _splits(model: ModelConfig, tp: int) -> bool:
    return tp <= model.vocab and model.expert.f % tp == 0


def _divisions(ranks: int) -> list[tuple[int, int, int]]:
    """All (dp, pp, ep) with dp * pp * ep == ranks."""
    divisors = [n for n in range(1, ranks + 1) if ranks % n == 0]
    return [(ranks // (pp * ep), pp, ep) for ep in divisors for pp in divisors if ranks % (pp * ep) == 0]


def _refusal(asked: dict, tp: int, ranks: int, model: ModelConfig, fitting: list[Layout], replicas: int) -> str:
    more = [f"tp={tp}"] if tp > 1 else []
    most = model.router.experts + replicas
    places = f"{most} slots (experts and layout.replicas)" if replicas else f"{most} experts, or more for copies of experts"
    words = " ".join([f"{name}={value}" for name, value in asked.items()] + more)
    limits = (f"dp x pp x ep{' x tp' if more else ''} must be the number of ranks, pp <= {model.layers} layers, "
              f"ep <= {places}")

    def distance(x: Layout) -> float:
        return sum(abs(getattr(x, name) - value) / value for name, value in asked.items())

    near = sorted(fitting, key=lambda x: (distance(x), -x.ep))[:3]
    text = f"layout: {words} does not fit {ranks} rank{'s' if ranks > 1 else ''}: expected {limits}"
    if near:
        text += "; nearest for this number of ranks: " + ", ".join(" ".join([f"dp={x.dp} pp={x.pp} ep={x.ep}"] + more) for x in near)
    else:
        divisors = [n for n in range(1, ranks + 1) if ranks % n == 0 and _splits(model, n)]
        text += f"; nearest for this number of ranks: tp={min(divisors, key=lambda n: (abs(n - tp), -n))}; or start a multiple of {tp}"
    if len(asked) == 3:
        size = asked["dp"] * asked["pp"] * asked["ep"] * tp
        if size != ranks and asked["pp"] <= model.layers and (asked["ep"] <= most or not replicas):
            text += f"; or start {size} ranks"
    return text


def _reason(layout: Layout, asked: dict, ranks: int, model: ModelConfig) -> str:
    experts = model.router.experts
    if layout.ep == experts and not layout.replicas:
        words = "one expert per rank and layer" if layout.tp == 1 else "one expert per place and layer"
    elif layout.replicas:
        words = (f"{experts} experts and {layout.replicas} cop{'y' if layout.replicas == 1 else 'ies'} on {layout.ep} places, "
                 f"up to {-(-layout.slots(experts) // layout.ep)} per rank and layer")
    else:
        words = f"{experts} experts on {layout.ep} place{'s' if layout.ep > 1 else ''}, up to {-(-experts // layout.ep)} per rank and layer"
    if layout.tp > 1:
        words += f", each split over {layout.tp} ranks"
    how = "as asked" if len(asked) == 3 else f"chosen for {ranks} rank{'s' if ranks > 1 else ''}"
    return f"{how}: {words}, {-(-model.layers // layout.pp)} layers per stage, {layout.dp} replica(s)"
