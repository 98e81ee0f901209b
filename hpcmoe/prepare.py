"""What rank 0 makes of a job before anything is loaded: all that can be checked is."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from hpcmoe import placing, predicting
from hpcmoe.compute.step import Work
from hpcmoe.config import JobConfig, ModelConfig
from hpcmoe.data.outputs import write_outputs
from hpcmoe.data.placement import Placement
from hpcmoe.data.requests import Request, read_requests, synthetic_requests
from hpcmoe.data.tokenizer import Tokenizer, text_installed
from hpcmoe.data.weights import WeightsFile
from hpcmoe.errors import UserError
from hpcmoe.files import check_folder
from hpcmoe.model import capacity
from hpcmoe.parallel import layout as layouts
from hpcmoe.parallel.layout import Layout


@dataclass
class Prepared:
    """A job that can begin. stored: the type of the file's weights; context: longest prompt + output.
    requests and tokenizer stay on rank 0."""

    job: JobConfig
    model: ModelConfig
    layout: Layout
    why: str
    context: int
    stored: str
    placement: Placement | None
    requests: list[Request] = field(default_factory=list)
    tokenizer: Tokenizer | None = None

    def public(self) -> "Prepared":
        return Prepared(self.job, self.model, self.layout, self.why, self.context, self.stored, self.placement)


def prepare(job: JobConfig, ranks: int) -> Prepared:
    """Reads and checks a job for so many ranks. Raises UserError."""
    check_folder(job.output.dir)
    if job.run.cluster:
        predicting.read(job.run.cluster)
    if job.output.trace:
        check_folder(os.path.dirname(job.output.trace) or ".")
    with WeightsFile(job.weights.file) as file:
        model, stored = file.config, file.dtype
        layout, why = layouts.choose(job.layout, ranks, model)
        placement = placing.placement_of(job, model, layout)
        tokenizer = None
        if file.tokenizer_json and (text_installed() or _has_text(job)):
            tokenizer = Tokenizer.from_json(file.tokenizer_json, file.chat_template, file.special, model.bos_id)
    capacity.check(job.run, model.router)
    if job.run.context > model.context:
        raise UserError(f"job: run.context = {job.run.context}: expected at most the model's {model.context} tokens")
    if job.task == "throughput":
        requests = synthetic_requests(job.throughput, model)
    else:
        requests = read_requests(job.requests.file, tokenizer, job.sampling, model, job.task, job.run.context, job.requests.limit)
    longest = max((len(r.tokens) + r.max_tokens for r in requests if not r.error), default=0)
    if longest == 0:
        first = requests[0]
        path = write_outputs(job.output.dir, job.task, requests, [], tokenizer, os.path.basename(job.weights.file))
        raise UserError(f"{job.requests.file}: none of its {len(requests)} requests can run; the first: "
                        f"line {first.line}: {first.error} (the others: {path})")
    return Prepared(job, model, layout, why, job.run.context or longest, stored, placement, requests, tokenizer)


def _has_text(job: JobConfig) -> bool:
    """Whether a job cannot do without a tokenizer."""
    return job.task != "throughput" and not job.requests.file.endswith((".h5", ".hdf5"))


def to_work(r: Request) -> Work:
    """The part of a request that leaders need."""
    return Work(r.index, r.tokens, r.max_tokens, r.temperature, r.top_k, r.top_p, r.seed, tuple(r.stop_ids), r.logprobs)
