"""Schedules: what each rank does in one round, built from the layout alone.

In a round every micro-batch passes every stage once. Rounds follow each other without a barrier:
stage 0 starts a micro-batch's next round as soon as its sampled tokens are back, so with as many
micro-batches as stages all stages work at once, in decode too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from hpcmoe.errors import UserError, at
from hpcmoe.parallel.layout import share
from hpcmoe.parallel.ops import EXPERT_KINDS, Op, Step, parse_step


NAMES = ("plain", "overlapped", "queued")


class Role(NamedTuple):
    """Ranks of one stage that run the same program."""

    stage: int
    leader: bool

    def __str__(self) -> str:
        return f"stage {self.stage} {'leader' if self.leader else 'expert'}"


@dataclass(frozen=True)
class Schedule:
    """A program per role; `lanes` micro-batches of a stage are interleaved, micro m on lane m % lanes.

    shards: whether leaders are divided into tensor shards, which sum what they make: ops EMBED, REDUCE_ATTEND, REDUCE_MERGE.
    """

    name: str
    stages: int
    layers: int
    micros: int
    lanes: int
    programs: dict[Role, tuple[Step, ...]]
    shards: bool = False

    def layers_of(self, stage: int) -> range:
        return share(self.layers, self.stages, stage)

    def __str__(self) -> str:
        lines = [f"schedule {self.name} stages={self.stages} layers={self.layers} micros={self.micros} lanes={self.lanes}"
                 + " shards=1" * self.shards]
        for role, program in self.programs.items():
            lines += [f"[{role}]"] + [str(step) for step in program]
        return "\n".join(lines) + "\n"


def parse(text: str) -> Schedule:
    """The schedule whose text is given; UserError names the line that is not understood."""
    head, *lines = text.strip().splitlines()
    words = head.split()
    try:
        facts = {key: int(value) for key, value in (word.split("=") for word in words[2:])}
        name, programs, role = words[1], {}, None
        for line in lines:
            if line.startswith("["):
                _, stage, kind = line.strip("[] ").split()
                role = Role(int(stage), kind == "leader")
                programs[role] = []
            else:
                programs[role].append(parse_step(line))
        return Schedule(name, facts["stages"], facts["layers"], facts["micros"], facts["lanes"],
                        {role: tuple(steps) for role, steps in programs.items()}, bool(facts.get("shards", 0)))
    except (ValueError, KeyError, IndexError) as error:
        raise UserError(f"schedule: not understood: {error}") from error


def build(name: str, stages: int, layers: int, micros: int, lanes: int = 1, shards: bool = False) -> Schedule:
    """The `plain` schedule (one micro-batch after the other), the `overlapped` one, or `queued`: overlapped
    for ranks that queue work on a device instead of doing it. shards: tp > 1.

    Raises UserError for numbers below one and for more stages than layers.
    """
    for field, value in (("stages", stages), ("layers", layers), ("micro_batches", micros), ("lanes", lanes)):
        if value < 1:
            raise at("schedule", field, value, "a number >= 1")
    if stages > layers:
        raise at("schedule", "stages", stages, f"at most the {layers} layers")
    if name not in NAMES:
        raise at("schedule", "name", name, ", ".join(NAMES))
    lanes = 1 if name == "plain" else min(lanes, micros)
    programs = {}
    for stage in range(stages):
        own = share(layers, stages, stage)
        ops = _stage_ops(stages, stage, own, micros, lanes, name == "queued", shards)
        if shards:
            ops = [part for op in ops for part in _with_sums(op, stage, own)]
        for leader in (True, False):
            mine = dict.fromkeys(op for op in ops if leader or op.kind in EXPERT_KINDS)
            programs[Role(stage, leader)] = tuple(Step(op, _needs(op, stages, own, lanes, micros, leader, mine)) for op in mine)
    return Schedule(name, stages, layers, micros, lanes, programs, shards)


def _with_sums(op: Op, stage: int, layers: range) -> list[Op]:
    """An op, and beside it the sum over the tensor shards that it brings: of embeddings, attention, or merged rows."""
    if op.kind == "ATTEND":
        first = stage == 0 and op.layer == layers[0]
        return [Op("EMBED", *op[1:])] * first + [op, Op("REDUCE_ATTEND", *op[1:])]
    return [op, Op("REDUCE_MERGE", *op[1:])] if op.kind == "MERGE" else [op]


def _stage_ops(stages: int, stage: int, layers: range, micros: int, lanes: int, queued: bool, shards: bool) -> list[Op]:
    """A leader's ops in order: groups of `lanes` micro-batches, each group interleaved."""
    groups = [range(first, min(first + lanes, micros)) for first in range(0, micros, lanes)]
    ops = [Op("RECV", layers[0], m) for m in groups[0]]
    for g, group in enumerate(groups):
        if g + 1 < len(groups):  # posted one group ahead, so that it arrives behind this one's compute
            ops += [Op("RECV", layers[0], m) for m in groups[g + 1]]
        for layer in layers:
            ops += _sharded_layer(layer, layers[0], group) if shards else _layer_ops(layer, layers[0], group, queued)
        last = "SAMPLE" if stage == stages - 1 else "SEND"
        for m in group:
            ops += [Op("MERGE", layers[-1], m), Op(last, layers[-1], m)]
    return ops


def _layer_ops(layer: int, first_layer: int, group: range, queued: bool) -> list[Op]:
    """One layer of interleaved micro-batches.

    With two, a and b: a's dispatch travels behind b's attention, b's behind a's expert, a's
    combine behind b's expert, b's behind a's next attention, counts and dispatch: that is posted before b's
    rows are awaited. Where work is queued, all attention is queued before the first dispatch: that one has
    to wait for counts that the device has yet to make.
    """
    ops = []
    for i, m in enumerate(group):
        if i and not queued:
            ops.append(Op("DISPATCH", layer, group[i - 1]))
        if layer > first_layer:
            ops.append(Op("MERGE", layer - 1, m))
        ops += [Op(kind, layer, m) for kind in ("ATTEND", "GATE", "COUNTS")]
    ops += [Op("DISPATCH", layer, m) for m in (group if queued else group[-1:])]
    for m in group:
        ops += [Op("EXPERT", layer, m), Op("COMBINE", layer, m)]
    return ops


def _sharded_layer(layer: int, first_layer: int, group: range) -> list[Op]:
    """One layer of interleaved micro-batches on tensor shards: a's sums travel behind b's compute, b's behind a's."""
    ops = [Op("MERGE", layer - 1, m) for m in group if layer > first_layer] + [Op("ATTEND", layer, m) for m in group]
    ops += [Op(kind, layer, m) for m in group for kind in ("GATE", "COUNTS")] + [Op("DISPATCH", layer, m) for m in group]
    return ops + [Op(kind, layer, m) for m in group for kind in ("EXPERT", "COMBINE")]


def _needs(op: Op, stages: int, layers: range, lanes: int, micros: int, leader: bool, mine: dict[Op, None]) -> tuple[Op, ...]:
    """What an op of a program with the ops `mine` awaits."""
    kind, layer, m = op
    before = {"REDUCE_ATTEND": "ATTEND", "DISPATCH": "COUNTS", "EXPERT": "DISPATCH", "COMBINE": "EXPERT", "MERGE": "COMBINE",
              "REDUCE_MERGE": "MERGE", "EMBED": "RECV"}

    def whole(kind: str, layer: int) -> Op:
        total = Op(f"REDUCE_{kind}", layer, m)
        return total if total in mine else Op(kind, layer, m)

    if kind in before:
        return (Op(before[kind], layer, m),)
    if kind == "GATE":
        return (whole("ATTEND", layer),)
    if kind == "ATTEND" and layer > layers[0]:
        return (whole("MERGE", layer - 1),)
    if kind == "ATTEND":
        return (next(op for op in (Op("EMBED", layer, m), Op("RECV", layer, m)) if op in mine),)
    if kind == "COUNTS":
        return (Op("GATE", layer, m),) if leader else (_previous_combine(layer, m, layers, lanes, micros),)
    if kind == "SEND":  # the last message must be gone before its place is taken
        return (whole("MERGE", layer), op)
    if kind == "SAMPLE":
        return (whole("MERGE", layer),) + ((op,) if stages > 1 else ())
    if kind == "RECV" and stages == 1:
        return (Op("SAMPLE", layers[-1], m),)
    return ()


def _previous_combine(layer: int, m: int, layers: range, lanes: int, micros: int) -> Op:
    """The exchange before this one on the same lane: its rows must be gone before buffers are used again."""
    if layer > layers[0]:
        return Op("COMBINE", layer - 1, m)
    return Op("COMBINE", layers[-1], m - lanes if m >= lanes else _last_on_lane(m % lanes, lanes, micros))


def _last_on_lane(lane: int, lanes: int, micros: int) -> int:
    return max(m for m in range(micros) if m % lanes == lane)
