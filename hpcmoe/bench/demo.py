"""Section `model`: the shipped model, its speed, and its tokens and log-probabilities against the NumPy
backend in fp32 and against Hugging Face transformers on the same GPU."""

from __future__ import annotations

import json

import numpy as np

from hpcmoe.bench import jobs
from hpcmoe.bench.bed import Bed
from hpcmoe.bench.compare import ask, missing
from hpcmoe.bench.record import FAILED, Section
from hpcmoe.bench.timing import Deadline
from hpcmoe.config import ModelConfig
from hpcmoe.data.tokenizer import Tokenizer
from hpcmoe.data.weights import WeightsFile
from hpcmoe.model.dtypes import to_fp32

OUTPUT_TOKENS = 32
POSITIONS = 1024  # of the sequences, at which the next token is compared


def model(bed: Bed, section: Section, deadline: Deadline) -> None:
    """Speed first, then parity: both by `hpcmoe run`."""
    bed.release()
    _speed(bed, section, deadline)
    sequences, first = _sequences(bed, deadline)
    mine = _answers(bed, sequences, first, deadline, "gpu")
    true = _answers(bed, sequences, first, deadline, "cpu")
    _compare(section, "NumPy", mine, true)
    if not all(goal.met for goal in section.goals):
        section.status, section.error = FAILED, "the model's tokens or log-probabilities are not those of NumPy in fp32"
    python = bed.options.peer_python
    why = missing(python)
    theirs = None if why else _transformers(bed, sequences, first, deadline)
    if theirs is None:
        reason = why or f"transformers is not installed for {python}"
        section.goal("same greedy tokens as transformers", ">=", 0.99, None, reason)
    else:
        _compare(section, "transformers", mine, theirs)


def _speed(bed: Bed, section: Section, deadline: Deadline) -> None:
    for sequences in (2,) if bed.small else (256, 1024):
        sets = {"task": "throughput", "weights.file": jobs.demo("model.h5"), "weights.dtype": bed.options.dtype, "run.device": "gpu",
                "run.batch_tokens": 64 if bed.small else 16384, "run.max_sequences": sequences, "run.micro_batches": 1,
                "throughput.sequences": sequences, "throughput.prompt_tokens": 4 if bed.small else 128,
                "throughput.output_tokens": 3 if bed.small else 64}
        report, _ = jobs.run(bed.new_folder(), sets, deadline)
        section.add_point("shipped model", sequences=sequences, decode_step_p50_ms=report["steps"]["decode_step_p50_ms"],
                          **{name: report["throughput"][name] for name in ("prefill_tokens_per_s", "decode_tokens_per_s")})


# ---------------------------------------------------------------- parity
def _sequences(bed: Bed, deadline: Deadline) -> tuple[list[list[int]], list[int]]:
    """The shipped prompts, each with what NumPy in fp32 makes of it greedily; and where in each that begins."""
    with WeightsFile(str(jobs.demo("model.h5"))) as file:
        tokenizer = Tokenizer.from_json(file.tokenizer_json, file.chat_template, file.special, file.config.bos_id)
    texts = [json.loads(line)["body"].get("prompt") for line in jobs.demo("prompts.jsonl").read_text().splitlines()]
    prompts = [[int(i) for i in tokenizer.encode(text)] for text in texts if isinstance(text, str)][:2 if bed.small else None]
    path = bed.folder / "parity-prompts.jsonl"
    jobs.requests(path, prompts, max_tokens=3 if bed.small else OUTPUT_TOKENS, temperature=0)
    _, rows = jobs.run(bed.new_folder(), _sets("cpu", path, bed), deadline)
    made = [body["choices"][0]["token_ids"] for body in jobs.bodies(rows)]
    return [prompt + more for prompt, more in zip(prompts, made)], [len(prompt) for prompt in prompts]


def _sets(device: str, path, bed: Bed) -> dict:
    chosen = {"run.device": "gpu", "weights.dtype": bed.options.dtype} if device == "gpu" else {
        "run.device": "cpu", "weights.dtype": "fp32", "weights.backend": "numpy"}
    return {"weights.file": jobs.demo("model.h5"), "requests.file": path, **chosen}


def _places(sequences, first) -> list[tuple[int, int]]:
    """(sequence, position of a token) where the next token is compared, evenly over all."""
    every = [(i, p) for i, tokens in enumerate(sequences) for p in range(first[i], len(tokens))]
    return every[::max(1, -(-len(every) // POSITIONS))]


def _answers(bed: Bed, sequences, first, deadline: Deadline, device: str) -> dict:
    """greedy: tokens after the same beginnings; logprobs: of every token of the sequences but the first."""
    places, path = _places(sequences, first), bed.folder / f"parity-{device}.jsonl"
    if device == "cpu":  # what follows is what made the sequences
        greedy = [sequences[i][p] for i, p in places]
    else:
        jobs.requests(path, [sequences[i][:p] for i, p in places], max_tokens=1, temperature=0)
        _, rows = jobs.run(bed.new_folder(), _sets(device, path, bed), deadline)
        greedy = [body["choices"][0]["token_ids"][0] for body in jobs.bodies(rows)]
    jobs.requests(path, sequences, logprobs=1)
    _, rows = jobs.run(bed.new_folder(), {**_sets(device, path, bed), "task": "score"}, deadline)
    values = [_logprobs(body) for body in jobs.bodies(rows)]
    return {"greedy": greedy, "logprobs": np.concatenate(values)}


def _logprobs(body: dict) -> np.ndarray:
    """Of the tokens of one scored text, without the first, which has none."""
    return np.array([p for p in body["choices"][0]["logprobs"]["token_logprobs"] if p is not None])


def _compare(section: Section, whom: str, mine: dict, theirs: dict) -> None:
    same = float(np.mean(np.array(mine["greedy"]) == np.array(theirs["greedy"])))
    error = np.abs(mine["logprobs"] - theirs["logprobs"])
    norm = float(np.sqrt((error**2).mean() / (theirs["logprobs"] ** 2).mean()))
    section.add_point("parity", against=whom, positions=len(mine["greedy"]), same_greedy_share=same,
                      logprob_median_error=float(np.median(error)), logprob_largest_error=float(error.max()),
                      logprob_relative_error=norm)
    section.goal(f"same greedy tokens as {whom}", ">=", 0.99, same)
    section.goal(f"log-probabilities, relative error to {whom}", "<=", 2e-2, norm)


def _transformers(bed: Bed, sequences, first, deadline: Deadline) -> dict | None:
    """The same of MixtralForCausalLM with the same weights; None where transformers is not installed."""
    path = bed.folder / "parity.npz"
    with WeightsFile(str(jobs.demo("model.h5"))) as file:
        c = file.config
        np.savez(path, **state(file))
    a = c.attention
    shape = {"vocab": c.vocab, "d": c.d, "f": c.expert.f, "layers": c.layers, "heads": a.heads, "kv_heads": a.kv_heads,
             "head_dim": a.head_dim, "experts": c.router.experts, "top_k": c.router.top_k, "norm_eps": c.norm_eps, "context": c.context,
             "window": a.window, "tied": c.tied, "theta": a.rope["theta"]}
    answer = ask({"what": "parity", "model": shape, "weights": str(path), "dtype": bed.options.dtype, "sequences": sequences},
                 bed.options, deadline)
    if not answer["transformers"]:
        return None
    return {"greedy": [answer["greedy"][i][p - 1] for i, p in _places(sequences, first)],
            "logprobs": np.concatenate([np.array(values) for values in answer["logprobs"]])}


def state(file: WeightsFile) -> dict[str, np.ndarray]:
    """The weights of a Mixtral model under the names that transformers 5 has for them, fp32."""
    c: ModelConfig = file.config
    names = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "router": "mlp.gate",
             **{n: f"self_attn.{n}_proj" for n in "qkvo"}}
    found = {"model.embed_tokens.weight": file.top("embed"), "model.norm.weight": file.top("norm")}
    if not c.tied:
        found["lm_head.weight"] = file.top("head")
    for layer in range(c.layers):
        dense, base = file.dense(layer), f"model.layers.{layer}."
        found |= {f"{base}{theirs}.weight": dense[ours] for ours, theirs in names.items()}
        experts = [file.expert(layer, e) for e in range(c.router.experts)]
        found[base + "mlp.experts.gate_up_proj"] = np.stack([np.concatenate([e["gate"], e["up"]]) for e in experts])
        found[base + "mlp.experts.down_proj"] = np.stack([e["down"] for e in experts])
    return {name: to_fp32(np.asarray(array)) for name, array in found.items()}
