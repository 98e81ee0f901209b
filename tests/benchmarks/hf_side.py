"""Hugging Face transformers, as the benchmark drives it: one process, as many torch threads as cores."""

from __future__ import annotations

import gc
import sys
import time
from multiprocessing.connection import Client

import numpy as np
import torch
import transformers
from transformers import DynamicCache, MixtralConfig, MixtralForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from hpcmoe import memory
from hpcmoe.config import ModelConfig, ThroughputJob
from hpcmoe.data.requests import synthetic_requests
from hpcmoe.data.weights import WeightsFile
from workloads import SEED, Workload

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
GPU_ONLY = ("deepgemm", "sonicmoe", "fp8")  # of the expert implementations


class Model:
    """The model with the same weights, and the state of the workload in progress."""

    def __init__(self, weights: str):
        self.weights = weights

    def load(self, dtype: str, threads: int) -> dict:
        """Reads the weights; says what is compared with, and the expert implementations there are."""
        torch.set_num_threads(threads)
        self.model = None
        gc.collect()
        with WeightsFile(self.weights) as file:
            self.config = file.config
            self.model = _model(self.config)
            _fill(self.model, file)
        self.model.to(DTYPES[dtype]).eval()
        self.dtype = dtype
        names = ["eager"] + [n for n in ALL_EXPERTS_FUNCTIONS.keys() if not any(part in n for part in GPU_ONLY)]
        return {"transformers": transformers.__version__, "torch": torch.__version__, "implementations": names,
                "attention": self.model.config._attn_implementation}

    # ------------------------------------------------------------ a workload
    def fits(self, name: str, w: Workload) -> str:
        """"" where an implementation can run this workload here, else why not."""
        if name != "batched_mm":
            return ""
        rows = w.rows * self.config.router.top_k  # it copies an expert's weights for every row
        need = rows * 3 * self.config.d * self.config.expert.f * DTYPES[self.dtype].itemsize
        if need > 0.7 * memory.available():
            return f"needs {need / 1e9:,.0f} GB"
        return ""

    @torch.inference_mode()
    def start(self, w: Workload, prefill_with: str, given: list) -> list:
        """Prompts, then the warm-up steps with the given tokens [step][sequence]; the logits [sequence, v] of each."""
        self.w = w
        sets = 1 if not w.prefill else 1 + w.warm
        prompts = synthetic_requests(ThroughputJob(w.sequences * sets, w.prompt, 1, SEED), self.config)
        ids = np.stack([r.tokens for r in prompts[:w.sequences]]).astype(np.int64)
        self.ids, self.cache = torch.from_numpy(ids), None
        self.model.set_experts_implementation(prefill_with)
        logits = [self._prefill()]
        if not w.prefill:
            for token_q in given:
                logits.append(self._decode(torch.from_numpy(np.asarray(token_q))[:, None]))
            self.token = logits[-1].argmax(-1)[:, None]
        return [part.float().numpy() for part in logits]

    @torch.inference_mode()
    def attempt(self, name: str) -> float | str:
        """Seconds of a step with an expert implementation, the best of two after a first one; the cache is as before afterwards.

        A text where the implementation does not run on this machine.
        """
        try:
            self.model.set_experts_implementation(name)
            return self._attempt()
        except (ImportError, RuntimeError, NotImplementedError) as error:
            return f"does not run here: {error}".splitlines()[0]

    def _attempt(self) -> float:
        token, seconds = getattr(self, "token", None), []
        for _ in range(3):
            start = time.perf_counter()
            self._step()
            seconds.append(time.perf_counter() - start)
            if not self.w.prefill:
                self.cache.crop(-1)
                self.token = token
        return min(seconds[1:])

    @torch.inference_mode()
    def go(self, name: str, steps: int) -> float:
        """Seconds of so many steps."""
        self.model.set_experts_implementation(name)
        start = time.perf_counter()
        for _ in range(steps):
            self._step()
        return time.perf_counter() - start

    def _step(self) -> None:
        if self.w.prefill:
            self._prefill().argmax(-1)
        else:
            self.token = self._decode(self.token).argmax(-1)[:, None]

    def _prefill(self):
        self.cache = DynamicCache()
        return self.model(self.ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits[:, -1]

    def _decode(self, token):
        return self.model(token, past_key_values=self.cache, use_cache=True).logits[:, -1]

    def forget(self) -> None:
        """Gives a workload's memory back."""
        self.cache = None
        gc.collect()


def _model(c: ModelConfig) -> MixtralForCausalLM:
    a = c.attention
    return MixtralForCausalLM(MixtralConfig(
        vocab_size=c.vocab, hidden_size=c.d, intermediate_size=c.expert.f, num_hidden_layers=c.layers,
        num_attention_heads=a.heads, num_key_value_heads=a.kv_heads, head_dim=a.head_dim,
        num_local_experts=c.router.experts, num_experts_per_tok=c.router.top_k, rms_norm_eps=c.norm_eps,
        max_position_embeddings=c.context, sliding_window=a.window or None, tie_word_embeddings=c.tied,
        rope_parameters={"rope_type": "default", "rope_theta": a.rope["theta"]}))


@torch.no_grad()
def _fill(model: MixtralForCausalLM, file: WeightsFile) -> None:
    """The weights of the file, in place."""
    def put(parameter, array):
        parameter.copy_(torch.from_numpy(np.array(array)))

    put(model.model.embed_tokens.weight, file.top("embed"))
    put(model.model.norm.weight, file.top("norm"))
    put(model.lm_head.weight, file.top("head"))
    for number, layer in enumerate(model.model.layers):
        dense = file.dense(number)
        for name in "qkvo":
            put(getattr(layer.self_attn, f"{name}_proj").weight, dense[name])
        put(layer.input_layernorm.weight, dense["attn_norm"])
        put(layer.post_attention_layernorm.weight, dense["ffn_norm"])
        put(layer.mlp.gate.weight, dense["router"])
        for e in range(file.config.router.experts):
            expert = file.expert(number, e)
            put(layer.mlp.experts.gate_up_proj[e], np.concatenate([expert["gate"], expert["up"]]))
            put(layer.mlp.experts.down_proj[e], expert["down"])


def main() -> int:
    line = Client(sys.argv[1], family="AF_UNIX")
    line.send("hf")
    model = Model(sys.argv[2])
    while True:
        name, *args = line.recv()
        if name == "end":
            return 0
        line.send(getattr(model, name)(*args))


if __name__ == "__main__":
    main()
