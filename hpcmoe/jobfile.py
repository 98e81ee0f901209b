"""A job from its TOML file and --set key=value."""

from __future__ import annotations

import math

from hpcmoe.config import DEVICES, DISPATCH, DTYPES, OVER_CAPACITY, SCHEDULES, TASKS, TRANSPORTS, JobConfig, from_dict
from hpcmoe.errors import UserError, at
from hpcmoe.files import read_toml, tomllib


def read_job(path: str | None, sets: list[str]) -> JobConfig:
    """The job of a TOML file (None: all defaults) with the `key=value` texts of `sets` laid over it.

    Paths in the file are relative to the current folder. Raises UserError naming file, key and value.
    """
    data = read_toml(path) if path else {}
    for text in sets:
        _set(data, text)
    job = from_dict(JobConfig, data, path or "--set")
    _check(job, path or "--set")
    return job


def _set(data: dict, text: str) -> None:
    """Lays one `section.key=value` over data; the value is TOML, or else a text as it stands."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise at("--set", "", text, "key=value, for instance run.lanes=2")
    *sections, last = key.strip().split(".")
    for section in sections:
        data = data.setdefault(section, {})
        if not isinstance(data, dict):
            raise at("--set", key, value, f"a key of a section; {section} is a value")
    try:
        data[last] = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        data[last] = value.strip()


def _check(job: JobConfig, where: str) -> None:
    run, sampling, batch = job.run, job.sampling, job.throughput
    words = {"task": (job.task, TASKS), "run.schedule": (run.schedule, SCHEDULES),
             "run.transport": (run.transport, TRANSPORTS), "weights.dtype": (job.weights.dtype, DTYPES),
             "run.device": (run.device, DEVICES), "run.dispatch_dtype": (run.dispatch_dtype, DISPATCH),
             "run.over_capacity": (run.over_capacity, OVER_CAPACITY)}
    for name, (value, allowed) in words.items():
        if value not in allowed:
            raise at(where, name, value, "one of " + ", ".join(allowed))
    least = {"run.batch_tokens": (run.batch_tokens, 1), "run.prefill_chunk": (run.prefill_chunk, 1),
             "run.max_sequences": (run.max_sequences, 0), "run.context": (run.context, 0),
             "run.rebalance_every": (run.rebalance_every, 0), "run.rebalance_gb_per_s": (run.rebalance_gb_per_s, 0),
             "requests.limit": (job.requests.limit, 0), "sampling.max_tokens": (sampling.max_tokens, 1),
             "sampling.temperature": (sampling.temperature, 0), "sampling.top_k": (sampling.top_k, 0),
             "sampling.seed": (sampling.seed, 0), "throughput.sequences": (batch.sequences, 1),
             "throughput.prompt_tokens": (batch.prompt_tokens, 1), "throughput.output_tokens": (batch.output_tokens, 1)}
    for name, (value, low) in least.items():
        if not value >= low:
            raise at(where, name, value, f"a number >= {low}")
    if run.page_tokens < 16 or run.page_tokens % 16:
        raise at(where, "run.page_tokens", run.page_tokens, "a multiple of 16, at least 16")
    if not 0 <= run.capacity_factor < math.inf:
        raise at(where, "run.capacity_factor", run.capacity_factor, "a number > 0, or 0 for no limit")
    if not 0 < run.gpu_memory_fraction <= 1:
        raise at(where, "run.gpu_memory_fraction", run.gpu_memory_fraction, "a number in (0, 1]")
    spans = {"run.lanes": (run.lanes, 0, 64), "run.micro_batches": (run.micro_batches, 0, 1024),  # MPI has some 2,000 communicators
             "run.memory_gb": (run.memory_gb, 0, 10**6), "run.stall_s": (run.stall_s, 1, 10**6)}
    for name, (value, low, high) in spans.items():
        if not low <= value <= high:
            raise at(where, name, value, f"a number from {low} to {high}")
    if not job.output.dir:
        raise at(where, "output.dir", "", "a folder")
    if not 0 < sampling.top_p <= 1:
        raise at(where, "sampling.top_p", sampling.top_p, "a number in (0, 1]")
    if not job.weights.file:
        raise UserError(f"{where}: weights.file is missing: expected the path of an HDF5 weights file")
    if job.task != "throughput" and not job.requests.file:
        raise UserError(f"{where}: requests.file is missing: expected a .jsonl, .txt or .h5 file")
