"""What `hpcmoe balance` does: the load of ranks with copies of hot experts, as a run's or made-up rows per step would have it."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from hpcmoe.data.loadfile import read_load
from hpcmoe.errors import EXIT_OK, at
from hpcmoe.parallel import balance
from hpcmoe.parallel.layout import share
from hpcmoe.report.table import columns, number


def run(args) -> int:
    """Runs `balance`; its exit code. Raises UserError for whatever the user can mend."""
    if args.load:
        rows_tle, source = read_load(args.load), args.load
    else:
        rows_tle = _drawn(args)
        source = (f"power law {args.power_law:g}: {number(args.tokens)} tokens a step draw {args.top_k} of {args.experts} experts, "
                  f"seed {args.seed}")
    steps, layers, experts = rows_tle.shape
    spares = _spares(args.replicas, experts, args.ep)
    print(f"load      {source}\n          {number(steps)} steps, {layers} layers, {experts} experts; in the mean "
          f"{number(float(rows_tle.sum(axis=2).mean()))} rows per layer and step\n"
          f"slots     {f'dealt over {args.ep} ranks' if args.ep else 'one per rank'}; later steps: the last {steps - steps // 2}, with copies "
          f"planned from the first {steps // 2}\n")
    heads = ["ranks", "whole run", "worst layer", "balancedness", "later steps", "worst layer", "balancedness", "at least", "busiest rows"]
    rows = [(f"{spare} spare", *_cells(study(rows_tle, _rooms(experts + spare, args.ep)))) for spare in spares]
    print("\n".join(columns("Busiest rank / mean", heads, rows, 13)))
    return EXIT_OK


# ---------------------------------------------------------------- the study
class Study(NamedTuple):
    """Busiest rank / mean with copies, by layer: whole_l of the sums over all steps, which the plan was made from; later_l: the mean of
    the later steps' ratios, planned from the earlier ones; even_l: mean of the later steps' mean / busiest; least_l: as later_l, of a plan
    for each step itself, or of a bound that no plan goes below where ranks have several slots. rows_l: the busiest rank's rows in a later step,
    in the mean."""

    ranks: int
    whole_l: np.ndarray
    later_l: np.ndarray
    even_l: np.ndarray
    least_l: np.ndarray
    rows_l: np.ndarray


def study(rows_tle: np.ndarray, rooms: list[int]) -> Study:
    """rows_tle: rows of each expert in each step, at least two steps with rows; rooms: slots of each rank."""
    half, columns_l = len(rows_tle) // 2, ([], [], [], [], [])
    for rows_te in rows_tle.transpose(1, 0, 2):
        total_e, later_te = rows_te.sum(axis=0), rows_te[half:]
        later_te = later_te[later_te.any(axis=1)]
        rows_tr = rows_of_ranks(later_te, balance.plan(rows_te[:half].sum(axis=0), rooms), rooms)
        mean_t = later_te.sum(axis=1) / len(rooms)
        least_t = np.array([balance.lower_bound(rows_e, rooms) for rows_e in later_te])
        whole = balance.heaviest(balance.plan(total_e, rooms), total_e, rooms) / (total_e.sum() / len(rooms))
        over_t = rows_tr.max(axis=1) / mean_t
        for column, value in zip(columns_l, (whole, over_t.mean(), (1 / over_t).mean(), (least_t / mean_t).mean(), rows_tr.max(axis=1).mean())):
            column.append(value)
    return Study(len(rooms), *map(np.array, columns_l))


def rows_of_ranks(rows_te: np.ndarray, expert_s: np.ndarray, rooms: list[int]) -> np.ndarray:
    """Whole rows on each rank [t, r], as one leader deals them: an expert's rows by turns to its copies."""
    count_e, seen = np.bincount(expert_s), np.zeros(rows_te.shape[1], dtype=int)
    rows_tr = np.zeros((len(rows_te), len(rooms)), dtype=np.int64)
    for e, r in zip(expert_s, np.repeat(np.arange(len(rooms)), rooms)):
        rows_tr[:, r] += (rows_te[:, e] + count_e[e] - 1 - seen[e]) // count_e[e]
        seen[e] += 1
    return rows_tr


def _cells(found: Study) -> list[str]:
    values = (found.whole_l.mean(), found.whole_l.max(), (1 / found.whole_l).mean(), found.later_l.mean(), found.later_l.max(),
              found.even_l.mean(), found.least_l.mean(), found.rows_l.mean())
    return [number(found.ranks), *(number(float(value)) for value in values)]


def _rooms(slots: int, ep: int) -> list[int]:
    return [len(share(slots, ep, place)) for place in range(ep)] if ep else [1] * slots


# ---------------------------------------------------------------- what is asked for
def _spares(text: str, experts: int, ep: int) -> list[int]:
    most = experts * (ep - 1) if ep else 10 * experts
    try:
        spares = [int(part) for part in text.split(",")]
    except ValueError:
        raise at("balance", "--replicas", text, "numbers of spare slots, as 0,2,4") from None
    if ep < 0 or ep > experts:
        raise at("balance", "--ep", ep, f"1 to {experts} expert places, or 0 for one rank per slot")
    for spare in spares:
        if not 0 <= spare <= most:
            raise at("balance", "--replicas", spare, f"0 to {most} for {experts} experts" + (f" on {ep} places" if ep else ""))
    return spares


def _drawn(args) -> np.ndarray:
    for name, least in (("experts", 2), ("top_k", 1), ("tokens", 1), ("steps", 2), ("layers", 1), ("seed", 0)):
        if getattr(args, name) < least:
            raise at("balance", "--" + name.replace("_", "-"), getattr(args, name), f"a number >= {least}")
    if args.top_k > args.experts:
        raise at("balance", "--top-k", args.top_k, f"at most {args.experts}, the experts of a layer")
    if not math.isfinite(args.power_law) or args.power_law < 0:
        raise at("balance", "--power-law", args.power_law, "an exponent >= 0")
    return power_law(args.power_law, args.experts, args.top_k, args.tokens, args.steps, args.layers, args.seed)


def power_law(exponent: float, experts: int, top_k: int, tokens: int, steps: int, layers: int, seed: int) -> np.ndarray:
    """Rows per step, layer and expert [t, l, e] of tokens that draw top_k different experts, one after the other, in proportion to
    rank^-exponent of those that are left. Ranks belong to experts at random in each layer, for the whole run.

    The largest of log p + Gumbel noise are such a draw without replacement (Yellott 1977; Kool et al., arXiv 1903.06059).
    """
    rng = np.random.default_rng(seed)
    rows_tle = np.zeros((steps, layers, experts), dtype=np.int64)
    for layer in range(layers):
        log_p_e = -exponent * np.log(1 + rng.permutation(experts))
        for step in range(steps):
            score_te = log_p_e + rng.gumbel(size=(tokens, experts))
            chosen = np.argpartition(-score_te, top_k - 1, axis=1)[:, :top_k]
            rows_tle[step, layer] = np.bincount(chosen.reshape(-1), minlength=experts)
    return rows_tle
