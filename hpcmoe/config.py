"""What a model is and what a job asks for, as frozen dataclasses.

`from_dict` builds any of them from plain data (a TOML file, JSON in a weights file) and
refuses unknown keys, missing keys and wrong types by name. Nothing is read at import.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import dataclass, field
from typing import Any

from hpcmoe.errors import UserError, at


# ---------------------------------------------------------------- the model
@dataclass(frozen=True)
class RouterConfig:
    """How a token's experts are chosen and weighted.

    score: "softmax", "sigmoid", or "sparsemixer" (Phi-3.5-MoE, GRIN, arXiv 2409.12136).
    over: "all" scores are normalised over all experts before top-k, "selected" after it.
    bias: a learned bias is added to the scores for the choice only (DeepSeek-V3).
    groups, top_groups: choose among the experts of the best groups only (1, 1: no groups).
    renormalise: divide the chosen weights by their sum; scale: multiply them at the end.
    jitter: SparseMixer's threshold.
    """

    experts: int
    top_k: int
    score: str = "softmax"
    over: str = "all"
    bias: bool = False
    groups: int = 1
    top_groups: int = 1
    renormalise: bool = True
    scale: float = 1.0
    jitter: float = 0.0


@dataclass(frozen=True)
class ExpertConfig:
    """One expert: down(act(gate x) * up x), or down(act(up x)) where not gated.

    f: hidden width; activation: silu, gelu, gelu_tanh, relu; bias: biases on the products;
    shared: number of experts that every token passes, shared_f: their width altogether.
    """

    f: int
    activation: str = "silu"
    gated: bool = True
    bias: bool = False
    shared: int = 0
    shared_f: int = 0


@dataclass(frozen=True)
class AttentionConfig:
    """Attention with grouped KV heads. head_dim: width of one head.

    bias: on q, k, v; out_bias: on the output product. qk_norm: "none", "head" (each head by
    itself, Qwen3) or "full" (over all heads at once, OLMoE). clip_qkv: clamp to +-clip (0: no).
    window: sliding window in tokens, 0 for none.
    rope: {"type": "default"|"linear"|"llama3"|"yarn"|"longrope", "theta": float, ...}.
    """

    heads: int
    kv_heads: int
    head_dim: int
    bias: bool = False
    out_bias: bool = False
    qk_norm: str = "none"
    clip_qkv: float = 0.0
    window: int = 0
    rope: dict = field(default_factory=lambda: {"type": "default", "theta": 10000.0})


@dataclass(frozen=True)
class ModelConfig:
    """A decoder of `layers` blocks: x += attention(norm x); x += MoE(norm x).

    d: model width; norm: "rms" or "layer" (with bias); context: longest sequence in tokens;
    tied: the head is the embedding; head_bias: a bias on the logits;
    stop_ids: token ids that end a sequence; bos_id: put before a text prompt, -1 for none.
    """

    family: str
    vocab: int
    d: int
    layers: int
    attention: AttentionConfig
    router: RouterConfig
    expert: ExpertConfig
    context: int
    norm: str = "rms"
    norm_eps: float = 1e-5
    tied: bool = False
    head_bias: bool = False
    stop_ids: tuple[int, ...] = ()
    bos_id: int = -1


# ---------------------------------------------------------------- the job
TASKS = ("generate", "score", "throughput")
SCHEDULES = ("overlapped", "plain")
DEVICES = ("auto", "cpu", "gpu")
DISPATCH = ("auto", "fp8")
OVER_CAPACITY = ("reroute", "drop")
TRANSPORTS = ("auto", "ialltoallv", "pairwise", "staged", "hierarchical")
DTYPES = ("auto", "fp32", "bf16", "fp16")


@dataclass(frozen=True)
class WeightsJob:
    """file: HDF5 weights; dtype: inputs of the products: fp32 or bf16 on a CPU, fp16 or bf16 on a GPU, auto: fp32,
    on a GPU the file's own, or bf16; backend of a CPU: auto, numpy, onednn;
    verify: check the checksum of every tensor that a rank reads (a few percent of the load time)."""

    file: str = ""
    dtype: str = "auto"
    backend: str = "auto"
    verify: bool = True


@dataclass(frozen=True)
class RequestsJob:
    """file: .jsonl, .txt or .h5; limit: run only the first so many (0: all)."""

    file: str = ""
    limit: int = 0


@dataclass(frozen=True)
class OutputJob:
    """dir: where outputs and report.json go; trace: file for a Perfetto trace ("" for none)."""

    dir: str = "hpcmoe-out"
    trace: str = ""
    quiet: bool = False
    show_text: bool = False


@dataclass(frozen=True)
class LayoutJob:
    """Replicas x stages x expert places x tensor shards; 0: chosen for the number of ranks.
    leaders: "all", "node" or a number per stage. placement: file of `hpcmoe place` that says which rank
    holds which expert ("": in order). replicas: spare slots of each layer, which hold copies of experts (0 with
    ep > experts: one slot per place)."""

    dp: int = 0
    pp: int = 0
    ep: int = 0
    tp: int = 1
    leaders: str = "all"
    placement: str = ""
    replicas: int = 0


@dataclass(frozen=True)
class RunJob:
    """How the work is cut and moved.

    micro_batches: in flight per replica (0: stages x lanes); lanes: micro-batches interleaved on a
    stage by the overlapped schedule (0: by a trial, see parallel/lanes.py); batch_tokens: token rows of one step of one micro-batch, over all
    leaders; prefill_chunk: prompt tokens of one sequence in one step, at most; max_sequences:
    sequences in flight in a replica (0: chosen); context: longest prompt + output (0: what the
    requests need); memory_gb: memory for one rank's KV cache (0: what is free);
    stall_s: end the job when a rank that others wait for gives no answer, or stands still (watch.py).
    device: cpu, gpu, or auto: a GPU where CuPy sees one. The rest is for GPUs: graphs: replay the launches of
    decode steps as CUDA graphs; gpu_memory_fraction: of a GPU's memory, for all of this job on it; page_tokens:
    tokens of one page of the KV cache. dispatch_dtype: fp8: rows travel to their experts as e4m3 with a
    scale each, on any device; auto: as they are. routing_statistics: count which experts tokens choose
    together and write routing.h5, for `hpcmoe place`. rebalance_every: look at the load every so many steps, and
    move copies of experts where that pays (0: never). rebalance_gb_per_s: what moving weights is reckoned with (0: measured).
    capacity_factor: at most ceil(factor x tokens x top_k / experts) rows per expert of a leader's micro-batch (0: no limit);
    over_capacity: reroute or drop what is beyond (model.capacity). It changes results; on CPUs.
    cluster: cluster file of the machine ("": $HPCMOE_CLUSTER, or none): the report says what the simulator predicts on it.
    """

    schedule: str = "overlapped"
    transport: str = "auto"
    micro_batches: int = 0
    lanes: int = 0
    batch_tokens: int = 1024
    prefill_chunk: int = 256
    max_sequences: int = 0
    context: int = 0
    memory_gb: float = 0.0
    stall_s: float = 60.0
    device: str = "auto"
    graphs: bool = True
    gpu_memory_fraction: float = 0.9
    page_tokens: int = 64
    dispatch_dtype: str = "auto"
    routing_statistics: bool = False
    rebalance_every: int = 0
    rebalance_gb_per_s: float = 0.0
    capacity_factor: float = 0.0
    over_capacity: str = "reroute"
    cluster: str = ""


@dataclass(frozen=True)
class SamplingJob:
    """Defaults for requests that do not say; temperature 0 is greedy; top_k 0: no limit."""

    max_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    ignore_eos: bool = False


@dataclass(frozen=True)
class ThroughputJob:
    """The synthetic batch of task = "throughput"."""

    sequences: int = 1024
    prompt_tokens: int = 128
    output_tokens: int = 32
    seed: int = 0


@dataclass(frozen=True)
class JobConfig:
    """All that `hpcmoe run` is told: a TOML file plus --set key=value."""

    task: str = "generate"
    weights: WeightsJob = WeightsJob()
    requests: RequestsJob = RequestsJob()
    output: OutputJob = OutputJob()
    layout: LayoutJob = LayoutJob()
    run: RunJob = RunJob()
    sampling: SamplingJob = SamplingJob()
    throughput: ThroughputJob = ThroughputJob()


# ---------------------------------------------------------------- plain data -> dataclass
def from_dict(cls, data: Any, where: str, prefix: str = ""):
    """An instance of dataclass `cls` from a dict; `where` names the file in errors.

    Raises UserError for an unknown key (with the allowed ones), a missing key, a wrong type.
    """
    if not isinstance(data, dict):
        raise at(where, prefix.rstrip(".") or "document", data, "a table of keys and values")
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    for key in data:
        if key not in names:
            raise at(where, prefix + str(key), data[key], "one of the keys " + ", ".join(names))
    values = {}
    for f in dataclasses.fields(cls):
        name = prefix + f.name
        if f.name in data:
            values[f.name] = _convert(hints[f.name], data[f.name], where, name)
        elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise UserError(f"{where}: {name} is missing")
    return cls(**values)


def _convert(kind, value, where: str, name: str):
    if isinstance(kind, types.UnionType):  # X | None: a key that may be left out
        kind = next(k for k in typing.get_args(kind) if k is not type(None))
    if dataclasses.is_dataclass(kind):
        return from_dict(kind, value, where, name + ".")
    if isinstance(kind, types.GenericAlias) and kind.__origin__ is tuple:
        return _converted_list(typing.get_args(kind)[0], value, where, name)
    if kind is float and type(value) is int:
        return float(value)
    if kind is str and name == "layout.leaders" and type(value) is int:
        return str(value)
    if type(value) is not kind:
        words = {int: "an integer", float: "a number", bool: "true or false", str: "a text",
                 dict: "a table"}
        raise at(where, name, value, words.get(kind, str(kind)))
    return value


def _converted_list(item, value, where: str, name: str) -> tuple:
    """A tuple of numbers, or of dataclasses, of a list; item: what each of its values is."""
    if dataclasses.is_dataclass(item):
        if isinstance(value, (list, tuple)) and all(isinstance(v, dict) for v in value):
            return tuple(from_dict(item, v, where, f"{name}[{i}].") for i, v in enumerate(value))
        raise at(where, name, value, f"a list of tables: [[{name}]]")
    if isinstance(value, (list, tuple)) and all(type(v) is item or (item is float and type(v) is int) for v in value):
        return tuple(item(v) for v in value)
    raise at(where, name, value, {int: "a list of integers", str: "a list of texts"}.get(item, "a list of numbers"))


def to_dict(config) -> dict:
    """The reverse of `from_dict`: plain data that JSON and TOML can hold."""
    return dataclasses.asdict(config)
