"""Which tensors a model of a given configuration has: their names and shapes.

Names are those of the weights file and of the program alike. Weights are [out, in].
"""

from __future__ import annotations

import math

from hpcmoe.config import ModelConfig
from hpcmoe.errors import UserError, at

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
# Numbers that each kind of rotary positions needs besides theta; longrope's factors are lists.
ROPES = {"default": (), "linear": ("factor",),
         "llama3": ("factor", "original", "low_freq_factor", "high_freq_factor"),
         "yarn": ("factor", "original", "beta_fast", "beta_slow", "attention_factor"),
         "longrope": ("original", "short_mscale", "long_mscale")}
SCORES = ("softmax", "sigmoid", "sparsemixer")


def _norm(config: ModelConfig, name: str, width: int) -> dict[str, tuple[int, ...]]:
    both = {name: (width,)}
    if config.norm == "layer":
        both[name + "_bias"] = (width,)
    return both


def top_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Outside the layers: embed [v, d], norm [d], head [v, d] (absent where tied), their biases."""
    shapes = {"embed": (config.vocab, config.d)} | _norm(config, "norm", config.d)
    if not config.tied:
        shapes["head"] = (config.vocab, config.d)
    if config.head_bias:
        shapes["head_bias"] = (config.vocab,)
    return shapes


def dense_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """One layer's tensors apart from its routed experts.

    q [h * head_dim, d], k and v [kv_heads * head_dim, d], o [d, h * head_dim], router [e, d].
    """
    a, d = config.attention, config.d
    q, kv = a.heads * a.head_dim, a.kv_heads * a.head_dim
    shapes = _norm(config, "attn_norm", d)
    shapes |= {"q": (q, d), "k": (kv, d), "v": (kv, d), "o": (d, q)}
    if a.bias:
        shapes |= {"q_bias": (q,), "k_bias": (kv,), "v_bias": (kv,)}
    if a.out_bias:
        shapes["o_bias"] = (d,)
    if a.qk_norm == "head":
        shapes |= {"q_norm": (a.head_dim,), "k_norm": (a.head_dim,)}
    elif a.qk_norm == "full":
        shapes |= {"q_norm": (q,), "k_norm": (kv,)}
    shapes |= _norm(config, "ffn_norm", d)
    shapes["router"] = (config.router.experts, d)
    if config.router.bias:
        shapes["router_bias"] = (config.router.experts,)
    if config.expert.shared:
        wide = config.expert.shared_f
        if config.expert.gated:
            shapes["shared_gate"] = (wide, d)
        shapes |= {"shared_up": (wide, d), "shared_down": (d, wide)}
    return shapes


def expert_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """One routed expert, in the order of its slab: gate [f, d], up [f, d], down [d, f], biases."""
    f, d = config.expert.f, config.d
    shapes = {"gate": (f, d)} if config.expert.gated else {}
    shapes |= {"up": (f, d), "down": (d, f)}
    if config.expert.bias:
        shapes |= {name + "_bias": shape[:1] for name, shape in shapes.items()}
    return shapes


def check_model(config: ModelConfig, where: str) -> None:
    """UserError naming `where` and the first field that no model can have."""
    a, r, x = config.attention, config.router, config.expert
    sizes = {"vocab": config.vocab, "d": config.d, "layers": config.layers, "context": config.context,
             "attention.heads": a.heads, "attention.kv_heads": a.kv_heads,
             "attention.head_dim": a.head_dim, "router.experts": r.experts, "expert.f": x.f}
    for name, value in sizes.items():
        if value < 1:
            raise at(where, name, value, "an integer >= 1")
    if a.heads % a.kv_heads:
        raise at(where, "attention.kv_heads", a.kv_heads, f"a divisor of attention.heads = {a.heads}")
    if a.head_dim % 2:
        raise at(where, "attention.head_dim", a.head_dim, "an even number (rotary positions turn pairs)")
    if not 1 <= r.top_k <= r.experts:
        raise at(where, "router.top_k", r.top_k, f"1 to router.experts = {r.experts}")
    if r.groups < 1 or r.experts % r.groups or not 1 <= r.top_groups <= r.groups:
        raise at(where, "router.groups", r.groups, f"a divisor of router.experts = {r.experts}, "
                 f"with router.top_groups = {r.top_groups} of them")
    words = {"norm": (config.norm, ("rms", "layer")), "attention.qk_norm": (a.qk_norm, ("none", "head", "full")),
             "attention.rope.type": (a.rope.get("type"), ROPES), "expert.activation": (x.activation, ACTIVATIONS),
             "router.score": (r.score, SCORES), "router.over": (r.over, ("all", "selected"))}
    for name, (value, allowed) in words.items():
        if not isinstance(value, str) or value not in allowed:
            raise at(where, name, value, "one of " + ", ".join(allowed))
    _check_rope(a.rope, a.head_dim, where)
    for token in config.stop_ids:
        if not 0 <= token < config.vocab:
            raise at(where, "stop_ids", token, f"token ids below vocab = {config.vocab}")
    if not -1 <= config.bos_id < config.vocab:
        raise at(where, "bos_id", config.bos_id, f"-1, or a token id below vocab = {config.vocab}")


def _positive(value) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


def _check_rope(rope: dict, head_dim: int, where: str) -> None:
    for name in ("theta", *ROPES[rope["type"]]):
        if not _positive(rope.get(name)):
            raise UserError(f"{where}: attention.rope.{name} = {rope.get(name)!r}: expected a number > 0")
    if rope["type"] == "longrope":
        for name in ("short_factor", "long_factor"):
            value = rope.get(name)
            if not isinstance(value, list) or len(value) != head_dim // 2 or not all(map(_positive, value)):
                raise UserError(f"{where}: attention.rope.{name}: expected a list of {head_dim // 2} numbers > 0, "
                                "one for each pair of a head")


def parameters(config: ModelConfig) -> int:
    """Number of parameters of the whole model."""
    def count(shapes):
        return sum(math.prod(shape) for shape in shapes.values())

    layer = count(dense_shapes(config)) + config.router.experts * count(expert_shapes(config))
    return count(top_shapes(config)) + config.layers * layer
