"""Sections `layer`, `stack` and `exchange`: layers with random weights and known shapes, run by `hpcmoe run`.

Scout-shaped: attention and experts of Llama 4 Scout, 16 experts, top-1, without its shared expert.
Mixtral-shaped: Mixtral 8x7B. Two layers each and a small vocabulary, so that a step is its layers.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass, replace

import numpy as np

from hpcmoe.bench import jobs
from hpcmoe.bench.bed import Bed
from hpcmoe.bench.compare import ask, missing
from hpcmoe.bench.experts import Pair
from hpcmoe.bench.kernels import pages
from hpcmoe.bench.record import FAILED, SKIPPED, Section
from hpcmoe.bench.timing import Deadline
from hpcmoe.config import AttentionConfig, ExpertConfig, ModelConfig, RouterConfig
from hpcmoe.data.create import create
from hpcmoe.kernels import attention

VOCAB, CONTEXT = 1024, 1024
PROMPT, OUTPUT = 128, 48


@dataclass(frozen=True)
class Shape:
    """Sizes of a stack."""

    name: str
    layers: int
    d: int
    f: int
    experts: int
    top_k: int
    heads: int
    kv_heads: int
    head_dim: int

    def model(self) -> ModelConfig:
        return ModelConfig("mixtral", VOCAB, self.d, self.layers, AttentionConfig(self.heads, self.kv_heads, self.head_dim),
                           RouterConfig(self.experts, self.top_k), ExpertConfig(self.f), CONTEXT)


SCOUT = Shape("scout-shaped", 2, 5120, 8192, 16, 1, 40, 8, 128)
MIXTRAL = Shape("mixtral-shaped", 2, 4096, 14336, 8, 2, 32, 8, 128)
TINY = Shape("tiny", 2, 64, 96, 4, 1, 4, 2, 16)
PEER_DTYPE = "bf16"  # as fast as fp16, and the one that all implementations have
IMPLEMENTATIONS = ("grouped_mm", "batched_mm", "eager")


def weights(bed: Bed, shape: Shape) -> str:
    """A file of random weights of that shape, made at the first call. Raises jobs.JobFailed where it has no room."""
    path = bed.folder / f"{shape.name}.h5"
    if not path.exists():
        need = 2 * shape.layers * shape.experts * 3 * shape.d * shape.f
        free = shutil.disk_usage(bed.folder).free
        if free < 1.1 * need:
            raise jobs.JobFailed(f"{bed.folder}: {free / 1e9:.1f} GB free, {1.1 * need / 1e9:.1f} GB needed for weights; TMPDIR "
                                 "names another folder")
        create(str(path), shape.model(), bed.options.dtype)
    return str(path)


def throughput(bed: Bed, shape: Shape, sequences: int, deadline: Deadline, ranks: int = 1, **more) -> dict:
    """report.json of a synthetic batch: all sequences at once, decode steps of one row for each. Raises jobs.JobFailed."""
    bed.release()
    prompt, output = (8, 6) if bed.small else (PROMPT, OUTPUT)
    sets = {"task": "throughput", "weights.file": weights(bed, shape), "weights.dtype": bed.options.dtype, "weights.verify": False,
            "run.device": "gpu", "run.batch_tokens": max(sequences, 64 if bed.small else 16384), "run.max_sequences": sequences,
            "run.micro_batches": 1, "run.lanes": 1, "throughput.sequences": sequences, "throughput.prompt_tokens": prompt,
            "throughput.output_tokens": output, **more}
    report, _ = jobs.run(bed.new_folder(), sets, deadline, ranks, bed.options.mpiexec if ranks > 1 else "")
    return report


def decode_ms(report: dict) -> float:
    """Milliseconds of a decode step: the median, which is one of all sequences."""
    return report["steps"]["decode_step_p50_ms"]


# ---------------------------------------------------------------- one layer
def layer(bed: Bed, section: Section, deadline: Deadline) -> None:
    """A decode layer at 1,024 tokens, all experts on the rank and one alone: its time, what its products and attention
    take by themselves, what graphs gain."""
    shapes, tokens = ((TINY,), 8) if bed.small else ((SCOUT, replace(SCOUT, name="scout-shaped, one expert", experts=1)), 1024)
    for shape in shapes:
        _layer(bed, section, deadline, shape, tokens)
    section.notes += ["layer_ms: a median decode step of twice as many layers less one of the shape's, by the layer: head, sampling "
                      "and what is done between steps are in both", "*_per_layer_and_step: all launches of the run over its steps "
                      "and layers, prefill among them"]


def _layer(bed: Bed, section: Section, deadline: Deadline, shape: Shape, tokens: int) -> None:
    alone_ms = _products_ms(bed, shape, tokens)
    deep = replace(shape, name=f"{shape.name}, deep", layers=2 * shape.layers)
    point = section.add_point("layers", shape=shape.name, experts=shape.experts, tokens=tokens)
    for graphs, words in ((True, ""), (False, "_without_graphs")):
        low, high = (throughput(bed, s, tokens, deadline, **{"run.graphs": graphs}) for s in (shape, deep))
        point[f"layer{words}_ms"] = (decode_ms(high) - decode_ms(low)) / shape.layers
        point[f"rest_of_step{words}_ms"] = 2 * decode_ms(low) - decode_ms(high)
        steps = high["steps"]["steps"] * deep.layers
        point |= {f"{name}_per_layer_and_step{words}": count / steps for name, count in high["run"]["gpu_work"].items()}
    share = 1 - sum(alone_ms.values()) / point["layer_ms"]
    point |= {"graphs_gain_ratio": point["layer_without_graphs_ms"] / point["layer_ms"],
              "products_and_attention_alone_ms": sum(alone_ms.values()), "share_not_in_products_or_attention": share, **alone_ms}
    section.goal(f"{shape.name} layer, {tokens} tokens: share not in products or attention", "<=", 0.10, share)


def _products_ms(bed: Bed, shape: Shape, t: int) -> dict[str, float]:
    """Milliseconds of a decode layer's products and of its attention, each alone, for t rows spread evenly over experts."""
    gpu, s = bed.gpu, shape
    width = (s.heads + 2 * s.kv_heads) * s.head_dim
    qkv, out = bed.normal((width, s.d), s.d**-0.5), bed.normal((s.d, s.heads * s.head_dim), s.d**-0.5)
    gate = bed.normal((s.experts, s.d), s.d**-0.5)
    x_td, mixed = bed.normal((t, s.d)), bed.normal((t, s.heads * s.head_dim))
    qkv_tx, y_td, logit_te = bed.empty((t, width), bed.t_dtype), bed.empty((t, s.d), bed.t_dtype), bed.empty((t, s.experts), np.float32)

    def dense():
        gpu.gemm(x_td, qkv, qkv_tx)
        gpu.gemm(mixed, out, y_td)
        gpu.gemm(x_td, gate, logit_te)

    pairs = [Pair.random(bed, t * s.top_k // s.experts, s.d, s.f) for _ in range(s.experts)]
    expert = bed.timer([lambda p=p: p.bare(gpu) for p in pairs])
    return {"dense_products_alone_ms": bed.timer([dense, dense]).ms, "expert_products_alone_ms": expert.ms * s.experts,
            "attention_alone_ms": _attention_ms(bed, s, t, 16 if bed.small else PROMPT + OUTPUT // 2)}


def _attention_ms(bed: Bed, s: Shape, t: int, context: int) -> float:
    m = bed.kernels()
    k_phoc, v_phoc, page_sp = pages(bed, t, context, s.kv_heads, s.head_dim)
    row_t = bed.upload(np.arange(t, dtype=np.int32))
    position_t = bed.upload(np.full(t, context - 1, np.int32))
    work = attention.Work(row_t, None, bed.upload(np.empty((0, 4), np.int32)), None)
    splits = attention.splits(m, t, s.kv_heads, context)
    workspace = bed.empty((max(1, attention.workspace_floats(t, s.heads, s.head_dim, splits)),), np.float32)
    q_thc, out_thc = bed.normal((t, s.heads, s.head_dim), s.head_dim**-0.5), bed.empty((t, s.heads, s.head_dim), bed.t_dtype)

    def call():
        attention.attention(m, q_thc, k_phoc, v_phoc, page_sp, row_t, position_t, work, out_thc, splits=splits, workspace=workspace)

    return bed.timer([call, call]).ms


# ---------------------------------------------------------------- stacks against transformers
def stack(bed: Bed, section: Section, deadline: Deadline) -> None:
    """tokens/s in prefill and decode of layer stacks, beside transformers' fastest experts implementation."""
    sequences = 8 if bed.small else 256
    python = bed.options.peer_python
    for shape in (TINY,) if bed.small else (MIXTRAL, SCOUT):
        report = throughput(bed, shape, sequences, deadline)
        ours = 1e3 * sequences / decode_ms(report)
        point = section.add_point("stacks", shape=shape.name, sequences=sequences, decode_tokens_per_s=ours,
                                  prefill_tokens_per_s=report["throughput"]["prefill_tokens_per_s"])
        what = f"{shape.name}, decode of {sequences}: hpcmoe / transformers"
        answer = {"decode": {}, "prefill": {}, "notes": []}
        why = missing(python)
        if not why:
            model = {**asdict(shape), "vocab": VOCAB, "norm_eps": 1e-5, "context": CONTEXT, "window": 0, "tied": False,
                     "theta": 10000.0, "dtype": PEER_DTYPE}
            answer = ask({"what": "stack", "model": model, "dtype": PEER_DTYPE, "sequences": sequences,
                          "prompt_tokens": 8 if bed.small else PROMPT, "steps": 2 if bed.small else 12,
                          "implementations": IMPLEMENTATIONS, "seconds": 30}, bed.options, deadline)
            why = "" if answer["decode"] else f"transformers is not installed for {python}, or ran none of its implementations"
        for phase in ("prefill", "decode"):
            point |= {f"transformers_{name}_{phase}_tokens_per_s": rate for name, rate in answer[phase].items()}
        section.notes.append(f"transformers computes in {PEER_DTYPE}")
        section.notes += [f"{shape.name}: {note}" for note in answer["notes"]]
        section.goal(what, ">=", 3.0, ours / max(answer["decode"].values()) if answer["decode"] else None, why)


# ---------------------------------------------------------------- several ranks on the one GPU
def exchange(bed: Bed, section: Section, deadline: Deadline) -> None:
    """Ranks that share the GPU: the same tokens as one rank, and what two lanes gain where an exchange lies between layers."""
    if not bed.options.mpiexec:
        section.status, section.error = SKIPPED, "--mpiexec was not given"
        return
    _same_tokens(bed, section, deadline)
    shape, sequences = (TINY, 8) if bed.small else (SCOUT, 256)
    for ranks in (2,) if bed.small else (2, 4):
        point = section.add_point("lanes", ranks=ranks, shape=shape.name, sequences=sequences)
        for lanes in (1, 2):
            more = {"layout.ep": ranks, "run.lanes": lanes, "run.micro_batches": lanes}
            report = throughput(bed, shape, sequences, deadline, ranks, **more)
            point["transport"] = report["run"]["transport"]
            point[f"lanes_{lanes}_decode_tokens_per_s"] = report["throughput"]["decode_tokens_per_s"]
            point[f"lanes_{lanes}_exposed_share"] = report["communication"]["exposed_comm_share"]
        point["two_lanes_gain_ratio"] = point["lanes_2_decode_tokens_per_s"] / point["lanes_1_decode_tokens_per_s"]


def _same_tokens(bed: Bed, section: Section, deadline: Deadline) -> None:
    """The section fails where it is more than a rounding here and there that makes tokens differ."""
    sets = {"weights.file": jobs.demo("model.h5"), "requests.file": jobs.demo("prompts.jsonl"), "weights.dtype": bed.options.dtype,
            "run.device": "gpu", **({"requests.limit": 2} if bed.small else {})}
    bed.release()
    alone = _tokens(bed, sets, deadline, 1)
    for ranks in (2,) if bed.small else (2, 4, 16):
        made = _tokens(bed, {**sets, "layout.ep": ranks}, deadline, ranks)
        same = float(np.mean([a == b for a, b in zip(alone, made)]))
        before = sum(_common(a, b) for a, b in zip(alone, made)) / sum(len(a) for a in alone)
        section.add_point("tokens of one rank", ranks=ranks, same_requests_share=same, before_first_difference_share=before)
        section.goal(f"{ranks} ranks on one GPU: requests with the tokens of one rank", ">=", 1.0, same)
        if before < 0.7:
            section.status, section.error = FAILED, f"{ranks} ranks: tokens are not those of one rank"


def _common(a: list[int], b: list[int]) -> int:
    """Tokens before the first difference."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def _tokens(bed: Bed, sets: dict, deadline: Deadline, ranks: int) -> list[list[int]]:
    _, rows = jobs.run(bed.new_folder(), sets, deadline, ranks, bed.options.mpiexec if ranks > 1 else "")
    return [body["choices"][0]["token_ids"] for body in jobs.bodies(rows)]
