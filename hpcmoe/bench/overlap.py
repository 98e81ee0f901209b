"""`hpcmoe bench overlap`: how much of the exchange the schedule hides behind the experts' products, as OSU's benchmarks put it.

Overall, compute, pure communication and overlap are those of the non-blocking collectives of the OSU micro-benchmarks (OMB 7,
c/util/osu_util_mpi.c, calculate_and_print_stats): overlap % = max(0, 100 - 100 * (overall - compute) / pure communication).
"""

from __future__ import annotations

import json
import math
import os
import time
from typing import Callable, NamedTuple

import numpy as np

from hpcmoe import memory
from hpcmoe.compute.base import Sizes
from hpcmoe.compute.holdings import Holdings, Share
from hpcmoe.compute.host import Host, HostCompute
from hpcmoe.config import AttentionConfig, ExpertConfig, ModelConfig, RouterConfig, WeightsJob
from hpcmoe.errors import EXIT_OK, UserError, at
from hpcmoe.facts import mpi_facts, version
from hpcmoe.files import check_folder, replacing
from hpcmoe.model.experts import Expert
from hpcmoe.model.shard import Shard
from hpcmoe.parallel import plan
from hpcmoe.parallel.exchange import TRANSPORTS
from hpcmoe.parallel.handle import Waiter
from hpcmoe.parallel.hierarchical import HIERARCHICAL
from hpcmoe.parallel.layout import Layout, share
from hpcmoe.parallel.rehearsal import Rehearsal, medians
from hpcmoe.parallel.selftest import self_test
from hpcmoe.parallel.watched import Watched
from hpcmoe.parallel.world import World, agree, node_names, on_root

NAMES = (*TRANSPORTS, HIERARCHICAL)


class Asked(NamedTuple):
    """The options of the command, checked. rows: of a leader in all micro-batches together; transports: empty: all that work;
    asleep_us: microseconds of sleep for each row in an expert's stead, 0 for real products."""

    transports: tuple[str, ...]
    rows: tuple[int, ...]
    micros: tuple[int, ...]
    d: int
    f: int
    experts: int
    top_k: int
    layers: int
    repeats: int
    asleep_us: float
    out: str


class Asleep(HostCompute):
    """Sleeps where experts would compute, a time for each row: as if every rank had a core, or another device, of its own. Nor does MPI
    go on meanwhile, as behind a product."""

    row_s = 0.0

    def expert(self, m: int, layer: int, x_id, n_recv_re: np.ndarray):
        y_id = self._buffers(m).rows("y_id", len(x_id), self.model.d)
        y_id[:] = 0
        time.sleep(self.row_s * len(x_id))
        return y_id


def numbers(option: str, text: str) -> tuple[int, ...]:
    """Whole numbers >= 1 with commas between. Raises UserError."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) for part in parts):
        raise at(option, "", text, "whole numbers >= 1 with commas between")
    return tuple(map(int, parts))


def asked(args, ranks: int) -> Asked:
    """The options of a job of so many ranks. Raises UserError for those that are impossible."""
    if ranks < 2:
        raise UserError("bench overlap: 1 rank: expected at least 2, which have something to exchange (mpiexec -n 8 hpcmoe bench overlap)")
    names = tuple(name.strip() for name in args.transports.split(",") if name.strip())
    for name in names:
        if name not in NAMES:
            raise at("--transports", "", name, f"some of {', '.join(NAMES)}")
    for name in ("d", "f", "top_k", "layers", "repeats"):
        if getattr(args, name) < 1:
            raise at(f"--{name.replace('_', '-')}", "", getattr(args, name), "a number >= 1")
    if not 0 <= args.asleep_us < math.inf:
        raise at("--asleep-us", "", args.asleep_us, "a number >= 0")
    experts = args.experts or ranks
    if experts < ranks:
        raise at("--experts", "", args.experts, f"0 or at least one for each of the {ranks} ranks")
    if args.top_k > experts:
        raise at("--top-k", "", args.top_k, f"at most the {experts} experts")
    rows, micros = numbers("--rows", args.rows), numbers("--micro-batches", args.micro_batches)
    if min(rows) < max(micros):
        raise at("--rows", "", min(rows), f"at least as many as micro-batches ({max(micros)}), which share the rows")
    if args.out:
        check_folder(args.out.rpartition("/")[0] or ".")
    return Asked(names, rows, micros, args.d, args.f, experts, args.top_k, args.layers, args.repeats, args.asleep_us, args.out)


def run(args) -> int:
    """Runs `bench overlap` on all ranks that the launcher started; its exit code. Raises UserError."""
    from hpcmoe import launch
    comm = Watched(launch.start_mpi().COMM_WORLD)
    options = on_root(comm, asked, args, comm.size)
    world = World(comm, Layout(1, 1, comm.size), max(options.micros), node_names(comm))
    bench = Bench(world, options, print if comm.rank == 0 else lambda *text, **more: None)
    figures = bench.measure()
    on_root(comm, bench.write, figures)
    return EXIT_OK


class Bench:
    """One stage over all ranks, all of them leaders, with random weights."""

    def __init__(self, world: World, options: Asked, say: Callable):
        self.world, self.options, self.say = world, options, say
        self.model = ModelConfig("bench", 2, options.d, options.layers, AttentionConfig(1, 1, 2), RouterConfig(options.experts, options.top_k),
                                 ExpertConfig(options.f), 1)
        self.host = agree(world.comm, Host, WeightsJob(dtype="fp32"))
        self.layers = list(range(options.layers))
        slots = list(world.layout.slots_of(world.here.place, options.experts))
        self.share = Share(self.layers, slots, True, True, True, Shard.of(self.model, 0, 1))
        self.held = agree(world.comm, self._weights)
        self.crowded = world.ranks_on_node * self.host.threads > memory.cores()

    def _weights(self) -> Holdings:
        rng, held, shapes = np.random.default_rng(1 + self.world.rank), Holdings(), {"gate": "fd", "up": "fd", "down": "df"}
        size = {"d": self.options.d, "f": self.options.f}
        for layer in self.layers:
            for e in self.share.slots:
                tensors = {name: rng.standard_normal([size[axis] for axis in axes], np.float32) / 64 for name, axes in shapes.items()}
                held.experts[layer, e] = Expert(self.model.expert, self.host.backend, tensors)
        return held

    def transports(self) -> list[str]:
        """Those that were asked for and give right values here; a line for each other one. The same on all ranks."""
        comm, found = self.world.comm, []
        for name in self.options.transports or NAMES:
            if name == HIERARCHICAL:
                fault = "" if plan.nodes_matter(self.world.layout, self.world.node_of_rank) else "no node has several ranks, or there is one node"
            else:
                fault = next((f for f in comm.allgather(self_test(self.world.lanes[0], self.host.device, [name])[name]) if f), "")
            if fault:
                self.say(f"{name}: left out: {fault}", flush=True)
            else:
                found.append(name)
        return found

    def measure(self) -> list[dict]:
        """A line for each transport, number of rows and number of micro-batches, printed as it comes."""
        o, hosts = self.options, self.world.hosts
        how = f"{o.asleep_us:g} us asleep per row" if o.asleep_us else self.host.backend.name
        self.say(f"{len(hosts)} ranks on {len(set(hosts))} node(s), {o.experts} experts, top-{o.top_k}, d={o.d}, f={o.f}, {o.layers} layers; {how}; "
                 f"ms of all layers: medians of {o.repeats}, of the slowest rank")
        self.say("transport     rows  micro-batches   overall   compute  pure comm.  overlap %  speed-up", flush=True)
        lines = []
        for name in self.transports():
            for rows in o.rows:
                first = None
                for micros in o.micros:
                    line = self._point(name, rows, micros)
                    first = first or line["overall_ms"]
                    line["speed_up"] = first / line["overall_ms"]
                    lines.append(line)
                    self.say(f"{name:12} {rows:5d} {micros:14d}  {line['overall_ms']:8.2f}  {line['compute_ms']:8.2f}  "
                             f"{line['pure_communication_ms']:10.2f}  {line['overlap_percent']:9.1f}  {line['speed_up']:8.2f}", flush=True)
        return lines

    def _point(self, name: str, rows: int, micros: int) -> dict:
        world, o = self.world, self.options
        world.transport = name
        rows_m = [len(share(rows, micros, m)) for m in range(micros)]
        kind = Asleep if o.asleep_us else HostCompute
        compute = kind(self.model, self.held, Sizes(micros, micros, 0, rows, 0, 0, 0, 0), self.share, None, False)
        compute.row_s = o.asleep_us / 1e6
        rehearsal = Rehearsal(world, compute, self.model.router, rows_m, micros, self.layers, "overlapped", Waiter(self.crowded))
        rehearsal.run()
        turns = {"overall": rehearsal.run, "pure_communication": lambda: rehearsal.run(False), "compute": rehearsal.products}
        seconds = medians(world.comm, turns, o.repeats, float("inf"))
        rehearsal.close()
        return {"transport": name, "rows_per_leader": rows, "micro_batches": micros,
                **{f"{what}_ms": 1e3 * seconds[what] for what in turns}, "overlap_percent": overlap_percent(**seconds)}

    def write(self, lines: list[dict]) -> None:
        """The figures and what they are of, as JSON. Raises UserError."""
        o, world = self.options, self.world
        if not o.out:
            return
        facts = {"date": time.strftime("%Y-%m-%d"), "ranks": world.comm.size, "hosts": world.hosts, "mpi": mpi_facts(),
                 "versions": {name: version(name) for name in ("hpcmoe", "numpy", "mpi4py")},
                 "linear": dict(zip(("backend", "version"), self.host.library)), "load_average": os.getloadavg()[0]}
        facts |= {name: getattr(o, name) for name in ("d", "f", "experts", "top_k", "layers", "repeats", "asleep_us")}
        with replacing(o.out) as temporary, open(temporary, "w", encoding="utf-8") as file:
            json.dump({"format": "hpcmoe-bench-overlap", "format_version": 1, "run": facts, "points": lines}, file, indent=1)
            file.write("\n")


def overlap_percent(overall: float, compute: float, pure_communication: float) -> float:
    """OSU's overlap of three times in one unit, in percent: what of the pure communication the overall time does not show."""
    return max(0.0, 100 - 100 * (overall - compute) / pure_communication)
