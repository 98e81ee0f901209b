"""The comparison of one data type: hpcmoe on its ranks and Hugging Face take turns, workload after workload."""

from __future__ import annotations

from statistics import median

import numpy as np

from hpcmoe import linear
from hpcmoe.errors import UserError
from peers import Peers
from workloads import Workload, step_bytes, step_flop

CLOSE = {"fp32": 1e-4, "bf16": 5e-2}  # median relative error of logits
EFFICIENT_ROWS = 1024  # the workload on which the MoE layer's efficiency is judged


def unavailable(dtype: str) -> str:
    """Why products in this data type cannot be had here, "" where they can."""
    try:
        linear.choose("onednn", dtype)
    except UserError as error:
        return str(error)
    return ""


def machine_peak(peers: Peers, dtype: str, seconds: float) -> dict:
    """GFLOP/s and GB/s of one rank alone and of all at once (their sum)."""
    alone = peers.ask(peers.ranks[0], "peak", dtype, seconds)
    together = peers.ask_ranks("peak", dtype, seconds)
    libraries = list(alone["gflops"])
    return {"gflops_one": alone["gflops"],
            "gflops_all": {name: sum(r["gflops"][name] for r in together) for name in libraries},
            "read_one_gb_s": alone["read_gb_s"], "read_all_gb_s": sum(r["read_gb_s"] for r in together)}


class Comparison:
    """Results of one data type, filled workload by workload. model: ModelConfig."""

    def __init__(self, peers: Peers, model, dtype: str, repetitions: int, peak: dict, say):
        self.peers, self.model, self.dtype, self.repetitions, self.peak, self.say = peers, model, dtype, repetitions, peak, say
        self.names: list[str] = []
        self.prefill_with = "eager"

    def run(self, w: Workload) -> dict:
        """One workload: prompts on both, logits compared, then turns."""
        peers = self.peers
        for line in peers.ranks:
            line.send(("start", w, self.repetitions, self.dtype))
        ready = peers.hear_ranks()
        result = {"workload": w._asdict(), "rows": w.rows, "dtype": self.dtype}
        if peers.hf:
            result["logits"] = self._same_logits(w, ready)
            result["hf_attempts_s"] = self._attempts(w)
            tried = {n: s for n, s in result["hf_attempts_s"].items() if not isinstance(s, str)}
            result["hf_implementation"] = min(tried, key=tried.get)
            if w.prefill:
                self.prefill_with = result["hf_implementation"]
        turns = [self._turn(w, result.get("hf_implementation")) for _ in range(self.repetitions)]
        for line in peers.ranks:
            line.send("finish")
        last = peers.hear_ranks()
        if peers.hf:
            peers.ask(peers.hf, "forget")
        return result | self._figures(w, turns, last)

    def _same_logits(self, w: Workload, ready: list) -> dict:
        """Relative error per row, |a - b| / |b| in the greatest norm, of the logits of the prompts and the warm-up steps."""
        index = np.concatenate([r["index"] for r in ready])
        order = np.argsort(index)
        ours = [np.concatenate(parts)[order] for parts in zip(*(r["logits"] for r in ready))]
        theirs = self.peers.ask(self.peers.hf, "start", w, self.prefill_with, [part.argmax(1) for part in ours[:-1]])
        errors = np.concatenate([np.abs(a - b).max(1) / np.abs(b).max(1) for a, b in zip(ours, theirs)])
        same = np.concatenate([a.argmax(1) == b.argmax(1) for a, b in zip(ours, theirs)])
        found = {"median": float(np.median(errors)), "max": float(errors.max()), "rows": len(errors),
                 "same_token": float(same.mean()), "limit": CLOSE[self.dtype], "close": float(np.median(errors)) <= CLOSE[self.dtype]}
        self.say(f"{w.name}: logits of {len(errors)} rows: relative error {found['median']:.1e} (median), "
                 f"{found['max']:.1e} (largest); same token in {found['same_token']:.2%}")
        return found

    def _attempts(self, w: Workload) -> dict:
        """Seconds of a step by implementation, or the reason why it was left out."""
        found = {}
        for name in self.names:
            found[name] = self.peers.ask(self.peers.hf, "fits", name, w) or self.peers.ask(self.peers.hf, "attempt", name)
            text = found[name] if isinstance(found[name], str) else f"{w.rows / found[name]:,.0f} tokens/s"
            self.say(f"{w.name}: transformers, {name}: {text}")
        return found

    def _turn(self, w: Workload, implementation: str | None) -> dict:
        """One repetition: hpcmoe, then the other."""
        for line in self.peers.ranks:
            line.send("go")
        told = self.peers.hear_ranks()
        ours = max(t["seconds"] for t in told) / w.steps
        turn = {"hpcmoe_s": ours, "ranks": told}
        text = f"{w.name}: hpcmoe {w.rows / ours:,.1f} tokens/s"
        if self.peers.hf:
            turn["hf_s"] = self.peers.ask(self.peers.hf, "go", implementation, w.steps) / w.steps
            text += f", transformers {w.rows / turn['hf_s']:,.1f}"
        self.say(text)
        return turn

    # ------------------------------------------------------------ figures
    def _figures(self, w: Workload, turns: list, last: list) -> dict:
        seconds = median(t["hpcmoe_s"] for t in turns)
        middle = min(turns, key=lambda t: abs(t["hpcmoe_s"] - seconds))["ranks"]
        found = {"hpcmoe_tokens_per_s": w.rows / seconds, "hpcmoe_all": [w.rows / t["hpcmoe_s"] for t in turns],
                 "share": self._share(w, seconds, last),
                 "moe_efficiency": sum(r["expert_s"] for r in middle) / sum(r["moe_s"] for r in middle),
                 "expert_gflops": sum(r["expert_flop"] / r["expert_s"] for r in middle) / 1e9,
                 "phases": [{"busy_s": r["busy_s"], "wait_s": r["wait_s"]} for r in middle]}
        if self.peers.hf:
            theirs = median(t["hf_s"] for t in turns)
            found |= {"hf_tokens_per_s": w.rows / theirs, "hf_all": [w.rows / t["hf_s"] for t in turns],
                      "ratio": theirs / seconds, "ratio_all": [t["hf_s"] / t["hpcmoe_s"] for t in turns],
                      "goal": w.goal.get(self.dtype)}
        loads = [np.array(r["load"][:2 * w.steps]) for r in last]
        for line, load in zip(self.peers.ranks, loads):
            line.send(("bare", load, self.dtype))
        found["bare_gflops"] = sum(self.peers.hear_ranks())
        found["expert_over_bare"] = found["expert_gflops"] / found["bare_gflops"]
        return found

    def _share(self, w: Workload, seconds: float, last: list) -> dict:
        """The time that this machine's peak would need, flop or bytes, over the time taken."""
        context = w.prompt / 2 if w.prefill else w.prompt + w.warm + self.repetitions * w.steps / 2
        hit = sum(float((np.array(r["load"]) > 0).sum(axis=(1, 2)).mean()) for r in last)
        item = 2 if self.dtype == "bf16" else 4
        flop = step_flop(self.model, w, context) / (max(self.peak["gflops_all"].values()) * 1e9)
        read = step_bytes(self.model, w, context, hit, len(last), item) / (self.peak["read_all_gb_s"] * 1e9)
        return {"flop": flop / seconds, "bytes": read / seconds, "bound": "flop" if flop > read else "bytes",
                "of_peak": max(flop, read) / seconds}
