"""What one rank holds of the model, read from the weights file: nothing that it does not use."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from hpcmoe.config import ModelConfig
from hpcmoe.model.attention import Attention
from hpcmoe.model.dense import Norm, Rope
from hpcmoe.model.dtypes import to_fp32
from hpcmoe.model.experts import Expert


@dataclass
class Block:
    """The dense part of one layer, on leaders."""

    attn_norm: Norm
    attention: Attention
    ffn_norm: Norm
    router: object
    router_bias: np.ndarray | None


@dataclass
class Holdings:
    """A rank's share of the model: dense blocks by layer (leaders), experts by (layer, expert).

    embed [v, d] on leaders of the first stage; norm and head on those of the last.
    nbytes: bytes of weights in memory.
    """

    blocks: dict[int, Block] = field(default_factory=dict)
    experts: dict[tuple[int, int], Expert] = field(default_factory=dict)
    embed: np.ndarray | None = None
    norm: Norm | None = None
    head: object | None = None
    nbytes: int = 0


class Share(NamedTuple):
    """Which part of the model a rank holds: experts of (layers x experts); as a leader the dense tensors
    of its layers, with the embedding on the first stage, norm and head on the last."""

    layers: list[int]
    experts: list[int]
    leader: bool
    first: bool
    last: bool


def load(file, model: ModelConfig, backend, share: Share, context: int) -> Holdings:
    """Reads a rank's share and nothing else.

    file: an open WeightsFile; backend: what makes products (hpcmoe.linear); context: the longest
    sequence. Raises UserError as the file does.
    """
    held = Holdings()
    for layer in share.layers:
        for e in share.experts:
            held.experts[layer, e] = Expert(model.expert, backend, file.expert(layer, e))
            held.nbytes += held.experts[layer, e].nbytes
    if share.leader:
        rope = Rope(model.attention.rope, model.attention.head_dim, context)
        for layer in share.layers:
            held.blocks[layer] = _block(file.dense(layer), model, backend, rope)
            held.nbytes += file.dense_nbytes(layer)
        if share.first or share.last:
            _load_ends(held, file, model, backend, share.first, share.last)
    return held


def _load_ends(held: Holdings, file, model: ModelConfig, backend, first: bool, last: bool) -> None:
    stored = file.top("embed") if first or model.tied else None
    if first:
        held.embed = stored  # rows are widened when they are looked up
        held.nbytes += stored.nbytes
    if last:
        head = stored if model.tied else file.top("head")
        bias = to_fp32(file.top("head_bias")) if model.head_bias else None
        held.head = backend.linear(head, bias)
        held.norm = _norm(model, {"norm": file.top("norm"), **_optional(file, model)}, "norm")
        held.nbytes += held.head.nbytes


def _optional(file, model: ModelConfig) -> dict:
    return {"norm_bias": file.top("norm_bias")} if model.norm == "layer" else {}


def _norm(model: ModelConfig, tensors: dict, name: str) -> Norm:
    bias = to_fp32(tensors[name + "_bias"]) if model.norm == "layer" else None
    return Norm(model.norm, model.norm_eps, np.array(to_fp32(tensors[name])), bias)


def _block(t: dict, model: ModelConfig, backend, rope: Rope) -> Block:
    a = model.attention
    qkv = backend.linear(np.concatenate([t["q"], t["k"], t["v"]]), _qkv_bias(t) if a.bias else None)
    out = backend.linear(t["o"], to_fp32(t["o_bias"]) if a.out_bias else None)
    q_norm, k_norm = (Norm("rms", model.norm_eps, np.array(to_fp32(t[name]))) if a.qk_norm != "none" else None
                      for name in ("q_norm", "k_norm"))
    bias = np.array(to_fp32(t["router_bias"])) if model.router.bias else None
    return Block(_norm(model, t, "attn_norm"), Attention(a, qkv, out, rope, q_norm, k_norm),
                 _norm(model, t, "ffn_norm"), Router(t["router"]), bias)


def _qkv_bias(t: dict) -> np.ndarray:
    return np.concatenate([to_fp32(t[name]) for name in ("q_bias", "k_bias", "v_bias")])


class Router:
    """x_td -> logits [t, e] in fp32 whatever the run's dtype: a choice of experts must not be rounded."""

    def __init__(self, weight_ed):
        self.weight_de = np.ascontiguousarray(to_fp32(weight_ed).T)

    def __call__(self, x_td):
        return x_td @ self.weight_de
