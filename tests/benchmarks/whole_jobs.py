"""Measurements of whole jobs, as a user starts them: loading weights, the first token, many ranks."""

from __future__ import annotations

import json
import time
from pathlib import Path
from statistics import median

from mpi import run_ranks  # tests/mpi.py; peers.py makes it importable


def job(ranks: int, out: Path, timeout: float = 900, **sets) -> tuple[float, dict]:
    """(seconds from before mpiexec to its end, report) of `hpcmoe run` with these settings."""
    arguments = ["-m", "hpcmoe", "run", "--quiet", "--output", str(out)]
    for key, value in sets.items():
        arguments += ["--set", f"{key.replace('__', '.')}={value}"]
    done = run_ranks(ranks, arguments, timeout=timeout).check()
    with open(out / "report.json") as file:
        return done.seconds, json.load(file)


def read_file(path: Path) -> float:
    """Bytes per second of reading a file once, as `cat FILE > /dev/null` does: read(2) into one buffer."""
    buffer, total = bytearray(1 << 17), 0
    start = time.perf_counter()
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            total += count
    return total / (time.perf_counter() - start)


def loading(weights: Path, out: Path, ranks: int, repetitions: int, say) -> dict:
    """Weights into ranks from the disk cache, against reading the file, in turns."""
    read_file(weights)
    pairs = []
    for _ in range(repetitions):
        cat = read_file(weights)
        _, report = job(ranks, out, task="throughput", weights__file=weights, throughput__sequences=ranks,
                        throughput__prompt_tokens=1, throughput__output_tokens=1)
        pairs.append((report["loading"]["read_bytes_per_s"], cat))
        say(f"load: {pairs[-1][0] / 1e9:.2f} GB/s by {ranks} ranks, reading alone {cat / 1e9:.2f} GB/s")
    return {"load_gb_s": median(p[0] for p in pairs) / 1e9, "read_gb_s": median(p[1] for p in pairs) / 1e9,
            "ratio": median(p[0] / p[1] for p in pairs), "ratio_all": [p[0] / p[1] for p in pairs]}


def first_token(model: Path, out: Path, ranks: int, repetitions: int, say) -> dict:
    """A job whose requests want one token each: from before mpiexec to its end, which comes after the first token."""
    seconds, parts = [], {}
    for _ in range(repetitions):
        wall, report = job(ranks, out, task="throughput", weights__file=model, throughput__sequences=ranks,
                           throughput__prompt_tokens=8, throughput__output_tokens=1)
        seconds.append(wall)
        parts = {"startup_s": report["run"]["startup_s"], "load_s": report["loading"]["load_max_s"],
                 "ttft_s": report["latency"]["ttft_p50_ms"] / 1e3, "layout": report["run"]["layout"]}
        say(f"start-up: {ranks} ranks, whole job of one token each: {wall:.2f} s")
    return {"ranks": ranks, "seconds": median(seconds), "seconds_all": seconds, **parts}


def many_ranks(model: Path, out: Path, ranks: int, requests: int, say) -> dict:
    """The shipped model, one expert of one layer per rank."""
    wall, report = job(ranks, out, task="throughput", weights__file=model, throughput__sequences=requests,
                       throughput__prompt_tokens=32, throughput__output_tokens=48)
    say(f"{ranks} ranks, {requests} requests: {wall:.1f} s")
    return {"ranks": ranks, "requests": requests, "seconds": wall, "layout": report["run"]["layout"],
            "output_tokens_per_s": report["throughput"]["output_tokens_per_s"]}
