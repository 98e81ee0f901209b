"""Makes the tiny random models and what Hugging Face transformers computes with them.

    python tests/parity/make_references.py --out tests/parity/references --seed 1

Needs transformers and torch (the extra `train`). Every parameter is random, norms and biases too.
A model is drawn again until no choice in it is a near tie, so that rounding decides nothing: the
best token leads by GAP in the logits, and so does the last expert taken over the first one left.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys

import numpy as np
import torch
import transformers

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from cases import NEW_TOKENS, PROMPT_LENGTHS, hf_settings, names  # noqa: E402

TOKEN_GAP = 1e-3    # in logits whose standard deviation is about 3
ROUTER_GAP = 1e-4   # in router logits whose standard deviation is about 1.5
SHARD = {"mixtral-tied-window": "40KB", "qwen3_moe-yarn": "30KB"}


def build(name: str, seed: int):
    """A random fp32 model of a case, in its eager (plain) implementation."""
    settings = hf_settings(name)
    config = transformers.AutoConfig.for_model(**settings)
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, value in model.named_parameters():
            normal = torch.randn(value.shape, generator=draw)
            if "norm" in key and key.endswith("weight"):
                value.copy_(1.0 + 0.3 * normal)
            elif value.ndim == 1:
                value.copy_(0.3 * normal)
            elif "embed" in key or "lm_head" in key:
                value.copy_(normal * 3.0 / value.shape[-1] ** 0.5)
            else:
                value.copy_(normal * 1.5 / value.shape[-1] ** 0.5)
    return model


def router_gap(name: str, settings: dict, router_logits) -> float:
    """The smallest lead of the last expert taken over the best one left, over all rows and layers."""
    smallest = np.inf
    for layer in router_logits:
        logit_te = layer.reshape(-1, layer.shape[-1]).numpy()
        ranked = -np.sort(-logit_te, axis=1)
        k = settings["num_experts_per_tok"]
        smallest = min(smallest, (ranked[:, :-1] - ranked[:, 1:])[:, :k].min())
        if settings["model_type"] == "phimoe":  # its mask is a comparison too
            limit = 2 * settings.get("router_jitter_noise", 0.01)
            for best in (ranked[:, :1], ranked[:, 1:2]):
                far = (best - logit_te) / np.maximum(np.abs(logit_te), best)
                smallest = min(smallest, np.abs(far - limit).min())
    return float(smallest)


def reference(name: str, model, seed: int) -> tuple[dict, float, float]:
    """(arrays of reference.npz, smallest lead of a token, of an expert); no cache, no padding."""
    settings = hf_settings(name)
    draw = np.random.default_rng(seed)
    arrays, token_gap, expert_gap = {}, np.inf, np.inf
    for i, length in enumerate(PROMPT_LENGTHS):
        prompt = draw.integers(3, settings["vocab_size"], length)
        sequence = torch.tensor(prompt)[None]
        with torch.no_grad():
            for step in range(NEW_TOKENS):
                out = model(sequence, use_cache=False, output_router_logits=True)
                if step == 0:
                    arrays[f"logits_{i}"] = out.logits[0].numpy().astype(np.float32)
                expert_gap = min(expert_gap, router_gap(name, settings, out.router_logits))
                two = out.logits[0, -1].topk(2)
                token_gap = min(token_gap, float(two.values[0] - two.values[1]))
                sequence = torch.cat([sequence, two.indices[None, :1]], dim=1)
        arrays[f"prompt_{i}"] = prompt.astype(np.int32)
        arrays[f"tokens_{i}"] = sequence[0, length:].numpy().astype(np.int32)
    return arrays, token_gap, expert_gap


def make(name: str, out: str, seed: int) -> str:
    """Writes one case under `out`; returns a line about it."""
    for attempt in range(100):
        draw = seed * 1000 + attempt
        model = build(name, draw)
        arrays, token_gap, expert_gap = reference(name, model, draw)
        distinct = len({int(t) for i in range(len(PROMPT_LENGTHS)) for t in arrays[f"tokens_{i}"]})
        if token_gap > TOKEN_GAP and expert_gap > ROUTER_GAP and distinct > 8:
            break
    else:
        raise SystemExit(f"{name}: no model without near ties in 100 draws")
    folder = os.path.join(out, name)
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(os.path.join(folder, "hf"), max_shard_size=SHARD.get(name, "5GB"))
    np.savez(os.path.join(folder, "reference.npz"), **arrays)
    spread = np.concatenate([arrays[f"logits_{i}"].ravel() for i in range(len(PROMPT_LENGTHS))]).std()
    return (f"{name}: draw {draw}, logits' deviation {spread:.2f}, least lead of a token {token_gap:.4f}, "
            f"of an expert {expert_gap:.5f}, {distinct} distinct tokens")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder to write; one sub-folder for each case")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cases", nargs="*", default=names(), choices=names())
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for name in args.cases:
        print(make(name, args.out, args.seed), flush=True)


if __name__ == "__main__":
    main()
