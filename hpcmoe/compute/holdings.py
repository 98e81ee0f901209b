"""What one rank holds of the model, read from the weights file: nothing that it does not use."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from hpcmoe.config import ModelConfig
from hpcmoe.model.attention import Attention
from hpcmoe.model.copies import Copies
from hpcmoe.model.dense import Norm, Rope
from hpcmoe.model.dtypes import to_fp32
from hpcmoe.model.experts import Expert, pattern
from hpcmoe.model.shard import Shard
from hpcmoe.model.tensors import expert_shapes


@dataclass
class Block:
    """The dense part of one layer, on leaders; no attention on a tensor shard without heads. nbytes: of its weights in memory."""

    attn_norm: Norm
    attention: Attention | None
    ffn_norm: Norm
    router: "Router"
    router_bias: np.ndarray | None

    @property
    def nbytes(self) -> int:
        a = self.attention
        norms = [self.attn_norm, self.ffn_norm] + ([n for n in (a.q_norm, a.k_norm) if n] if a else [])
        small = [x for norm in norms for x in (norm.weight_d, norm.bias_d)] + [self.router_bias]
        products = a.qkv.nbytes + a.out.nbytes if a else 0
        return products + self.router.weight_de.nbytes + sum(x.nbytes for x in small if x is not None)


@dataclass
class Holdings:
    """A rank's share of the model: dense blocks by layer (leaders), experts by (layer, slot).

    embed [v, d] on leaders of the first stage; norm and head on those of the last. spares: memory of experts that
    weights of others come into (Share.spares). nbytes: bytes of weights in memory.
    """

    blocks: dict[int, Block] = field(default_factory=dict)
    experts: dict[tuple[int, int], Expert] = field(default_factory=dict)
    embed: np.ndarray | None = None
    norm: Norm | None = None
    head: object | None = None
    spares: list[Expert] = field(default_factory=list)
    nbytes: int = 0


class Share(NamedTuple):
    """Which part of the model a rank holds: the experts in (layers x slots); as a leader the dense tensors
    of its layers, with the embedding on the first stage, norm and head on the last. shard: which tensor shard of it.
    expert_ls: the expert in every slot of every layer, None where slots are experts; number: of this leader in its stage; spares: experts that there is memory for besides, for weights that come from other ranks."""

    layers: list[int]
    slots: list[int]
    leader: bool
    first: bool
    last: bool
    shard: Shard
    expert_ls: np.ndarray | None = None
    number: int = 0
    spares: int = 0

    def expert(self, layer: int, slot: int) -> int:
        return slot if self.expert_ls is None else int(self.expert_ls[layer, slot])

    def copies(self, layer: int, experts: int) -> Copies:
        return Copies(np.arange(experts) if self.expert_ls is None else self.expert_ls[layer], experts)


def load(file, model: ModelConfig, backend, share: Share, context: int) -> Holdings:
    """Reads a rank's share and nothing else.

    file: an open WeightsFile; backend: what makes products (hpcmoe.linear); context: the longest
    sequence. Raises UserError as the file does.
    """
    held = Holdings()
    for layer in share.layers:
        for slot in share.slots:
            held.experts[layer, slot] = Expert(model.expert, backend, file.expert(layer, share.expert(layer, slot)))
            held.nbytes += held.experts[layer, slot].nbytes
    if share.spares:
        first = pattern(model.expert, backend, expert_shapes(model))
        held.spares = [first] + [first.clone() for _ in range(share.spares - 1)]
        held.nbytes += sum(spare.nbytes for spare in held.spares)
    if share.leader:
        rope = Rope(model.attention.rope, model.attention.head_dim, context)
        for layer in share.layers:
            held.blocks[layer] = _block(file.dense(layer), model, backend, rope, share.shard)
            held.nbytes += held.blocks[layer].nbytes
        if share.first or share.last:
            _load_ends(held, file, model, backend, share)
    return held


def _load_ends(held: Holdings, file, model: ModelConfig, backend, share: Share) -> None:
    stored = file.top("embed") if share.first or model.tied else None
    if share.first:
        held.embed = stored  # rows are widened when they are looked up
        held.nbytes += stored.nbytes
    if share.last:
        head = stored if model.tied else file.top("head")
        bias = to_fp32(file.top("head_bias"))[share.shard.vocab] if model.head_bias else None
        held.head = backend.linear(head, bias)
        held.norm = _norm(model, {"norm": file.top("norm"), **_optional(file, model)}, "norm")
        held.nbytes += held.head.nbytes + sum(a.nbytes for a in (held.norm.weight_d, held.norm.bias_d) if a is not None)


def _optional(file, model: ModelConfig) -> dict:
    return {"norm_bias": file.top("norm_bias")} if model.norm == "layer" else {}


def _norm(model: ModelConfig, tensors: dict, name: str) -> Norm:
    bias = to_fp32(tensors[name + "_bias"]) if model.norm == "layer" else None
    return Norm(model.norm, model.norm_eps, np.array(to_fp32(tensors[name])), bias)


def _block(t: dict, model: ModelConfig, backend, rope: Rope, shard: Shard) -> Block:
    a, attention = model.attention, None
    if a.heads:
        attention = _attention(t, model, backend, rope, shard)
    bias = np.array(to_fp32(t["router_bias"])) if model.router.bias else None
    return Block(_norm(model, t, "attn_norm"), attention, _norm(model, t, "ffn_norm"), Router(t["router"]), bias)


def _attention(t: dict, model: ModelConfig, backend, rope: Rope, shard: Shard) -> Attention:
    a = model.attention
    qkv = backend.linear(np.concatenate([t["q"], t["k"], t["v"]]), _qkv_bias(t) if a.bias else None)
    # what shards make is summed: the bias once, by the last one, which has heads in any case
    out = backend.linear(t["o"], to_fp32(t["o_bias"]) if a.out_bias and shard.number == shard.count - 1 else None)
    q_norm, k_norm = (Norm("rms", model.norm_eps, np.array(to_fp32(t[name]))) if a.qk_norm != "none" else None
                      for name in ("q_norm", "k_norm"))
    return Attention(a, qkv, out, rope, q_norm, k_norm)


def _qkv_bias(t: dict) -> np.ndarray:
    return np.concatenate([to_fp32(t[name]) for name in ("q_bias", "k_bias", "v_bias")])


class Router:
    """x_td -> logits [t, e] in fp32 whatever the run's dtype: a choice of experts must not be rounded."""

    def __init__(self, weight_ed):
        self.weight_de = np.ascontiguousarray(to_fp32(weight_ed).T)

    def __call__(self, x_td):
        return x_td @ self.weight_de
