"""Hugging Face model families: their configuration -> ModelConfig, their tensor names -> ours.

Pure functions of plain data, no files. What is not supported is refused by name here, before a
byte is converted. Sources: the families' model cards and papers, and the configuration fields of
transformers (Mixtral arXiv 2401.04088, OLMoE 2409.02060, Qwen3 2505.09388, Phi-3.5-MoE 2404.14219).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Mapping

from hpcmoe.config import AttentionConfig, ExpertConfig, ModelConfig, RouterConfig
from hpcmoe.errors import UserError, at
from hpcmoe.model.tensors import check_model

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh",
               "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}

# Options that change what a model computes; their neutral values; any other value is refused.
NEUTRAL = {
    "quantization_config": (None,),
    "compression_config": (None,),
    "partial_rotary_factor": (None, 1, 1.0),
    "final_logit_softcapping": (None, 0, 0.0),
    "attn_logit_softcapping": (None, 0, 0.0),
    "embedding_multiplier": (None, 1, 1.0),
    "attention_multiplier": (None,),
    "residual_multiplier": (None, 1, 1.0),
    "logits_scaling": (None, 1, 1.0),
    "n_shared_experts": (None, 0),
    "num_shared_experts": (None, 0),
    "shared_expert_intermediate_size": (None, 0),
    "n_group": (None, 1),
    "first_k_dense_replace": (None, 0),
    "num_nextn_predict_layers": (None, 0),
    "is_encoder_decoder": (None, False),
    "add_cross_attention": (None, False),
}


@dataclass(frozen=True)
class Family:
    """What distinguishes a family; `architecture` is the class whose checkpoints it reads.

    experts, f: names of the fields with the number of experts and their width. neutral: options
    of this family that are refused unless they have one of the values given.
    """

    architecture: str
    experts: str
    f: str
    neutral: Mapping[str, tuple]


FAMILIES: dict[str, Family] = {
    "mixtral": Family("MixtralForCausalLM", "num_local_experts", "intermediate_size",
                      {"attention_bias": (None, False)}),
    "olmoe": Family("OlmoeForCausalLM", "num_experts", "intermediate_size",
                    {"sliding_window": (None,)}),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", "num_experts", "moe_intermediate_size",
                        {"mlp_only_layers": (None, []), "decoder_sparse_step": (None, 1),
                         "use_sliding_window": (None, False)}),
    "phimoe": Family("PhiMoEForCausalLM", "num_local_experts", "intermediate_size",
                     {"num_experts_per_tok": (2,)}),
}


class _Fields:
    """A configuration dict whose fields are read with type and file in the errors."""

    def __init__(self, data: Mapping[str, Any], where: str):
        self.data, self.where = data, where

    def get(self, name: str, kind: type, default=None):
        value = self.data.get(name)
        if value is None:
            if default is None:
                raise UserError(f"{self.where}: {name} is missing")
            return default
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind or (kind is float and not math.isfinite(value)):
            words = {int: "an integer", float: "a number", bool: "true or false"}
            raise at(self.where, name, value, words[kind])
        return value

    def positive(self, name: str, kind: type, default=None):
        value = self.get(name, kind, default)
        if value <= 0:
            raise at(self.where, name, value, "a number > 0")
        return value

    def error(self, name: str, expected: str) -> UserError:
        return at(self.where, name, self.data.get(name), expected)


def family_of(hf: Mapping[str, Any], where: str) -> str:
    """The family's name (`model_type`). UserError for one that is not supported."""
    name = hf.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise at(where, "model_type", name, "a supported family: " + ", ".join(sorted(FAMILIES)))
    wanted = FAMILIES[name].architecture
    found = hf.get("architectures") or [wanted]
    for architecture in found if isinstance(found, list) else [found]:
        if str(architecture).lower() != wanted.lower():
            raise at(where, "architectures", architecture, f"{wanted} (a language model with its head)")
    return name


def model_config(hf: Mapping[str, Any], where: str, generation: Mapping[str, Any] | None = None,
                 bos_id: int = -1) -> ModelConfig:
    """The ModelConfig of a Hugging Face config.json.

    where: the file, for errors; generation: generation_config.json, whose end tokens go before
    those of config.json; bos_id: token that the tokenizer puts before a text, -1 for none.
    Raises UserError naming the field for anything missing, malformed or not supported.
    """
    name = family_of(hf, where)
    family, fields = FAMILIES[name], _Fields(hf, where)
    for option, allowed in {**NEUTRAL, **family.neutral}.items():
        value = hf.get(option)
        if not any(value == good and type(value) is type(good) for good in allowed):
            raise UserError(f"{where}: {option} = {value!r}: not supported in family {name}"
                            + (f"; supported: {allowed[-1]!r}" if allowed[-1] is not None else ""))
    kinds = hf.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        raise at(where, "layer_types", kinds, "a list of full_attention only")
    config = ModelConfig(
        family=name, vocab=fields.get("vocab_size", int), d=fields.get("hidden_size", int),
        layers=fields.get("num_hidden_layers", int), attention=_attention(fields, name),
        router=_router(fields, name, family), expert=_expert(fields, family),
        context=fields.get("max_position_embeddings", int),
        norm="layer" if name == "phimoe" else "rms",
        norm_eps=fields.get("rms_norm_eps", float, 1e-6 if name == "qwen3_moe" else 1e-5),
        tied=fields.get("tie_word_embeddings", bool, False),
        head_bias=name == "phimoe" and fields.get("lm_head_bias", bool, False),
        stop_ids=_stop_ids(hf, generation, where), bos_id=bos_id)
    check_model(config, where)
    if name == "olmoe" and config.attention.heads * config.attention.head_dim != config.d:
        raise fields.error("head_dim", "hidden_size / num_attention_heads (its norm spans all heads)")
    return config


def _window(hf: Mapping[str, Any], name: str) -> int:
    """Sliding window in tokens, the row itself among them; 0: none."""
    return (hf.get("sliding_window") or 0) if name in ("mixtral", "phimoe") else 0


def _attention(fields: _Fields, name: str) -> AttentionConfig:
    heads = fields.get("num_attention_heads", int)
    if heads < 1:
        raise fields.error("num_attention_heads", "an integer >= 1")
    d = fields.get("hidden_size", int)
    if fields.data.get("head_dim") is None and d % heads:
        raise fields.error("hidden_size", f"a multiple of num_attention_heads = {heads}, or a head_dim")
    window = _window(fields.data, name)
    if type(window) is not int or window < 0:
        raise fields.error("sliding_window", "an integer >= 1, or null")
    bias = name != "mixtral" and fields.get("attention_bias", bool, False)
    return AttentionConfig(
        heads=heads, kv_heads=fields.get("num_key_value_heads", int, heads),
        head_dim=fields.get("head_dim", int, d // heads), bias=bias, out_bias=bias,
        qk_norm={"olmoe": "full", "qwen3_moe": "head"}.get(name, "none"),
        clip_qkv=fields.get("clip_qkv", float, 0.0) if name == "olmoe" else 0.0,
        window=window, rope=_rope(fields, name))


def _router(fields: _Fields, name: str, family: Family) -> RouterConfig:
    experts = fields.get(_either(fields, family.experts), int)
    top_k = fields.get("num_experts_per_tok", int)
    if name == "phimoe":
        return RouterConfig(experts, top_k, score="sparsemixer", renormalise=False,
                            jitter=fields.get("router_jitter_noise", float, 0.01))
    # Mixtral always renormalises; the others say so, and do not unless they do.
    renormalise = name == "mixtral" or fields.get("norm_topk_prob", bool, False)
    return RouterConfig(experts, top_k, renormalise=renormalise)


def _either(fields: _Fields, experts: str) -> str:
    """Some writers of configurations use the other of the two usual names."""
    if fields.data.get(experts) is None:
        return "num_experts" if experts == "num_local_experts" else "num_local_experts"
    return experts


def _expert(fields: _Fields, family: Family) -> ExpertConfig:
    act = fields.data.get("hidden_act", "silu")
    if not isinstance(act, str) or act not in ACTIVATIONS:
        raise fields.error("hidden_act", "one of " + ", ".join(ACTIVATIONS))
    return ExpertConfig(f=fields.get(family.f, int), activation=ACTIVATIONS[act])


def _stop_ids(hf: Mapping, generation: Mapping | None, where: str) -> tuple[int, ...]:
    found = (generation or {}).get("eos_token_id")
    found = hf.get("eos_token_id") if found is None else found
    if found is None:
        return ()
    ids = found if isinstance(found, list) else [found]
    if not all(type(i) is int for i in ids):
        raise at(where, "eos_token_id", found, "a token id or a list of them")
    return tuple(ids)


# ---------------------------------------------------------------- rotary positions
def _rope(fields: _Fields, name: str) -> dict:
    """The rope table of AttentionConfig, from `rope_parameters` or `rope_theta` + `rope_scaling`.

    Keys: type, theta; linear: factor; llama3: factor, low_freq_factor, high_freq_factor, original;
    yarn: factor, original, beta_fast, beta_slow, truncate, attention_factor; longrope: original,
    short_factor, long_factor, short_mscale, long_mscale. `original`: context of the first training.
    """
    hf = fields.data
    which = "rope_parameters" if hf.get("rope_parameters") else "rope_scaling"
    table = _Fields(hf.get(which) or {}, f"{fields.where}: {which}")
    if not isinstance(table.data, Mapping):
        raise fields.error(which, "a table")
    kind = table.data.get("rope_type", table.data.get("type", "default"))
    default = {"mixtral": 1e6, "phimoe": 1e6}.get(name, 1e4)
    theta = table.positive("rope_theta", float, fields.positive("rope_theta", float, default))
    if table.data.get("partial_rotary_factor", 1.0) != 1.0:
        raise table.error("partial_rotary_factor", "1.0")
    rope: dict[str, Any] = {"type": kind, "theta": theta}
    if kind == "default":
        return rope
    if kind not in ("linear", "llama3", "yarn", "longrope"):
        raise UserError(f"{fields.where}: {which}: rope type {kind!r} is not supported: "
                        "expected default, linear, llama3, yarn or longrope")
    if kind != "linear":
        context = fields.positive("max_position_embeddings", int)
        name_ = "original_max_position_embeddings"
        rope["original"] = table.positive(name_, int, fields.positive(name_, int, context))
    if kind == "longrope":
        return rope | _longrope(fields, table, rope["original"], name)
    if kind != "yarn" or table.data.get("factor") is not None:
        rope["factor"] = table.positive("factor", float)
    if kind == "llama3":
        rope |= {key: table.positive(key, float) for key in ("low_freq_factor", "high_freq_factor")}
        if rope["low_freq_factor"] >= rope["high_freq_factor"]:
            raise table.error("low_freq_factor", f"less than high_freq_factor = {rope['high_freq_factor']}")
    if kind == "yarn":
        rope |= _yarn(fields, table, rope)
    return rope


def _yarn(fields: _Fields, table: _Fields, rope: dict) -> dict:
    """arXiv 2309.00071; the factor on cos and sin, 0.1 ln(factor) + 1, as transformers resolves it."""
    factor = rope.get("factor") or fields.get("max_position_embeddings", int) / rope["original"]

    def mscale(m: float) -> float:
        return 0.1 * m * math.log(factor) + 1.0 if factor > 1 else 1.0

    both = [table.get(key, float, 0.0) for key in ("mscale", "mscale_all_dim")]
    resolved = mscale(both[0]) / mscale(both[1]) if all(both) else mscale(1.0)
    return {"factor": factor, "beta_fast": table.positive("beta_fast", float, 32.0),
            "beta_slow": table.positive("beta_slow", float, 1.0), "truncate": table.get("truncate", bool, True),
            "attention_factor": table.positive("attention_factor", float, resolved)}


def _longrope(fields: _Fields, table: _Fields, original: int, name: str) -> dict:
    """arXiv 2402.13753; the factors on cos and sin are Phi-3.5-MoE's own where given."""
    wide = fields.get("hidden_size", int) // fields.positive("num_attention_heads", int)
    half = fields.positive("head_dim", int, wide) // 2
    if original < 2:
        raise table.error("original_max_position_embeddings", "an integer >= 2")
    found: dict[str, Any] = {}
    for key in ("short_factor", "long_factor"):
        value = table.data.get(key)
        if not isinstance(value, list) or len(value) != half \
                or not all(type(x) in (int, float) and 0 < x < math.inf for x in value):
            raise table.error(key, f"a list of {half} numbers > 0, one for each pair of a head")
        found[key] = [float(x) for x in value]
    factor = table.positive("factor", float, fields.get("max_position_embeddings", int) / original)
    usual = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    usual = table.positive("attention_factor", float, usual)
    for key in ("short_mscale", "long_mscale"):
        found[key] = table.positive(key, float, None if name == "phimoe" else usual)
    return found


# ---------------------------------------------------------------- random models
def random_config(family: str, **geometry: int) -> ModelConfig:
    """ModelConfig of a family with any geometry, for `weights create`.

    geometry: layers, d, f, experts, top_k, heads, kv_heads, head_dim (0: d / heads), vocab, context,
    tied. Raises UserError naming the option that does not fit.
    """
    g = dict(geometry)
    hf = {"model_type": family, "vocab_size": g["vocab"], "hidden_size": g["d"],
          "num_hidden_layers": g["layers"], "num_attention_heads": g["heads"],
          "num_key_value_heads": g["kv_heads"], "head_dim": g["head_dim"] or None,
          FAMILIES[family].experts: g["experts"], FAMILIES[family].f: g["f"],
          "num_experts_per_tok": g["top_k"], "max_position_embeddings": g["context"],
          "tie_word_embeddings": bool(g["tied"])}
    return model_config(hf, f"weights create --family {family}")
