"""The tiny models that the engine is compared on, and how their references are read.

Each case is a Hugging Face configuration with awkward sizes. `make_references.py` turns it into a
random model; the folder `references` holds one such set. A case's folder holds `hf` (a checkpoint
as `save_pretrained` writes it) and `reference.npz`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np

COMMITTED = os.path.join(os.path.dirname(os.path.abspath(__file__)), "references")
NEW_TOKENS = 32
PROMPT_LENGTHS = (1, 3, 8, 17)

_SMALL = {"vocab_size": 97, "num_hidden_layers": 2, "max_position_embeddings": 64, "bos_token_id": 1,
          "eos_token_id": 2, "pad_token_id": 0}
_HALF = 8  # pairs of a head of 16, for the LongRoPE case


def _rope(kind: str, theta: float = 1e4, **more) -> dict:
    return {"rope_type": kind, "rope_theta": theta, **more}


CASES: dict[str, dict] = {
    # 3 query heads that share one key head, 5 experts, top-3.
    "mixtral": {"model_type": "mixtral", "hidden_size": 24, "intermediate_size": 20,
                "num_attention_heads": 3, "num_key_value_heads": 1, "num_local_experts": 5,
                "num_experts_per_tok": 3, "rope_parameters": _rope("default")},
    # Tied, a window shorter than the prompts, heads wider than d / heads, two shards or more.
    "mixtral-tied-window": {"model_type": "mixtral", "hidden_size": 30, "intermediate_size": 18,
                            "num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": 10,
                            "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6,
                            "tie_word_embeddings": True, "hidden_act": "gelu", "num_hidden_layers": 3,
                            "rope_parameters": _rope("default", 1e6)},
    # One expert per token: the weight must be 1 after renormalising.
    "mixtral-top1": {"model_type": "mixtral", "hidden_size": 28, "intermediate_size": 12,
                     "num_attention_heads": 7, "num_key_value_heads": 7, "num_local_experts": 7,
                     "num_experts_per_tok": 1, "rope_parameters": _rope("linear", factor=2.5)},
    "olmoe": {"model_type": "olmoe", "hidden_size": 30, "intermediate_size": 14,
              "num_attention_heads": 3, "num_key_value_heads": 3, "num_experts": 5,
              "num_experts_per_tok": 3, "norm_topk_prob": False, "rope_parameters": _rope("default")},
    # Clamped q, k, v (the bound is met), biases, tied, Llama 3's rotary positions.
    "olmoe-clip": {"model_type": "olmoe", "hidden_size": 40, "intermediate_size": 14,
                   "num_attention_heads": 5, "num_key_value_heads": 1, "num_experts": 6,
                   "num_experts_per_tok": 2, "norm_topk_prob": True, "clip_qkv": 0.7,
                   "attention_bias": True, "tie_word_embeddings": True,
                   "hidden_act": "gelu_pytorch_tanh",
                   "rope_parameters": _rope("llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
                                            original_max_position_embeddings=16)},
    # The width of a head is not d / heads.
    "qwen3_moe": {"model_type": "qwen3_moe", "hidden_size": 26, "intermediate_size": 10,
                  "moe_intermediate_size": 16, "num_attention_heads": 3, "num_key_value_heads": 1,
                  "head_dim": 12, "num_experts": 5, "num_experts_per_tok": 3, "norm_topk_prob": True,
                  "tie_word_embeddings": True, "rope_parameters": _rope("default", 1e6)},
    "qwen3_moe-yarn": {"model_type": "qwen3_moe", "hidden_size": 24, "intermediate_size": 10,
                       "moe_intermediate_size": 11, "num_attention_heads": 6, "num_key_value_heads": 2,
                       "head_dim": 16, "num_experts": 9, "num_experts_per_tok": 4, "norm_topk_prob": False,
                       "attention_bias": True, "hidden_act": "relu",
                       "rope_parameters": _rope("yarn", factor=4.0, original_max_position_embeddings=16)},
    # LayerNorm with biases, biases on attention and head, SparseMixer.
    "phimoe": {"model_type": "phimoe", "hidden_size": 24, "intermediate_size": 20,
               "num_attention_heads": 3, "num_key_value_heads": 1, "num_local_experts": 5,
               "num_experts_per_tok": 2, "attention_bias": True, "lm_head_bias": True,
               "router_jitter_noise": 0.1, "rope_parameters": _rope("default")},
    # LongRoPE within the first training length; its factor on cos and sin is not 1.
    "phimoe-longrope": {"model_type": "phimoe", "hidden_size": 32, "intermediate_size": 12,
                        "num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 5,
                        "num_experts_per_tok": 2, "tie_word_embeddings": True, "sliding_window": 9,
                        "rope_parameters": _rope("longrope", original_max_position_embeddings=64,
                                                 short_factor=[1.0 + 0.1 * i for i in range(_HALF)],
                                                 long_factor=[2.0 + 0.5 * i for i in range(_HALF)],
                                                 short_mscale=1.2, long_mscale=1.3),
                        "max_position_embeddings": 128},
}


def hf_settings(name: str) -> dict:
    """The whole Hugging Face configuration of a case."""
    return {**_SMALL, **CASES[name]}


@dataclass(frozen=True)
class Reference:
    """What transformers computes, one prompt at a time, in fp32.

    folder: the checkpoint; prompts: token ids [n_p]; logits: [n_p, vocab] at every position of each
    prompt; tokens: [NEW_TOKENS] chosen greedily after each prompt, end tokens not heeded.
    """

    name: str
    folder: str
    prompts: list[np.ndarray]
    logits: list[np.ndarray]
    tokens: list[np.ndarray]


def names() -> list[str]:
    return list(CASES)


def load(name: str, root: str = COMMITTED) -> Reference:
    """A case's reference from `root`, a folder that make_references.py wrote."""
    with np.load(os.path.join(root, name, "reference.npz")) as data:
        count = len(PROMPT_LENGTHS)
        return Reference(name, os.path.join(root, name, "hf"), *(
            [data[f"{kind}_{i}"] for i in range(count)] for kind in ("prompt", "logits", "tokens")))
