"""The paper's two layouts: what a roofline says, what the simulation says, what the paper says, and how each depends on the assumption."""

from __future__ import annotations

from dataclasses import replace
from typing import Callable, NamedTuple

from hpcmoe.paper import roofline
from hpcmoe.paper.constants import ASSUMED, free, network, no_network
from hpcmoe.paper.setup import BATCH, Setup, resized
from hpcmoe.paper.steady import Case, Machine, Steady, steady
from hpcmoe.paper.words import Section, layout_name, ms, percent, rate, table, us

CLOSE, MOST = 0.10, 64.0  # figures that differ by no more agree; a factor that is turned up goes to MOST


class Claim(NamedTuple):
    """What the paper says of a layout; own: the same in our hands."""

    name: str
    tokens_per_s: float
    tpot_s: float
    case: Case
    own: Steady


def claims(setup: Setup) -> list[Claim]:
    """The baseline and the proposal, at 1,024 tokens per batch, one batch in flight: the paper's published figures, and ours."""
    base, proposal = setup.must([setup.baseline(), setup.proposal()])
    return [Claim("baseline", 120e3, 8.3e-3, setup.baseline(), base), Claim("proposal", 450e3, 2.2e-3, setup.proposal(), proposal)]


# ---------------------------------------------------------------- 1. the assumption
def assumption(setup: Setup) -> str:
    m, g = setup.model, setup.machine.calibration.gemm
    heads = m.attention
    return f"""## 1. The working assumption

The paper does not print its widths. This page takes hidden width {m.d:,}, experts of width {m.expert.f:,} with {2 + m.expert.gated} matrices,
attention {heads.heads * heads.head_dim:,} wide ({heads.heads} heads, {heads.kv_heads} for keys and values), top-{m.router.top_k} of
{m.router.experts} experts, {m.layers} layers, a vocabulary of {m.vocab:,}, {8 * g.item_bytes}-bit numbers, and {setup.keys} tokens in the cache of a sequence.

At least, one token waits in each layer for the weights of attention, its cache, the weights of one rank's expert, and for rows out and back,
one after the other:

    TPOT >= layers x (attention + cache + expert + exchange + sums) + head + (stages - 1) x hand-on

    attention   max(bytes of its weights / memory, flop / peak) / tp
    cache       rows of a leader x tokens in the cache x 2 x attention width x bytes of a number / memory / tp
    expert      experts of a rank x max(bytes of one / memory, flop / peak) / tp
    exchange    2 x max(bytes to ranks of the node / port, bytes to other nodes / adapter)
    sums        of tensor shards: 2 x 2 (tp - 1) / tp x rows x width x bytes of a number / port
    hand-on     a batch's rows to the next stage / adapter

{_roofline_table(setup)}
{_sensitivity(setup)}
{setup.rests()}"""


def _roofline_table(setup: Setup) -> str:
    rows = []
    for case in (setup.baseline(), setup.proposal()):
        for words, rates in (("data sheet", setup.sheet), ("reached", setup.reached)):
            p = roofline.parts(case, rates, setup.ranks_per_node)
            rows.append([f"{layout_name(case.layout)}, {words}", *[us(x) for x in (p.attention, p.cache, p.expert, p.exchange, p.sums, p.head, p.hand_on)],
                         ms(roofline.weights_s(case, p)), ms(roofline.tpot_s(case, p))])
    s, r = setup.sheet, setup.reached
    return table(["rates", "attention, us", "cache", "expert", "exchange", "sums", "head", "hand-on", "weights alone, ms", "TPOT >=, ms"], rows) + f"""
<sub>Data sheet: memory {s.memory / 1e12:.2f} TB/s, {s.flop / 1e12:,.0f} TFLOP/s, port {s.port / 1e9:.0f} GB/s, adapter {s.nic / 1e9:.0f} GB/s per GPU. Reached:
memory {r.memory / 1e12:.2f} TB/s by products, {r.cache / 1e12:.2f} by attention, port {r.port / 1e9:.0f} GB/s, adapter {r.nic / 1e9:.0f} GB/s
([constants](#constants)).</sub>
"""


def _sensitivity(setup: Setup) -> str:
    m, width = setup.model, setup.model.attention.heads * setup.model.attention.head_dim
    halves: list[tuple[str, dict, Machine]] = [("as assumed", {}, setup.machine)]
    halves += [(f"expert width {n:,}", {"model": resized(m, f=n)}, setup.machine) for n in (m.expert.f // 4, m.expert.f // 2, m.expert.f * 2)]
    halves += [(f"hidden {n:,}", {"model": resized(m, d=n)}, setup.machine) for n in (m.d // 2, m.d * 2)]
    halves += [(f"top-{n}", {"model": resized(m, top_k=n)}, setup.machine) for n in (1, 2, 4, 8) if n != m.router.top_k]
    halves += [(f"attention {n:,} wide", {"model": resized(m, width=n)}, setup.machine) for n in (width // 2, width * 2) if n % 1024 == 0]
    halves += [(f"{n:,} tokens in the cache", {"keys": n}, setup.machine) for n in (256, 1024)]
    halves += [(f"links x {x:g}", {}, network(setup.machine, x)) for x in (0.25, 0.5, 2.0)] + [("messages free", {}, no_network(setup.machine))]
    rows = []
    for words, more, machine in halves:
        found = setup.clock([setup.baseline(**more), setup.proposal(**more)], machine)
        cells = [text for own in found for text in ((ms(own.tpot_s), rate(own.tokens_per_s)) if own else ("does not fit", "-"))]
        ratio = f"{found[1].tokens_per_s / found[0].tokens_per_s:.2f}" if all(found) else "-"
        rows.append([words, *cells, ratio])
    head = ["", "baseline TPOT, ms", "tokens/s", "proposal TPOT, ms", "tokens/s", "proposal / baseline"]
    return f"What changes with each of these, {BATCH:,} tokens per batch, one in flight, everything else as above:\n\n" + table(head, rows)


# ---------------------------------------------------------------- 2. the paper's table
def compared(setup: Setup, found: list[Claim]) -> Section:
    rows = []
    for c in found:
        gpus = c.own.gpus
        rows.append([f"{c.name}, {gpus} GPUs", rate(c.tokens_per_s), rate(c.own.tokens_per_s), f"{c.own.tokens_per_s / c.tokens_per_s:.2f}",
                     ms(c.tpot_s), ms(c.own.tpot_s), f"{c.own.tpot_s / c.tpot_s:.2f}", f"{c.tokens_per_s / gpus:,.0f}", f"{c.own.per_gpu:,.0f}",
                     rate(BATCH / c.tpot_s)])
    base, proposal = found
    theirs, ours = proposal.tokens_per_s / base.tokens_per_s, proposal.own.tokens_per_s / base.own.tokens_per_s
    rows.append(["proposal / baseline", f"{theirs:.2f}", f"{ours:.2f}", f"{ours / theirs:.2f}", f"{proposal.tpot_s / base.tpot_s:.2f}",
                 f"{proposal.own.tpot_s / base.own.tpot_s:.2f}", "", f"{theirs * base.own.gpus / proposal.own.gpus:.2f}",
                 f"{proposal.own.per_gpu / base.own.per_gpu:.2f}", ""])
    head = ["", "paper, tokens/s", "ours", "ratio", "paper, TPOT ms", "ours", "ratio", "paper, tokens/s per GPU", "ours", "batch / paper's TPOT"]
    text = f"""## 2. The paper's table

{BATCH:,} tokens per batch, one batch in flight, decode alone. Baseline: {layout_name(base.case.layout)}; proposal: {layout_name(proposal.case.layout)}.

{table(head, rows)}
The last column is what one batch in flight gives at the paper's TPOT: {_same(found)}.

{"".join(_verdict(setup, c) for c in found).rstrip()}

### Where the time goes

{_parts(setup, found)}
### The part that is assumed

{_assumed(setup, found)}
{setup.rests()}"""
    told = " and ".join(f"{ms(c.own.tpot_s)} ms for the {c.name}, {c.own.tpot_s / c.tpot_s:.2f} of the paper's {ms(c.tpot_s)}" for c in found)
    sheet = roofline.tpot_s(proposal.case, roofline.parts(proposal.case, setup.sheet, setup.ranks_per_node))
    return Section(text, f"TPOT is {told}; a roofline of the proposal is {ms(sheet)} ms. Per GPU the proposal has {proposal.own.per_gpu / base.own.per_gpu:.2f} of the baseline's tokens/s "
                   f"({theirs * base.own.gpus / proposal.own.gpus:.2f} in the paper).")


def _same(found: list[Claim]) -> str:
    near = all(abs(BATCH / c.tpot_s / c.tokens_per_s - 1) < CLOSE for c in found)
    return f"within {percent(CLOSE)} its throughput, so its figures hold no gain from pipelining" if near else "not its throughput"


def _verdict(setup: Setup, c: Claim) -> str:
    """Whether ours meets the paper's TPOT, and if not, what would have to be true."""
    ratio, layers = c.own.tpot_s / c.tpot_s, setup.model.layers
    at_least = roofline.tpot_s(c.case, roofline.parts(c.case, setup.sheet, setup.ranks_per_node))
    words = f"**The {c.name}** "
    words += (f"meets the paper's TPOT within {percent(CLOSE)}." if abs(ratio - 1) <= CLOSE else
              f"does not meet the paper's TPOT: ours is {ratio:.2f} times as long." if ratio > 1 else
              f"is faster here than in the paper: {ratio:.2f} of its TPOT.")
    spare_s = (c.tpot_s - at_least) / layers
    left = f"leaves {us(spare_s)} us per layer for everything that a roofline leaves out" if spare_s >= 0 else "cannot be reached with these widths in 16 bits"
    words += (f" The paper's is {c.tpot_s / at_least:.2f} times the roofline of {ms(at_least)} ms (data sheet), which {left}; ours takes "
              f"{us((c.own.tpot_s - at_least) / layers)} us per layer beyond it.\n")
    if ratio <= 1 + CLOSE:
        return words + "\n"
    return words + "For ours to be the paper's, one of these alone would have to be true:\n\n" + "".join(f"- {line}\n" for line in _needed(setup, c)) + "\n"


def _needed(setup: Setup, c: Claim) -> list[str]:
    """Each knob alone, turned until TPOT is the paper's."""
    def tpot_s(machine: Machine, **more) -> float:
        model = resized(setup.model, **more) if more else setup.model
        return steady(setup.case(c.case.layout, c.case.batch, model=model), machine).tpot_s

    g, calibration = setup.machine.calibration.gemm, setup.machine.calibration
    widest = setup.model.expert.f
    f = _least(lambda x: tpot_s(setup.machine, f=max(8, int(widest / x) // 8 * 8)), c.tpot_s)
    memory = _least(lambda x: tpot_s(setup.machine._replace(calibration=_faster(calibration, x))), c.tpot_s)
    wires = _least(lambda x: tpot_s(network(setup.machine, x)), c.tpot_s)
    nothing = tpot_s(free(setup.machine, setup.of(ASSUMED)))
    return [
        f"experts of width {int(widest / f):,} instead of {widest:,}" if f else f"no expert width is enough, down to {widest / MOST:,.0f}",
        f"products, attention and passes reading memory {memory:.2f} times as fast: {memory * g.memory_gb_per_s / 1e3:.2f} TB/s in products, where the data sheet "
        f"says {setup.memory_gb_per_s / 1e3:.2f}" if memory else f"no memory rate is enough, up to {MOST:g} times as fast",
        f"links {wires:.2f} times as fast" if wires else f"no rate of links is enough, up to {MOST:g} times as fast",
        f"all that is assumed (below) free, which gives {ms(nothing)} ms: {'enough' if nothing <= c.tpot_s else 'not enough'}",
    ]


def _faster(calibration, x: float):
    g, a, e = calibration.gemm, calibration.attention, calibration.elementwise
    return replace(calibration, gemm=replace(g, memory_gb_per_s=g.memory_gb_per_s * x, cache_gb_per_s=g.cache_gb_per_s * x, unit_gb_per_s=g.unit_gb_per_s * x),
                   attention=replace(a, kv_gb_per_s=a.kv_gb_per_s * x), elementwise=replace(e, gb_per_s=e.gb_per_s * x))


def _least(tpot_s: Callable[[float], float], target: float, most: float = MOST) -> float | None:
    """The least factor from 1 to `most` with which tpot_s(factor) <= target, to a percent; None where there is none."""
    if tpot_s(most) > target:
        return None
    low, high = 1.0, most
    while high / low > 1.01:
        middle = (low * high) ** 0.5
        low, high = (low, middle) if tpot_s(middle) <= target else (middle, high)
    return high


def _parts(setup: Setup, found: list[Claim]) -> str:
    """TPOT as a sum: least by the data sheet, by what is reached, kernels, the rest of the device, host and network."""
    rows, cells = [], []
    for c in found:
        sheet, reached = (roofline.weights_s(c.case, roofline.parts(c.case, rates, setup.ranks_per_node)) for rates in (setup.sheet, setup.reached))
        device = sum(c.own.device_s.values())
        alone, = setup.must([c.case], no_network(setup.machine))
        cells.append([sheet, reached, device, alone.tpot_s, c.own.tpot_s])
    names = ["weights at the data sheet's memory rate", "weights at the rate that products reach", "all kernels of a round, one after the other",
             "and launches, waits for the device", "and messages: TPOT"]
    for i, name in enumerate(names):
        row = [name]
        for column in cells:
            row += [ms(column[i]), f"+{ms(column[i] - column[i - 1])}" if i else ""]
        rows.append(row)
    return table(["ms, up to and with", *[text for c in found for text in (c.name, "")]], rows)


def _assumed(setup: Setup, found: list[Claim]) -> str:
    assumed = setup.of(ASSUMED)
    free_s = [[own.tpot_s for own in setup.must([c.case for c in found], free(setup.machine, [constant]))] for constant in assumed]
    all_s = [own.tpot_s for own in setup.must([c.case for c in found], free(setup.machine, assumed))]
    rows = []
    for constant, times in zip(assumed, free_s):
        if any(c.own.tpot_s - t > 0.5e-6 for c, t in zip(found, times)):
            rows.append([f"`{constant.name}` = {constant.value:g}", *[us(c.own.tpot_s - t) for c, t in zip(found, times)]])
    rows.append(["all at once", *[us(c.own.tpot_s - t) for c, t in zip(found, all_s)]])
    parts = [f"of the {c.name}'s {ms(c.own.tpot_s)} ms, {ms(c.own.tpot_s - t)} depend on them, and the roofline of section 1 is {_roofline(setup, c)}"
             for c, t in zip(found, all_s)]
    return (f"Were a constant that nobody measured free (a time 0, an efficiency 1, a rate without limit), TPOT would be shorter by so many us: {'; '.join(parts)}. "
            "What does not depend on them stands on numbers that are fitted, measured or of a data sheet.\n\n" + table(["free", *[f"{c.name}, us" for c in found]], rows))


def _roofline(setup: Setup, c: Claim) -> str:
    sheet, reached = (roofline.tpot_s(c.case, roofline.parts(c.case, rates, setup.ranks_per_node)) for rates in (setup.sheet, setup.reached))
    return f"{ms(sheet)} ms by the data sheet, {ms(reached)} at reached rates"
