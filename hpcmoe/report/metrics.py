"""From what the ranks recorded to the content of report.json.

Every figure is listed with its unit and formula in docs/report.md. A figure that has no
value in a run (no token was generated, say) is None, never 0 or NaN.
"""

from __future__ import annotations

from math import fsum

import numpy as np

from hpcmoe.report.capacity import capacity
from hpcmoe.report.expert_load import expert_load
from hpcmoe.report.placed import placed
from hpcmoe.report.rebalancing import rebalancing
from hpcmoe.report.record import MOVES, RankRecord
from hpcmoe.report.replicas import replicas

FORMAT = "hpcmoe-report"
VERSION = 1
SUMS = ("EMBED", "REDUCE_ATTEND", "REDUCE_MERGE")  # over tensor shards
PHASES = {"attention": ("ATTEND",), "gate": ("GATE",), "counts": ("COUNTS",), "dispatch": ("DISPATCH",), "expert": ("EXPERT",),
          "combine": ("COMBINE",), "merge": ("MERGE",), "reduce": SUMS, "recv": ("RECV",), "send": ("SEND",), "sample": ("SAMPLE",)}
# awaited while another stage works: the pipeline had nothing for this rank
IDLE_WAITS = ("RECV",)
# messages that this stage needs to go on: their rows are awaited although it could work if they were here
EXPOSED = ("COUNTS", "DISPATCH", "COMBINE", *SUMS, "SEND")
MOE = ("GATE", "COUNTS", "DISPATCH", "EXPERT", "COMBINE", "MERGE", "REDUCE_MERGE")


def metrics(records: list[RankRecord], facts: dict) -> dict:
    """The report of a run, as plain data for JSON.

    records: one per rank, in any order. facts: what the run was, copied into the section `run`
    (task, layout, leaders, model, versions, mpi, transport, schedule, linear, dtype, threads,
    startup_s, ...) but for `config` (the whole job, a section of its own), `errors` (number of
    requests that failed), `weights_file_bytes`, `bubble_predicted_share` (parallel.replay), and `placement` (placing.placement_facts), where there is one.
    Raises ValueError where there are no records, or two of them finished one request.
    """
    if not records:
        raise ValueError("a report needs the record of at least one rank")
    records = sorted(records, key=lambda r: r.rank)
    elapsed = max(r.run_s for r in records)
    requests = sorted((q for r in records for q in r.requests), key=lambda q: q.index)
    if len({q.index for q in requests}) < len(requests):
        raise ValueError("two ranks recorded the same request")
    throughput = _throughput(records, requests, elapsed)
    facts = dict(facts)
    config = facts.pop("config", {})
    failed = facts.pop("errors", 0)
    placement = facts.pop("placement", None)
    predicted = facts.pop("bubble_predicted_share", None)
    file_bytes = facts.pop("weights_file_bytes", None)
    phases = _phases(records, elapsed)
    load = expert_load(records)
    sections = {} if placement is None else {"placement": placed(records, placement, facts.get("transport", ""), load["layers"])}
    if config.get("run", {}).get("capacity_factor"):
        sections["capacity"] = capacity(records, config["run"])
    if config.get("run", {}).get("rebalance_every"):
        sections["rebalancing"] = rebalancing(records)
    return {
        "format": FORMAT,
        "format_version": VERSION,
        "elapsed_time": elapsed,
        "num_requests": len(requests),
        "total_num_tokens": throughput["total_tokens"],
        "requests_per_second": throughput["requests_per_s"],
        "tokens_per_second": throughput["total_tokens_per_s"],
        "run": facts | {
            "ranks": len(records),
            "nodes": len({r.node for r in records}),
            "hosts": list(dict.fromkeys(r.host for r in records)),
        },
        "requests": {"finished": len(requests), "failed": failed},
        "throughput": throughput,
        "per_replica": replicas(records, merged_steps(records), elapsed),
        "latency": _latency(requests),
        "steps": _step_figures(records),
        "phases": phases,
        "communication": _communication(records, elapsed) | {"bubble_predicted_share": predicted},
        "traffic": _traffic(records, throughput["prefill_rows"] + throughput["decode_rows"]),
        "expert_load": load,
        "compute": _compute(records),
        "memory": _memory(records),
        "loading": _loading(records, file_bytes),
        "per_rank": [_rank(r, elapsed) for r in records],
        "config": config,
    } | sections


def _over(amount: float, by: float | None) -> float | None:
    return amount / by if by else None


def _mean(values) -> float:
    values = list(values)
    return fsum(values) / len(values)


def _spread(name: str, unit: str, values: list[float]) -> dict:
    """Mean and percentiles (linear between neighbours) of a distribution, None when empty."""
    if not values:
        return {f"{name}_{what}_{unit}": None for what in ("mean", "p50", "p90", "p99")}
    p50, p90, p99 = (float(p) for p in np.percentile(values, (50, 90, 99)))
    return {f"{name}_mean_{unit}": _mean(values), f"{name}_p50_{unit}": p50,
            f"{name}_p90_{unit}": p90, f"{name}_p99_{unit}": p99}


# ---------------------------------------------------------------- tokens, requests, steps
def _throughput(records, requests, elapsed: float) -> dict:
    prompt = sum(q.prompt_tokens for q in requests)
    output = sum(q.output_tokens for q in requests)
    prefill_s, decode_s = prefill_and_decode_s(records, elapsed)
    prefill_rows = sum(s.prefill_rows for r in records for s in r.steps)
    decode_rows = sum(s.decode_rows for r in records for s in r.steps)
    rates = {
        "requests_per_s": _over(len(requests), elapsed),
        "output_tokens_per_s": _over(output, elapsed),
        "total_tokens_per_s": _over(prompt + output, elapsed),
        "prefill_tokens_per_s": _over(prefill_rows, prefill_s),
        "decode_tokens_per_s": _over(decode_rows, decode_s),
    }
    per_rank = {name + "_per_rank": None if rate is None else rate / len(records)
                for name, rate in rates.items()}
    return {"elapsed_s": elapsed, "prompt_tokens": prompt, "output_tokens": output,
            "total_tokens": prompt + output, "prefill_rows": prefill_rows,
            "decode_rows": decode_rows, "prefill_s": prefill_s, "decode_s": decode_s,
            **rates, **per_rank}


def merged_steps(records: list[RankRecord]) -> dict[int, list[tuple]]:
    """Per replica, its steps as (start_s, end_s, prefill rows, decode rows), over all leaders.

    A step is one (step, micro) pair; it lasts from its first leader's start to its last end.
    Steps without rows are left out.
    """
    steps = {}
    for record in records:
        for s in record.steps:
            key = (record.dp, s.step, s.micro)
            start, end, prefill, decode = steps.get(key, (s.start_s, s.end_s, 0, 0))
            steps[key] = (min(start, s.start_s), max(end, s.end_s),
                          prefill + s.prefill_rows, decode + s.decode_rows)
    merged = {}
    for key in sorted(steps):
        if steps[key][2] + steps[key][3]:
            merged.setdefault(key[0], []).append(steps[key])
    return merged


def prefill_and_decode_s(records: list[RankRecord], elapsed: float) -> tuple[float, float]:
    """The run's time divided into prefill and decode; their sum is `elapsed`.

    At every instant the steps then in flight in a replica share it equally, and a step's part is
    divided in proportion to its prefill and decode rows. Time with no step in flight is divided
    as the rest is. The result is the mean over replicas. (0, 0) where no step ran.
    """
    shares = []
    for steps in merged_steps(records).values():
        start, end, prefill, decode = (np.array(c, dtype=float) for c in zip(*steps))
        times = np.concatenate([start, end])
        order = np.argsort(times, kind="stable")
        in_flight = np.cumsum(np.where(order < len(start), 1, -1))
        # clock[i]: integral of dt / (steps in flight) up to the i-th boundary
        clock = np.zeros(len(times))
        clock[1:] = np.cumsum(np.diff(times[order]) / np.maximum(in_flight[:-1], 1))
        at = np.empty(len(times))
        at[order] = clock
        part = at[len(start):] - at[:len(start)]
        if part.sum() > 0:
            shares.append(float((part * prefill / (prefill + decode)).sum() / part.sum()))
    if not shares:
        return 0.0, 0.0
    prefill_s = elapsed * _mean(shares)
    return prefill_s, elapsed - prefill_s


def _latency(requests) -> dict:
    spoken = [q for q in requests if q.output_tokens > 0]
    longer = [q for q in spoken if q.output_tokens > 1]
    return {
        **_spread("ttft", "ms", [1e3 * q.first_token_s for q in spoken]),
        **_spread("ttft_admitted", "ms", [1e3 * (q.first_token_s - q.admitted_s)
                                          for q in spoken]),
        **_spread("tpot", "ms", [1e3 * (q.end_s - q.first_token_s) / (q.output_tokens - 1)
                                 for q in longer]),
        **_spread("request", "ms", [1e3 * q.end_s for q in requests]),
    }


def _step_figures(records) -> dict:
    steps = [s for replica in merged_steps(records).values() for s in replica]
    rows = [s[2] + s[3] for s in steps]
    decoding = [1e3 * (s[1] - s[0]) for s in steps if not s[2]]
    return {"steps": len(steps), "rows_mean": _mean(rows) if rows else None,
            "rows_max": max(rows) if rows else None,
            **_spread("step", "ms", [1e3 * (s[1] - s[0]) for s in steps]),
            **_spread("decode_step", "ms", decoding)}


# ---------------------------------------------------------------- where the time went
def _idle_s(record: RankRecord, elapsed: float) -> float:
    seen = fsum([*record.busy_s.values(), *record.wait_s.values()])
    return _waits(record, IDLE_WAITS) + max(0.0, elapsed - seen)


def _exposed_s(record: RankRecord) -> float:
    """Seconds that messages cost this rank, waiting for them or handing them to MPI: what compute has not hidden."""
    return _waits(record, EXPOSED) + _sum(record.post_s, EXPOSED)


def _bubble_s(record: RankRecord, end_s: dict[int, float]) -> float:
    """Seconds in which the pipeline had nothing for this rank's stage: it waited for another one, or had ended before its replica did (end_s)."""
    return _waits(record, IDLE_WAITS) + end_s[record.dp] - record.run_s


def _waits(record: RankRecord, kinds) -> float:
    return _sum(record.wait_s, kinds)


def _sum(amounts: dict, kinds) -> float:
    return fsum(amounts.get(kind, 0) for kind in kinds)


def _phases(records, elapsed: float) -> dict:
    phases = {}
    for name, kinds in PHASES.items():
        busy = [_sum(r.busy_s, kinds) for r in records]
        wait = [0.0 if kinds == IDLE_WAITS else _waits(r, kinds) for r in records]
        phases[name] = _phase([b + w for b, w in zip(busy, wait)], elapsed) | {
            "busy_s": _mean(busy), "wait_s": _mean(wait), "gpu_s": _mean(_sum(r.device_s, kinds) for r in records)}
    waits = _mean(_waits(r, IDLE_WAITS) for r in records)
    phases["idle"] = _phase([_idle_s(r, elapsed) for r in records], elapsed) | {
        "busy_s": 0.0, "wait_s": waits, "gpu_s": 0.0}
    return phases


def _phase(seconds: list[float], elapsed: float) -> dict:
    mean = _mean(seconds)
    return {"mean_s": mean, "min_s": min(seconds), "max_s": max(seconds),
            "share": _over(mean, elapsed)}


def _communication(records, elapsed: float) -> dict:
    exposed = [_exposed_s(r) for r in records]
    leaders = [r for r in records if r.leader] or records
    end_s = {}
    for r in records:
        end_s[r.dp] = max(r.run_s, end_s.get(r.dp, r.run_s))
    bubble = _mean(_bubble_s(r, end_s) for r in leaders)
    moe = fsum(r.work_s(k) + r.wait_s.get(k, 0.0) for r in records for k in MOE)
    expert = fsum(r.work_s("EXPERT") for r in records)
    return {"exposed_comm_s": fsum(exposed), "exposed_comm_mean_s": _mean(exposed), "exposed_comm_min_s": min(exposed),
            "exposed_comm_max_s": max(exposed), "exposed_wait_mean_s": _mean(_waits(r, EXPOSED) for r in records),
            "exposed_post_mean_s": _mean(_sum(r.post_s, EXPOSED) for r in records),
            "exposed_comm_share": _over(_mean(exposed), elapsed),
            "exposed_comm_leaders_share": _over(_mean(_exposed_s(r) for r in leaders), elapsed),
            "bubble_s": bubble, "bubble_share": _over(bubble, elapsed),
            "expert_share_of_moe": _over(expert, moe)}


def _compute(records) -> dict:
    flop = float(sum(r.expert_flop for r in records))
    busy = fsum(r.work_s("EXPERT") for r in records)
    rate = _over(flop, busy)
    return {"expert_rows": sum(r.expert_rows for r in records if not r.shard), "expert_flop": flop,
            "expert_gflop_per_s_per_rank": None if rate is None else rate / 1e9}


# ---------------------------------------------------------------- bytes
def _traffic(records, rows: int) -> dict:
    columns = {"rows_own": "rows_own", "rows_within_nodes": "rows_intra",
               "rows_between_nodes": "rows_inter", "bytes_within_nodes": "bytes_intra",
               "bytes_between_nodes": "bytes_inter"}
    moves = {name: kinds for name, kinds in PHASES.items() if set(kinds) <= set(MOVES)}
    report = {move: {name: int(sum(_sum(getattr(r, source), kinds) for r in records)) for name, source in columns.items()}
              for move, kinds in moves.items()}
    report["total"] = {name: sum(report[move][name] for move in moves)
                       for name in ("bytes_within_nodes", "bytes_between_nodes")}
    report["total"]["bytes_per_token"] = _over(sum(report["total"].values()), rows)
    return report


def _memory(records) -> dict:
    report = {}
    for name in ("weights", "kv", "buffer", "peak_rss"):
        values = [int(getattr(r, name + "_bytes")) for r in records]
        report |= {f"{name}_mean_bytes": _mean(values), f"{name}_min_bytes": min(values),
                   f"{name}_max_bytes": max(values)}
    return report


def _loading(records, file_bytes: int | None) -> dict:
    read = [int(r.bytes_read) for r in records]
    seconds = [r.load_s for r in records]
    return {"load_mean_s": _mean(seconds), "load_max_s": max(seconds),
            "read_mean_bytes": _mean(read), "read_max_bytes": max(read),
            "read_total_bytes": sum(read), "weights_file_bytes": file_bytes,
            "read_over_file": _over(sum(read), file_bytes),
            "read_bytes_per_s": _over(sum(read), max(seconds))}


def _rank(r: RankRecord, elapsed: float) -> dict:
    return {"rank": r.rank, "host": r.host, "device": r.device, "node": r.node, "dp": r.dp, "stage": r.stage,
            "place": r.place, "shard": r.shard, "leader": bool(r.leader), "layers": [int(n) for n in r.layers],
            "slots": [int(n) for n in r.slots], "experts": [row.tolist() for row in r.seated[-1].expert_ls], "run_s": r.run_s,
            "expert_s": r.work_s("EXPERT"), "exposed_comm_s": _exposed_s(r), "exposed_post_s": _sum(r.post_s, EXPOSED),
            "idle_s": _idle_s(r, elapsed), "expert_rows": int(r.expert_rows),
            "weights_bytes": int(r.weights_bytes), "weights_predicted_bytes": int(r.weights_predicted_bytes), "kv_bytes": int(r.kv_bytes),
            "buffer_bytes": int(r.buffer_bytes), "peak_rss_bytes": int(r.peak_rss_bytes),
            "load_s": r.load_s, "read_bytes": int(r.bytes_read)}
