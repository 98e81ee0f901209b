"""How many micro-batches a stage interleaves, where the job leaves it open: measured at start, one lane against two.

Two lanes let rows travel behind another micro-batch's products. They also halve the rows of a product, which reads the same
weights twice, and double the messages. Which of the two counts depends on model, batch, MPI and network.
"""

from __future__ import annotations

from typing import Callable, NamedTuple

from hpcmoe.compute.base import Compute
from hpcmoe.config import RouterConfig, RunJob
from hpcmoe.parallel.handle import Waiter
from hpcmoe.parallel.layout import Layout, share
from hpcmoe.parallel.plan import Cut
from hpcmoe.parallel.rehearsal import Rehearsal, medians
from hpcmoe.parallel.world import World

REPEATS, LIMIT_S = 5, 5.0
MARGIN = 0.95  # two lanes have to be clearly quicker: the trial knows random choices only, and every lane takes buffers
LAYERS = 2     # of a stage: what travels behind the next layer counts as well


class LaneTrial(NamedTuple):
    """What one and two lanes took for some MoE layers of `rows` rows per leader; lanes: the better number."""

    rows: int
    layers: int
    one_lane_s: float
    two_lanes_s: float

    @property
    def lanes(self) -> int:
        return 2 if self.two_lanes_s < MARGIN * self.one_lane_s else 1


def open_cuts(run: RunJob, layout: Layout, node_of_rank: list, on_gpu: bool) -> tuple[Cut, Cut] | None:
    """The cut with one lane and the one with two, where a job leaves lanes open and they can make a difference: several
    places in a stage, and GPUs, or several nodes. None where there is nothing to measure. node_of_rank: names or numbers."""
    if run.lanes or run.schedule == "plain" or layout.ep == 1 or run.micro_batches == 1:
        return None
    stages = [{node_of_rank[r] for r in layout.column(dp, p)} for dp in range(layout.dp) for p in range(layout.pp)]
    if not on_gpu and max(map(len, stages)) == 1:
        return None
    return Cut(run.micro_batches or layout.pp, 1), Cut(run.micro_batches or 2 * layout.pp, 2)


def rehearsed(cuts: tuple[Cut, Cut], rows: int) -> list[list[int]]:
    """For each cut, rows of a leader in each micro-batch of one group of two lanes. rows: in a micro-batch of the first cut."""
    if cuts[0].micros == cuts[1].micros:
        return [[rows, rows]] * 2
    return [[rows], [len(share(rows, 2, i)) for i in range(2)]]


def choose(world: World, compute: Compute, router: RouterConfig, name: str, cuts: tuple[Cut, Cut], rows: int, held: list[int],
           crowded: bool, say: Callable[[str], None]) -> tuple[Cut, LaneTrial | None]:
    """The cut to take, the same on all ranks, and what was measured. Collective over world.comm.

    compute: with two lanes; name: of the schedule; rows: of a leader in most steps with the first cut (plan.usual_rows);
    held: this rank's layers; crowded: more ranks than cores. A single row cannot be shared: one lane, unmeasured.
    """
    pair = rehearsed(cuts, rows)
    if not min(pair[1]):
        return cuts[0], None
    layers = held[:min(LAYERS, min(world.comm.allgather(len(held))))]
    wait = Waiter(crowded)
    trials = [Rehearsal(world, compute, router, rows_m, cut.lanes, layers, name, wait) for cut, rows_m in zip(cuts, pair)]
    for trial in trials:
        trial.run()
    seconds = medians(world.comm, {1: trials[0].run, 2: trials[1].run}, REPEATS, LIMIT_S)
    for trial in trials:
        trial.close()
    found = LaneTrial(rows, len(layers), seconds[1], seconds[2])
    say(f"lanes for {len(layers)} MoE layer(s) of {rows} rows per leader: one {found.one_lane_s * 1e3:.3g} ms, two "
        f"{found.two_lanes_s * 1e3:.3g} ms: {'two are' if found.lanes == 2 else 'one is'} taken")
    return cuts[found.lanes - 1], found
