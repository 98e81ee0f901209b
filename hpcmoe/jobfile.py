"""A job from its TOML file and --set key=value."""

from __future__ import annotations

import sys
from pathlib import Path

from hpcmoe.config import DTYPES, SCHEDULES, TASKS, TRANSPORTS, JobConfig, from_dict
from hpcmoe.errors import UserError, at

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def read_job(path: str | None, sets: list[str]) -> JobConfig:
    """The job of a TOML file (None: all defaults) with the `key=value` texts of `sets` laid over it.

    Paths in the file are relative to the current folder. Raises UserError naming file, key and value.
    """
    data = _read(path) if path else {}
    for text in sets:
        _set(data, text)
    job = from_dict(JobConfig, data, path or "--set")
    _check(job, path or "--set")
    return job


def _read(path: str) -> dict:
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not TOML: {error}") from error


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
             "run.transport": (run.transport, TRANSPORTS), "weights.dtype": (job.weights.dtype, DTYPES)}
    for name, (value, allowed) in words.items():
        if value not in allowed:
            raise at(where, name, value, "one of " + ", ".join(allowed))
    least = {"run.micro_batches": (run.micro_batches, 0), "run.lanes": (run.lanes, 0), "run.batch_tokens": (run.batch_tokens, 1),
             "run.prefill_chunk": (run.prefill_chunk, 1), "run.max_sequences": (run.max_sequences, 0),
             "run.context": (run.context, 0), "run.memory_gb": (run.memory_gb, 0), "run.stall_s": (run.stall_s, 0.001),
             "requests.limit": (job.requests.limit, 0), "sampling.max_tokens": (sampling.max_tokens, 1),
             "sampling.temperature": (sampling.temperature, 0), "sampling.top_k": (sampling.top_k, 0),
             "sampling.seed": (sampling.seed, 0), "throughput.sequences": (batch.sequences, 1),
             "throughput.prompt_tokens": (batch.prompt_tokens, 1), "throughput.output_tokens": (batch.output_tokens, 1)}
    for name, (value, low) in least.items():
        if not value >= low:
            raise at(where, name, value, f"a number >= {low}")
    if not 0 < sampling.top_p <= 1:
        raise at(where, "sampling.top_p", sampling.top_p, "a number in (0, 1]")
    if not job.weights.file:
        raise UserError(f"{where}: weights.file is missing: expected the path of an HDF5 weights file")
    if job.task != "throughput" and not job.requests.file:
        raise UserError(f"{where}: requests.file is missing: expected a .jsonl, .txt or .h5 file")
