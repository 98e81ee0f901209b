"""Fits a calibration to what `hpcmoe bench gpu --only calibrate` measured on a GPU (bench/calibrate.py), without that GPU.

Where an item was not measured, its numbers are taken from a base calibration, or left out; either is said in the file by name.
"""

from __future__ import annotations

import json
from typing import NamedTuple

import numpy as np

from hpcmoe.cluster.fit import FitError, least_squares, rounded
from hpcmoe.cluster.gemm import GemmModel
from hpcmoe.cluster.gemm_fit import CHIPS, GPU_SPLITS, GPU_START, GPU_TILES, Chip, Products, error, fit
from hpcmoe.cluster.kernels import AttentionModel, Calibration, CallsModel, CopyModel, ElementwiseModel, HostModel, gemm_toml, kind_of, table_toml
from hpcmoe.cluster.measure import fit_elementwise
from hpcmoe.errors import UserError

HELD_OUT = (5120, 3072)        # products with n or k of these judge the fit
ATTENTION_START = (346e3, 0.75, 3.0, 0.1, 0.05, 64.0, 10.0)  # GFLOP/s, part of the copy rate, us of a call, of a chunk, of a row; keys; us
SECTIONS = ("gemm", "attention", "elementwise", "host", "calls", "copies")


class Raw(NamedTuple):
    """What was measured: the file, facts of the device and of the run; figures and points of the section."""

    path: str
    device: dict
    facts: dict
    figures: dict
    points: dict

    def columns(self, curve: str, *names: str) -> list[np.ndarray]:
        """Columns of a curve. Raises NotMeasured where it has no rows."""
        rows = self.points.get(curve, [])
        if not rows:
            raise NotMeasured(f"no points of {curve!r}")
        try:
            return [np.array([row[name] for row in rows]) for name in names]
        except (KeyError, TypeError) as wrong:
            raise UserError(f"{self.path}: points of {curve!r}: {wrong} is missing") from wrong

    def why(self) -> str:
        """Items that were not measured, with their reasons."""
        return "; ".join(f"{row['item']}: not measured: {row['why']}" for row in self.points.get("not_measured", []))


class NotMeasured(Exception):
    """Something that a part of the calibration needs is not there."""


def read_raw(path: str) -> Raw:
    """A file of `bench gpu` with the section `calibrate`. UserError where it is none."""
    try:
        with open(path, encoding="utf-8") as file:
            whole = json.load(file)
        section = whole["sections"]["calibrate"]
        return Raw(path, whole["device"], whole, section["figures"], section["points"])
    except OSError as wrong:
        raise UserError(f"{path}: cannot be read: {wrong.strerror}") from wrong
    except (ValueError, KeyError, TypeError) as wrong:
        raise UserError(f"{path}: no measurements of a GPU in it: expected what `hpcmoe bench gpu --only calibrate --out FILE` writes") from wrong


class Fitted(NamedTuple):
    """parts: the models by section, those that were measured; errors: on what was fitted and on what was held out, by title; missing:
    why a section was not measured, or not all of it; source: words for the file; processor: the GPU, as CUDA calls it."""

    machine: str
    processor: str
    source: str
    parts: dict
    errors: dict[str, FitError]
    missing: dict[str, str]

    def toml(self, base: Calibration | None, base_name: str) -> str:
        """The calibration file."""
        lines = [f"# {title:<28}  {e}" for title, e in self.errors.items()]
        lines += [f"# {name}: {why}" for name, why in self.missing.items()]
        lines += [f"machine = {json.dumps(self.machine)}", f"source = {json.dumps(self.source)}",
                  f"processor = {json.dumps(self.processor)}"]
        for name in SECTIONS:
            part = self.parts.get(name)
            if part is None:
                part = getattr(base, name, None)
                lines.append(f"\n# [{name}] was not measured: " + (f"numbers of {base_name}" if part else "left out"))
            else:
                lines.append("")
            if part is not None:
                lines.append((gemm_toml(part) if name == "gemm" else table_toml(name, _told(name, part))).rstrip())
        return "\n".join(lines) + "\n"


def _told(name: str, part) -> dict:
    """What a file says of a part: of the program's own work only what there is."""
    return {key: value for key, value in vars(part).items() if value or name != "calls"}


def fit_gpu(raw: Raw) -> Fitted:
    """Every part of a calibration that the measurements allow."""
    device, clocks = raw.device, raw.device.get("clocks_before", {})
    source = f"hpcmoe bench gpu --only calibrate, {raw.facts.get('date_utc', '')}, {raw.facts.get('dtype', '')}; " + ", ".join(
        f"{name} {value}" for name, value in {"driver": clocks.get("driver_version"), "CUDA": device.get("cuda_runtime"), "CuPy": device.get("cupy"),
                                              "SM clock": clocks.get("clocks.sm"), "of at most": clocks.get("clocks.max.sm"),
                                              "memory clock": clocks.get("clocks.mem"), "power limit": clocks.get("power.limit")}.items() if value)
    parts, errors, missing = {}, {}, {}
    for name, work in (("gemm", _gemm), ("attention", _attention), ("elementwise", _elementwise), ("host", _host), ("calls", _calls), ("copies", _copies)):
        try:
            parts[name], found = work(raw, parts)
            errors |= found
        except NotMeasured as wrong:
            missing[name] = f"not measured: {wrong}"
    if not raw.facts.get("measured", True) or raw.facts.get("scale") == "small":
        missing["device"] = "NOT A MEASUREMENT: tiny sizes, or a device that is no GPU"
    if raw.why():
        missing["items"] = raw.why()
    return Fitted(device.get("name", ""), device.get("name", ""), source, parts, errors, missing)


# ---------------------------------------------------------------- products
def chip_of(raw: Raw, rows: Products) -> Chip:
    """The peaks of the GPU: a known one's; of others a quarter above the best that was measured."""
    kind = kind_of(raw.device.get("name", ""))
    if kind:
        return CHIPS[f"{kind.lower()}_sxm"]
    best = float((2.0 * rows.m * rows.n * rows.k / rows.seconds).max())
    return Chip(int(raw.device["multiprocessors"]), 2, 1.25e-9 * best, 1.25 * _copy_rate(raw), GPU_TILES, GPU_SPLITS, GPU_START)


def _copy_rate(raw: Raw) -> float:
    rate = raw.figures.get("copy_gb_per_s")
    if not isinstance(rate, (int, float)):
        raise NotMeasured("no copy rate")
    return rate


def _gemm(raw: Raw, parts: dict) -> tuple[GemmModel, dict[str, FitError]]:
    m, n, k, ms = raw.columns("gemm", "m", "n", "k", "time_ms")
    rows = Products(m, n, k, ms * 1e-3)
    held = rows.held_out(HELD_OUT)
    if (~held).sum() < 20:
        raise NotMeasured(f"{(~held).sum()} products to fit: at least 20 are needed")
    model = fit(chip_of(raw, rows), rows.where(~held))
    errors = {"products, fitted": error(model, rows.where(~held))}
    return model, errors | ({"products, held out": error(model, rows.where(held))} if held.any() else {})


# ---------------------------------------------------------------- attention
def _attention(raw: Raw, parts: dict) -> tuple[AttentionModel, dict[str, FitError]]:
    """Rates and times of a call; softmax is in the rates, and blocks that no row may see are left out (attention_prefill.cu)."""
    gemm = parts.get("gemm")
    if gemm is None:
        raise NotMeasured("no products")
    cases = [(row, row["time_us"] * 1e-6) for curve in ("decode", "prefill") for row in raw.points.get(curve, [])]
    for curve in ("decode", "prefill"):
        raw.columns(curve, "time_us")
    start = np.log([ATTENTION_START[0], ATTENTION_START[1] * _copy_rate(raw), *ATTENTION_START[2:]])

    def model(x) -> AttentionModel:
        rate, kv, *others = map(float, np.exp(x))
        return rounded(AttentionModel(rate, rate, kv, 0.0, 0.5, *others))

    def seconds(rows, a: AttentionModel) -> np.ndarray:
        return np.array([attention_s(gemm, a, row) for row, _ in rows])

    apart = cases[1::4]
    kept = [case for i, case in enumerate(cases) if i % 4 != 1]
    measured = np.array([s for _, s in kept])
    found = model(least_squares(lambda x: seconds(kept, model(x)), start, measured))
    errors = {}
    for curve, key in (("decode", "context"), ("prefill", "length")):
        for title, part in (("fitted", kept), ("held out", apart)):
            mine = [case for case in part if key in case[0]]
            if mine:
                errors[f"{curve} attention, {title}"] = FitError.of(seconds(mine, found), np.array([s for _, s in mine]))
    return found, errors


def attention_s(gemm: GemmModel, a: AttentionModel, row: dict) -> float:
    """What a calibration with this model says of one measured case of decode or prefill, s."""
    c = Calibration("", "", gemm, a, ElementwiseModel(1.0, 0.0), HostModel(0.0, 0.0))
    shape = row["heads"], row["kv_heads"], row["head_dim"]
    q = row["sequences"]
    if "context" in row:
        return float(c.decode_s(q * row["context"], q, *shape))
    return c.prefill_s(np.zeros(q), np.full(q, row["length"]), *shape)


# ---------------------------------------------------------------- the rest
def _elementwise(raw: Raw, parts: dict) -> tuple[ElementwiseModel, dict[str, FitError]]:
    nbytes, us = raw.columns("pass", "moved_bytes", "time_us")
    model = fit_elementwise(nbytes, us * 1e-6)
    return model, {"passes over rows": FitError.of(model.floor_us * 1e-6 + nbytes / (model.gb_per_s * 1e9), us * 1e-6)}


def _host(raw: Raw, parts: dict) -> tuple[HostModel, dict[str, FitError]]:
    """launch_us: kernels' and products' mean; graph_us: of five kernels."""
    call, launch = raw.columns("launch", "call", "host_us")
    how, sync = raw.columns("sync", "how", "host_us")
    nodes, graph = raw.columns("graph", "nodes", "host_us")
    launched, polled, five = launch[np.isin(call, ("kernel", "product"))], sync[how == "poll"], graph[nodes == 5]
    if not (len(launched) == 2 and len(polled) and len(five)):
        raise NotMeasured("not all launches, graphs and waits")
    launch_us, graph_us = float(launched.mean()), float(five[0])
    return rounded(HostModel(launch_us, float(max(0.0, polled[0])), graph_us)), {}


def _calls(raw: Raw, parts: dict) -> tuple[CallsModel, dict[str, FitError]]:
    """op_us: what an op of the engine took of the host beyond its launches, in decode steps, mean of runs with and without graphs."""
    host = parts.get("host")
    if host is None:
        raise NotMeasured("no launches")
    ops, busy, kernels, products, replays = raw.columns("engine", "ops", "busy_s", "kernels", "products", "graph_replays")
    beyond = (1e6 * busy - host.launch_us * (kernels + products) - host.graph_us * replays) / ops
    return rounded(CallsModel(op_us=float(max(0.0, beyond.mean())))), {}


def _copies(raw: Raw, parts: dict) -> tuple[CopyModel, dict[str, FitError]]:
    """Each way: a time of one copy, and a rate."""
    way, nbytes, us = raw.columns("pinned", "way", "copied_bytes", "time_us")
    found, errors = {}, {}
    for name in ("to host", "to device"):
        here = way == name
        if here.sum() < 2:
            raise NotMeasured(f"copies {name}")
        found[name] = fit_elementwise(nbytes[here], us[here] * 1e-6)
        errors[f"copies {name}"] = FitError.of(found[name].floor_us * 1e-6 + nbytes[here] / (found[name].gb_per_s * 1e9), us[here] * 1e-6)
    down, up = found["to host"], found["to device"]
    return CopyModel(down.gb_per_s, up.gb_per_s, float(f"{(down.floor_us + up.floor_us) / 2:.4g}")), errors
