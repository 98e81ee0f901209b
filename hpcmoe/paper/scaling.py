"""Experts growing with the GPUs of a stage: is it near-linear from EP = 16 on, and where does the network become the limit?"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from hpcmoe.paper.constants import no_network
from hpcmoe.paper.setup import BATCH, Setup, resized
from hpcmoe.paper.steady import Case, Machine, Steady, clock_all
from hpcmoe.paper.words import Section, ms, percent, rate, table, us
from hpcmoe.parallel.layout import Layout
from hpcmoe.report.plots import Series, plot_series

PLACES, BEYOND = (8, 16, 32, 64, 128, 256), (512, 1024)
STAGES, FROM, NEAR = 4, 16, 0.9   # near-linear: at least this part of the tokens/s per GPU at EP = FROM
WAYS = ("straight", "node-aware")


class Point(NamedTuple):
    """One EP: with rows straight to their experts, by way of forwarders, and with messages free. messages: straight, with no host time per message."""

    ep: int
    straight: Steady
    aware: Steady
    alone: Steady
    messages: Steady

    def share(self, way: str) -> float:
        """Of TPOT the part that messages cost."""
        return 1 - self.alone.tpot_s / self.own(way).tpot_s

    def own(self, way: str) -> Steady:
        return self.straight if way == WAYS[0] else self.aware


def scaling(setup: Setup, pictures: Path) -> Section:
    rows = BATCH // FROM
    fixed = {f"{rows} tokens per GPU in each batch": points(setup, lambda ep: rows * ep), f"{BATCH:,} tokens in each batch": points(setup, lambda ep: BATCH)}
    series = [Series(f"{words}, {way}", PLACES, [p.own(way).per_gpu / _at(found, FROM).own(way).per_gpu for p in found], "o" if way == WAYS[0] else "s", line)
              for (words, found), line in zip(fixed.items(), ("-", ":")) for way in WAYS]
    plot_series(series, ("EP: experts of a layer, and GPUs of a stage", f"tokens/s per GPU, of those at EP = {FROM}"), pictures / "paper-scaling.svg", logarithmic="x")
    text = "".join(f"\n{words[0].upper() + words[1:]}:\n\n{_table(found)}\n" for words, found in fixed.items())
    text = f"""## 4. Scaling from EP = {FROM}

As many experts in each layer as GPUs in a stage, {STAGES} stages of one layer, {STAGES} batches in flight, even load; the cluster's nodes as often as needed. Efficiency: tokens/s
per GPU over that at EP = {FROM}. Network: the part of TPOT that goes where messages are free.
{text}
{_verdict(setup, *fixed.values())}
![Efficiency over EP](pictures/paper-scaling.svg)

{setup.rests()}"""
    found = next(iter(fixed.values()))
    parts = [f"{percent(found[-1].own(way).per_gpu / _at(found, FROM).own(way).per_gpu)} with rows {way}" for way in WAYS]
    return Section(text, f"At {rows} tokens per GPU, EP = {found[-1].ep} has {' and '.join(parts)} of the tokens/s per GPU of EP = {FROM}.")


def points(setup: Setup, tokens) -> list[Point]:
    """tokens(ep): of a batch."""
    work: list[tuple[Case, Machine]] = []
    for ep in PLACES:
        machine = _large(setup.machine, STAGES * ep)
        case = setup.case(Layout(1, STAGES, ep), tokens(ep), STAGES, model=resized(setup.model, experts=ep))
        c = machine.cluster
        silent = machine._replace(cluster=replace(c, mpi=replace(c.mpi, message_us=0.0)))
        work += [(case, machine), (replace(case, hierarchical=True), machine), (case, no_network(machine)), (case, silent)]
    own = iter(clock_all(work, setup.jobs))
    return [Point(ep, next(own), next(own), next(own), next(own)) for ep in PLACES]


def _beyond(setup: Setup, rows: int) -> list[tuple[int, float]]:
    """(EP, part of TPOT that messages cost) of larger stages yet, straight."""
    work = []
    for ep in BEYOND:
        case = setup.case(Layout(1, STAGES, ep), rows * ep, STAGES, model=resized(setup.model, experts=ep))
        machine = _large(setup.machine, STAGES * ep)
        work += [(case, machine), (case, no_network(machine))]
    own = clock_all(work, setup.jobs)
    return [(ep, 1 - alone.tpot_s / one.tpot_s) for ep, one, alone in zip(BEYOND, own[::2], own[1::2])]


def _large(machine: Machine, ranks: int) -> Machine:
    c = machine.cluster
    return machine._replace(cluster=replace(c, nodes=replace(c.nodes, count=max(c.nodes.count, -(-ranks // c.nodes.ranks_per_node)))))


def _at(found: list[Point], ep: int) -> Point:
    return next(p for p in found if p.ep == ep)


def _table(found: list[Point]) -> str:
    rows = []
    for p in found:
        cells = [text for way in WAYS for text in (rate(p.own(way).tokens_per_s), ms(p.own(way).tpot_s),
                                                  percent(p.own(way).per_gpu / _at(found, FROM).own(way).per_gpu), percent(p.share(way)))]
        rows.append([str(p.ep), f"{p.straight.gpus:,}", *cells])
    return table(["EP", "GPUs", *[text for way in WAYS for text in (f"{way}: tokens/s", "TPOT, ms", "efficiency", "network")]], rows)


def _verdict(setup: Setup, per_gpu: list[Point], total: list[Point]) -> str:
    last, lines = per_gpu[-1], []
    beyond = _beyond(setup, BATCH // FROM)
    for way in WAYS:
        near = [p.ep for p in per_gpu if p.ep >= FROM and p.own(way).per_gpu >= NEAR * _at(per_gpu, FROM).own(way).per_gpu]
        lines.append(f"**With rows {'straight to their experts' if way == WAYS[0] else 'by way of a forwarder on each node'}** scaling is within {percent(1 - NEAR)} of linear "
                     f"{f'up to EP = {max(near)}' if len(near) > 1 else 'nowhere beyond EP = ' + str(FROM)} at a fixed number of tokens per GPU; at EP = {last.ep} messages "
                     f"are {percent(last.share(way))} of TPOT.")
    message = setup.machine.cluster.mpi.message_us
    kernels = sum(last.straight.device_s.values()) / STAGES / setup.model.layers
    limit = next((f"the network is the limit (more than half of TPOT) from EP = {ep:,} ({percent(share)})" for ep, share in beyond if share > 0.5),
                 f"the network is not the limit up to EP = {beyond[-1][0]:,} ({percent(beyond[-1][1])} of TPOT)")
    closed = (f"What grows is not bytes, which are the same for each GPU, but messages: in counts, dispatch and combine a rank sends and gets EP - 1 each, 6 (EP - 1) x {message:g} us of "
              "host time per layer, of which what the host does while kernels run that it has queued costs nothing"
              + (f"; it is as long as the {us(kernels)} us of a layer's kernels at EP = {1 + kernels * 1e6 / 6 / message:,.0f}" if message else "") + f". Straight, {limit}. ")
    host = (last.straight.tpot_s - last.messages.tpot_s) / max(last.straight.tpot_s - last.alone.tpot_s, 1e-12)
    least = min(total, key=lambda p: p.straight.tpot_s)
    return ("\n".join(lines) + f"\n\n{closed}At EP = {last.ep} that host time is {percent(host)} of what messages cost straight; a forwarder on each node takes the messages, and doubles the hops. "
            f"With {BATCH:,} tokens in all, more GPUs only make each expert's rows fewer, which its weights hide: TPOT is least at EP = {least.ep}, and tokens/s per GPU fall.\n")
