"""PyTorch and Hugging Face transformers at the same sizes on the same GPU: a program of its own.

Reads one job as JSON from standard input and writes one JSON object as the last line of standard
output. It imports nothing of hpcmoe, so that any Python that has torch can run it.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time

import torch

KINDS = {"fp16": torch.float16, "bf16": torch.bfloat16}
RING_BYTES = 512 << 20
CAPTURED = ("torch_bmm_ms", "torch_grouped_mm_ms")  # what never asks the host; others could not be graphs
FAULTS = (RuntimeError, NotImplementedError, ImportError, ValueError)  # out of memory is a RuntimeError


def main() -> int:
    job = json.load(sys.stdin)
    with torch.inference_mode():
        found = JOBS[job["what"]](job)
    print(json.dumps({"torch": torch.__version__, **found}))
    return 0


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


# ---------------------------------------------------------------- time
def time_ms(calls: list, seconds: float, graphs: bool) -> float:
    """Milliseconds of one of these calls, in turn: median; queued one after the other or (graphs) as a graph, whichever is faster."""
    for call in calls:
        call()
    if device() == "cpu":
        return _median(lambda: [call() for call in calls], seconds, len(calls), time.perf_counter)
    torch.cuda.synchronize()
    found = [_median(lambda: [call() for call in calls], seconds, len(calls), None)]
    if graphs:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        found.append(_median(graph.replay, seconds, len(calls), None))
    return min(found)


def _median(run, seconds: float, count: int, clock) -> float:
    spans, end = [], time.perf_counter() + seconds
    while len(spans) < 5 or (time.perf_counter() < end and len(spans) < 200):
        if clock:
            start = clock()
            run()
            spans.append(1e3 * (clock() - start) / count)
            continue
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        run()
        last.record()
        last.synchronize()
        spans.append(first.elapsed_time(last) / count)
    return statistics.median(spans)


# ---------------------------------------------------------------- one expert
def experts(job: dict) -> dict:
    """One expert (hidden d, width f) at several row counts: torch's grouped and batched products, transformers' experts."""
    d, f, seconds = job["d"], job["f"], job["seconds"]
    kind = KINDS[job["dtype"]]
    copies = max(2, min(8, math.ceil(RING_BYTES / (6 * d * f))))
    both = [torch.randn(1, 2 * f, d, device=device(), dtype=kind) / d**0.5 for _ in range(copies)]
    down = [torch.randn(1, d, f, device=device(), dtype=kind) / f**0.5 for _ in range(copies)]
    points, notes = [], []
    for rows in job["rows"]:
        x_td = torch.randn(rows, d, device=device(), dtype=kind)
        point = {"rows": rows}
        for name, calls in _implementations(x_td, both, down, job).items():
            try:
                point[name] = time_ms(calls, seconds, graphs=name in CAPTURED)
            except FAULTS as error:
                notes.append(f"{name}, {rows} rows: {type(error).__name__}: {str(error).splitlines()[0][:160]}")
        points.append(point)
    return {"points": points, "notes": notes, "transformers": _transformers_version()}


def _implementations(x_td, both, down, job: dict) -> dict:
    silu = torch.nn.functional.silu
    grouped = getattr(torch.nn.functional, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
    offs = torch.tensor([len(x_td)], device=device(), dtype=torch.int32)

    def by_grouped(b, w):
        gate, up = grouped(x_td, b.transpose(1, 2), offs=offs).chunk(2, -1)
        return grouped(silu(gate) * up, w.transpose(1, 2), offs=offs)

    def by_bmm(b, w):
        gate, up = torch.bmm(x_td[None], b.transpose(1, 2)).chunk(2, -1)
        return torch.bmm(silu(gate) * up, w.transpose(1, 2))

    found = {"torch_bmm_ms": [lambda b=b, w=w: by_bmm(b, w) for b, w in zip(both, down)]}
    if grouped:
        found["torch_grouped_mm_ms"] = [lambda b=b, w=w: by_grouped(b, w) for b, w in zip(both, down)]
    return found | _transformers_experts(x_td, both, down, job)


def _transformers_experts(x_td, both, down, job: dict) -> dict:
    """transformers' own experts module, with each of its implementations that a GPU without extra packages has."""
    if not _transformers_version():
        return {}
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts
    found = {}
    for name in ("grouped_mm", "batched_mm", "eager"):
        config = MixtralConfig(hidden_size=job["d"], intermediate_size=job["f"], num_local_experts=1, num_experts_per_tok=1)
        config._experts_implementation = name
        if name == "batched_mm" and 6 * job["d"] * job["f"] * len(x_td) > 2e10:
            continue  # it copies the weights for every row
        modules = []
        for b, w in zip(both, down):
            with torch.device("meta"):
                module = MixtralExperts(config)
            module.gate_up_proj = torch.nn.Parameter(b, requires_grad=False)
            module.down_proj = torch.nn.Parameter(w, requires_grad=False)
            modules.append(module)
        index = torch.zeros(len(x_td), 1, device=device(), dtype=torch.int64)
        weight = torch.ones(len(x_td), 1, device=device(), dtype=x_td.dtype)
        found[f"transformers_{name}_ms"] = [lambda m=m, i=index, w=weight: m(x_td, i, w) for m in modules]
    return found


def _transformers_version() -> str:
    try:
        import transformers
    except ImportError:
        return ""
    return transformers.__version__


# ---------------------------------------------------------------- whole models
def stack(job: dict) -> dict:
    """Prefill and decode of a Mixtral-shaped model with random weights, tokens/s of the fastest experts implementation."""
    if not _transformers_version():
        return {"transformers": "", "prefill": {}, "decode": {}, "notes": []}
    import transformers
    model = _mixtral(job["model"]).to(KINDS[job["dtype"]])
    ids = torch.randint(0, job["model"]["vocab"], (job["sequences"], job["prompt_tokens"]), device=device())
    found = {"transformers": transformers.__version__, "attention": model.config._attn_implementation, "prefill": {}, "decode": {},
             "notes": []}
    end = time.perf_counter() + job["seconds"]
    for name in job["implementations"]:
        if time.perf_counter() > end:
            found["notes"].append(f"{name}: no time left")
            continue
        try:
            model.set_experts_implementation(name)
            prefill_s, decode_s = _generate(model, ids, job["steps"])
        except FAULTS as error:
            if device() == "cuda":
                torch.cuda.empty_cache()
            found["notes"].append(f"{name}: {type(error).__name__}: {str(error).splitlines()[0][:160]}")
            continue
        found["prefill"][name] = ids.numel() / prefill_s
        found["decode"][name] = job["sequences"] / decode_s
    return found


def _generate(model, ids, steps: int) -> tuple[float, float]:
    """(seconds of the prefill, seconds of a decode step: median), both the second time."""
    from transformers import DynamicCache

    def now() -> float:
        if device() == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    for _ in range(2):
        cache, start = DynamicCache(), now()
        token = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1].argmax(-1)[:, None]
        prefill_s, spans = now() - start, []
        for _ in range(steps):
            start = now()
            token = model(token, past_key_values=cache, use_cache=True).logits[:, -1].argmax(-1)[:, None]
            spans.append(now() - start)
    return prefill_s, statistics.median(spans)


def _mixtral(c: dict):
    from transformers import MixtralConfig, MixtralForCausalLM
    config = MixtralConfig(
        vocab_size=c["vocab"], hidden_size=c["d"], intermediate_size=c["f"], num_hidden_layers=c["layers"],
        num_attention_heads=c["heads"], num_key_value_heads=c["kv_heads"], head_dim=c["head_dim"], num_local_experts=c["experts"],
        num_experts_per_tok=c["top_k"], rms_norm_eps=c["norm_eps"], max_position_embeddings=c["context"],
        sliding_window=c["window"] or None, tie_word_embeddings=c["tied"],
        rope_parameters={"rope_type": "default", "rope_theta": c["theta"]})
    before = torch.get_default_dtype()
    torch.set_default_dtype(KINDS.get(c.get("dtype", ""), torch.float32))
    try:
        with torch.device(device()):
            model = MixtralForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return model.eval()


def parity(job: dict) -> dict:
    """Greedy tokens and log-probabilities of given sequences under a Mixtral model whose weights are in an .npz file."""
    if not _transformers_version():
        return {"transformers": ""}
    import numpy as np
    model = _mixtral(job["model"])
    with np.load(job["weights"]) as file:
        state = {name: torch.from_numpy(file[name]) for name in file.files}
    model.load_state_dict(state, strict=not job["model"]["tied"])
    model.to(KINDS[job["dtype"]]).set_experts_implementation("eager")
    greedy, logprobs = [], []
    for tokens in job["sequences"]:
        logits = model(torch.tensor([tokens], device=device())).logits[0].float()
        greedy.append(logits.argmax(-1).tolist())
        chosen = torch.log_softmax(logits[:-1].double(), -1)
        logprobs.append(chosen[torch.arange(len(tokens) - 1), torch.tensor(tokens[1:])].tolist())
    return {"transformers": _transformers_version(), "greedy": greedy, "logprobs": logprobs}


JOBS = {"experts": experts, "stack": stack, "parity": parity}

if __name__ == "__main__":
    sys.exit(main())
