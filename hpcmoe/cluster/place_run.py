"""What `hpcmoe place` does: reads a machine, a model and its routing; prints what a placement would bring; writes it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from hpcmoe.cluster import place
from hpcmoe.cluster.cost import Prices
from hpcmoe.cluster.machine import Machine, read_machine
from hpcmoe.cluster.place import Solved
from hpcmoe.compute.footprint import weights_bytes
from hpcmoe.compute.holdings import Share
from hpcmoe.config import LayoutJob, ModelConfig
from hpcmoe.data.placement import Placement, Seats, Shape, write_placement
from hpcmoe.data.routing import Routing, read_routing
from hpcmoe.data.weights import WeightsFile
from hpcmoe.errors import EXIT_OK, UserError
from hpcmoe.model.dtypes import STORED
from hpcmoe.model.experts import flop_per_row
from hpcmoe.model.shard import Shard
from hpcmoe.parallel.layout import Layout, choose
from hpcmoe.report.table import columns, number, percent, size

LAYERS_SHOWN = 8


def run(args) -> int:
    """Runs `place`; its exit code. Raises UserError for whatever the user can mend."""
    if args.machine != "discovered":
        _place(args, read_machine(args.machine))
        return EXIT_OK
    from hpcmoe import launch
    world = launch.start_mpi().COMM_WORLD
    from hpcmoe.cluster.discover import discover
    from hpcmoe.parallel.watched import Watched
    from hpcmoe.parallel.world import on_root
    comm = Watched(world)
    machine = discover(comm, print if comm.rank == 0 else lambda text: None)
    on_root(comm, _place, args, machine)
    return EXIT_OK


def _place(args, machine: Machine) -> None:
    with WeightsFile(args.weights) as file:
        model = file.config
    routing = read_routing(args.routing, model)
    try:
        layout, why = choose(LayoutJob(args.dp, args.pp, args.ep, 1, args.leaders, replicas=args.replicas), len(machine.node_of_rank), model)
    except UserError as error:
        raise UserError(f"{args.machine}: {len(machine.node_of_rank)} ranks: {error}") from error
    pattern = layout.node_pattern(machine.node_of_rank, 0)
    for dp in range(1, layout.dp):
        if layout.node_pattern(machine.node_of_rank, dp) != pattern:
            raise UserError(f"{machine.name}: replica {dp} lies on nodes otherwise than replica 0: one placement cannot fit both: "
                            f"expected pp x ep = {layout.pp * layout.ep} ranks to be whole nodes, or a part of one")
    item = STORED[args.dtype].itemsize
    _check_memory(machine, model, layout, args.dtype, item)
    prices = Prices(model.d * item, flop_per_row(model.d, model.expert.f), args.exchange, model.router.top_k)
    solved = place.solve(machine, layout, place.loads(routing), prices)
    print(f"machine   {machine}\nlayout    {layout}; leaders {layout.leaders}; {why}\n"
          f"routing   {number(int(routing.tokens_l.max()))} tokens, {routing.top_k} of {model.router.experts} experts each; "
          f"placed for a {args.exchange} exchange")
    print(_hand_over(machine, layout))
    print("\n".join(table(solved, routing, layout)))
    if args.output:
        seats = Seats(layout.pp, layout.ep, layout.leaders, pattern)
        predicted = tuple(f.predicted for f in solved.figures["chosen"])
        write_placement(args.output, Placement(Shape.of(model), seats, solved.expert_ls, predicted))
        print(f"placement in {args.output}")


# ---------------------------------------------------------------- what a rank must hold
def fullest(model: ModelConfig, layout: Layout, stage: int, item: int) -> int:
    """Bytes of weights on the fullest rank of a stage: its experts, and a leader's dense tensors."""
    share = Share(list(layout.layers_of(stage, model.layers)), list(layout.slots_of(0, model.router.experts)), True, stage == 0,
                  stage == layout.pp - 1, Shard.of(model, 0, 1))
    return weights_bytes(model, share, item, item, gpu=item < 4)


def _check_memory(machine: Machine, model: ModelConfig, layout: Layout, dtype: str, item: int) -> None:
    most = max(fullest(model, layout, stage, item) for stage in range(layout.pp))
    if most > machine.rank_bytes:
        raise UserError(f"{layout}: a leader's weights take {size(most)} in {dtype}, a rank of {machine.name} has "
                        f"{size(machine.rank_bytes)}: expected more ranks (--pp, --ep), or a smaller --dtype")


# ---------------------------------------------------------------- the table
def _hand_over(machine: Machine, layout: Layout) -> str:
    """What stages hand on: the same in every placement of experts."""
    leaders = layout.leader_places(machine.node_of_rank, 0)
    steps = [(machine.node_of_rank[layout.column(0, s)[a]], machine.node_of_rank[layout.column(0, s + 1)[b]])
             for s in range(layout.pp - 1) for a, b in zip(leaders[s], leaders[s + 1])]
    if not steps:
        return "stages    one: no rows go from stage to stage"
    nodes = sum(a != b for a, b in steps)
    switches = sum(machine.switch_n[a] != machine.switch_n[b] for a, b in steps)
    return (f"stages    {len(steps)} leaders hand rows on: {len(steps) - nodes} within a node, {nodes} between nodes, of them "
            f"{switches} between switches; the same in every placement")


BY_LAYER = (  # title, figure of one layer
    ("Between nodes, once", lambda f: f.predicted.hierarchical_between_nodes),
    ("Between nodes, flat", lambda f: f.predicted.flat_between_nodes))
MEANS = (
    ("between, once", BY_LAYER[0][1]), ("between, flat", BY_LAYER[1][1]),
    ("busiest link, once", lambda f: f.predicted.hierarchical_busiest_link),
    ("busiest link, flat", lambda f: f.predicted.flat_busiest_link),
    ("busiest rank", lambda f: f.predicted.busiest_rank),
    ("cost, ns", lambda f: f.seconds * 1e9))


def table(solved: Solved, routing: Routing, layout: Layout) -> list[str]:
    """The load of ranks, and rows per token of linear, round-robin and chosen placements: by layer, and means over layers."""
    lines = _ranks(solved, routing, layout)
    lines += ["", "Rows per token of one dispatch (once: a row crosses to a node once, hierarchical exchange)", ""]
    names = list(solved.figures)
    heads = [*names, "off linear", "off round-robin"]

    def values(figure) -> np.ndarray:
        return np.array([[figure(f) for f in solved.figures[name]] for name in names])

    for title, figure in BY_LAYER:
        value_nl = values(figure)
        shown = range(min(LAYERS_SHOWN, value_nl.shape[1]))
        lines += columns(title, heads, [(f"layer {layer}", *_cells(value_nl[:, layer])) for layer in shown], 16)
    lines += columns("Mean over layers", heads, [(title, *_cells(values(figure).mean(axis=1))) for title, figure in MEANS], 16)
    if routing.top_k > 2:
        least = np.mean([f.at_least for f in solved.figures["chosen"]])
        lines += ["", f"pairs of experts bound what travels once, for {routing.top_k} choices per token: the figures above are upper bounds; "
                  f"chosen, at least {number(float(least))}"]
    lines += _how(solved)
    return lines


def _ranks(solved: Solved, routing: Routing, layout: Layout) -> list[str]:
    """How much more the busiest rank has to do than the mean; with copies, the same of the experts without them."""
    names = list(solved.figures)
    over_ln = np.array([[f.predicted.busiest_rank for f in solved.figures[name]] for name in names]).T * layout.ep / routing.top_k
    heads = [*names, "balancedness"]
    table_lc = np.column_stack([over_ln, 1 / over_ln[:, -1]])
    if layout.replicas:
        heads, table_lc = ["no copies", *heads], np.column_stack([_without_copies(routing, layout), table_lc])
    rows = [(f"layer {layer}", *map(number, table_lc[layer].tolist())) for layer in range(min(LAYERS_SHOWN, len(table_lc)))]
    rows.append(("mean over layers", *map(number, table_lc.mean(axis=0).tolist())))
    return ["", *columns("Busiest rank / mean", heads, rows, 13)]


def _without_copies(routing: Routing, layout: Layout) -> np.ndarray:
    """Busiest rank / mean of a layer's experts in order on as many places, or one on each where there are more places [l]."""
    plain = replace(layout, ep=min(layout.ep, routing.rows_le.shape[1]), replicas=0)
    place_e = place.linear(plain, routing.rows_le.shape[1])
    return np.array([(rows_r := np.bincount(place_e, weights=rows_e)).max() / rows_r.mean() for rows_e in routing.rows_le])


def _how(solved: Solved) -> list[str]:
    """How the placements were found, and how far from the least cost they can be."""
    lines = []
    gaps = [f.seconds / bound - 1 for f, bound in zip(solved.figures["chosen"], solved.bound_l)]
    tried = sum(solved.exact_l)
    lines.append("")
    if tried:
        lines.append(f"{tried} of {len(gaps)} layers: all placements tried, none costs less")
    if tried < len(gaps):
        lines.append(f"{len(gaps) - tried} of {len(gaps)} layers: local search; at most {percent(max(gaps))} above the least cost (bound), "
                     f"{percent(float(np.mean(gaps)))} in the mean")
    return lines


def _cells(value_n) -> list[str]:
    plain, turns, chosen = (float(v) for v in value_n)
    return [number(v) for v in (plain, turns, chosen)] + [percent(round(1 - chosen / v, 6) + 0.0) if v else "-" for v in (plain, turns)]
