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

    leaders: "all", "node" (one per node) or a number per stage, as text.
    """

    dp: int
    pp: int
    ep: int
    tp: int = 1
    leaders: str = "all"

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

    def stage_ranks(self, dp: int, stage: int) -> range:
        """World ranks of one stage, in the order of their expert places."""
        first = (dp * self.pp + stage) * self.stage_size
        return range(first, first + self.stage_size)

    def layers_of(self, stage: int, layers: int) -> range:
        return share(layers, self.pp, stage)

    def experts_of(self, place: int, experts: int) -> range:
        return share(experts, self.ep, place)

    def owner_of_expert(self, experts: int) -> list[int]:
        """For each expert of a layer, the place that holds it: [e]."""
        return [p for p in range(self.ep) for _ in self.experts_of(p, experts)]

    def __str__(self) -> str:
        return f"dp={self.dp} pp={self.pp} ep={self.ep} tp={self.tp}"


def choose(job: LayoutJob, ranks: int, model: ModelConfig) -> tuple[Layout, str]:
    """The layout for a job on so many ranks, and in words why.

    What the job leaves open (0) is chosen: as many expert places as divide the ranks, then
    stages, then replicas. Raises UserError, with the nearest layouts that fit, where none does.
    """
    check_leaders(job.leaders)
    _check_tp(job)
    fitting = [Layout(dp, pp, ep, 1, job.leaders) for dp, pp, ep in _divisions(ranks)
               if ep <= model.router.experts and pp <= model.layers]
    asked = {name: getattr(job, name) for name in ("dp", "pp", "ep") if getattr(job, name)}
    matching = [x for x in fitting if all(getattr(x, name) == v for name, v in asked.items())]
    if not matching:
        raise UserError(_refusal(asked, ranks, model, fitting))
    best = max(matching, key=lambda x: (x.ep, x.pp))
    if job.leaders.isdigit() and int(job.leaders) > best.ep:
        raise at("layout", "leaders", int(job.leaders), f"at most the {best.ep} ranks of a stage")
    return best, _reason(best, asked, ranks, model)


def check_leaders(leaders: str) -> None:
    if leaders not in ("all", "node") and not (leaders.isdigit() and int(leaders) >= 1):
        raise at("layout", "leaders", leaders, '"all", "node" or a number of ranks per stage')


def _check_tp(job: LayoutJob) -> None:
    for name in ("dp", "pp", "ep", "tp"):
        if getattr(job, name) < 0:
            raise at("layout", name, getattr(job, name), "a number >= 1, or 0 to have it chosen")
    if job.tp not in (0, 1):
        raise at("layout", "tp", job.tp, "1: tensor parallelism is not part of this version")


def _divisions(ranks: int) -> list[tuple[int, int, int]]:
    """All (dp, pp, ep) with dp * pp * ep == ranks."""
    divisors = [n for n in range(1, ranks + 1) if ranks % n == 0]
    return [(ranks // (pp * ep), pp, ep) for ep in divisors for pp in divisors if ranks % (pp * ep) == 0]


def _refusal(asked: dict, ranks: int, model: ModelConfig, fitting: list[Layout]) -> str:
    words = " ".join(f"{name}={value}" for name, value in asked.items())
    limits = (f"dp x pp x ep must be the number of ranks, pp <= {model.layers} layers, "
              f"ep <= {model.router.experts} experts")

    def distance(x: Layout) -> float:
        return sum(abs(getattr(x, name) - value) / value for name, value in asked.items())

    near = sorted(fitting, key=lambda x: (distance(x), -x.ep))[:3]
    text = f"layout: {words} does not fit {ranks} rank{'s' if ranks > 1 else ''}: expected {limits}"
    text += "; nearest for this number of ranks: " + ", ".join(f"dp={x.dp} pp={x.pp} ep={x.ep}" for x in near)
    if len(asked) == 3:
        size = asked["dp"] * asked["pp"] * asked["ep"]
        if size != ranks and asked["pp"] <= model.layers and asked["ep"] <= model.router.experts:
            text += f"; or start {size} ranks"
    return text


def _reason(layout: Layout, asked: dict, ranks: int, model: ModelConfig) -> str:
    experts = model.router.experts
    if layout.ep == experts:
        words = "one expert per rank and layer"
    else:
        words = f"{experts} experts on {layout.ep} places, up to {-(-experts // layout.ep)} per rank and layer"
    how = "as asked" if len(asked) == 3 else f"chosen for {ranks} rank{'s' if ranks > 1 else ''}"
    return f"{how}: {words}, {-(-model.layers // layout.pp)} layers per stage, {layout.dp} replica(s)"
