"""What each replica did of the requests that all replicas share."""

from __future__ import annotations

from hpcmoe.report.record import RankRecord


def replicas(records: list[RankRecord], steps: dict[int, list[tuple]], elapsed: float) -> list[dict]:
    """A row per replica, in order. steps: by replica, (start_s, end_s, ...); elapsed: seconds of the run, of which
    the replicas' tokens/s are taken, so that they add up to the run's."""
    return [_replica(dp, [r for r in records if r.dp == dp], steps.get(dp, []), elapsed)
            for dp in sorted({r.dp for r in records})]


def _replica(dp: int, records: list[RankRecord], steps: list[tuple], elapsed: float) -> dict:
    requests = [q for r in records for q in r.requests]
    prompt, output = (sum(getattr(q, name) for q in requests) for name in ("prompt_tokens", "output_tokens"))
    last = max((q.end_s for q in requests), default=None)
    return {"dp": dp, "ranks": len(records), "requests": len(requests), "prompt_tokens": prompt, "output_tokens": output,
            "output_tokens_per_s": output / elapsed if elapsed else None,
            "total_tokens_per_s": (prompt + output) / elapsed if elapsed else None,
            "busy_s": _covered(steps), "last_finish_s": last, "idle_end_s": max(0.0, elapsed - (last or 0.0))}


def _covered(steps: list[tuple]) -> float:
    """Seconds in which at least one of the steps was in flight."""
    total = end = 0.0
    for start, stop, *_ in sorted(steps):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total
