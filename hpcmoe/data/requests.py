"""Requests: what to run, from JSONL in the OpenAI batch form, plain text, or HDF5 token ids.

A request that cannot run stays in the list with its error, so that the output has a row for it;
a file that cannot be read at all is a UserError.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any, Iterator

import numpy as np

from hpcmoe.config import ModelConfig, SamplingJob, ThroughputJob
from hpcmoe.data import batchform
from hpcmoe.data.batchform import SETTINGS, Ask, Malformed
from hpcmoe.data.idsfile import read_ids
from hpcmoe.errors import UserError, at

# A line longer than this is refused unread: a million tokens of prompt fit several times.
LONGEST_LINE = 64 * 2**20
_BOM = b"\xef\xbb\xbf"


@dataclass(eq=False)
class Request:
    """One request, ready to run, or with `error` set and no tokens.

    index: place in the input from 0, error rows counted; line: line of the file from 1, 0 for
    HDF5; tokens: prompt, int32 [n]; max_tokens: output tokens at most (0 for task score);
    temperature 0: greedy; top_k 0: no limit; stop_ids: the token ids that end this request, with
    ignore_eos and without ids of its own none; stop: texts at which the output is cut; kind:
    completion, chat, text or ids; error, error_code: why it cannot run, for people and programs.
    """

    index: int
    line: int = 0
    custom_id: str = ""
    tokens: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    max_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    logprobs: bool = False
    kind: str = "completion"
    error: str = ""
    error_code: str = ""


@dataclass(frozen=True)
class _Maker:
    """What turns an Ask into a Request: the tokenizer, the model, the job's defaults."""

    path: str
    tokenizer: Any
    defaults: dict[str, Any]
    model: ModelConfig
    task: str
    context: int

    def request(self, request: Request, ask: Ask) -> Request:
        """`request` filled in; Malformed where the prompt does not fit the model."""
        settings = {**self.defaults, **ask.settings}
        tokens = self._tokens(ask)
        if len(tokens) == 0:
            raise Malformed("empty_prompt", "the prompt has no tokens")
        self._check_length(len(tokens), settings["max_tokens"])
        wrong = np.flatnonzero((tokens < 0) | (tokens >= self.model.vocab))
        if len(wrong):
            raise Malformed("token_out_of_range", f"token {tokens[wrong[0]]} at place {wrong[0]} of "
                            f"the prompt: expected 0 to {self.model.vocab - 1}, the vocabulary")
        if ask.stop and self.tokenizer is None:
            raise Malformed("unsupported_field", "body.stop needs a tokenizer, and the weights hold "
                            "none: expected body.stop_token_ids")
        ends = () if settings["ignore_eos"] else self.model.stop_ids
        for name in SETTINGS:
            setattr(request, name, settings[name])
        if self.task == "score":
            request.max_tokens = 0
        request.tokens = np.asarray(tokens, dtype=np.int32)
        request.stop_ids = tuple(sorted({*ends, *ask.stop_ids}))
        request.stop, request.logprobs, request.kind = ask.stop, ask.logprobs, ask.kind
        return request

    def _check_length(self, prompt: int, max_tokens: int) -> None:
        """Malformed where prompt and output do not fit the context."""
        if self.task == "score":
            if prompt < 2:
                raise Malformed("prompt_too_short", "a text of one token has nothing to score: "
                                "expected 2 or more")
            max_tokens = 0
        if prompt + max_tokens > self.context:
            added = f" and {max_tokens} tokens of output" if max_tokens else ""
            raise Malformed("prompt_too_long", f"a prompt of {prompt} tokens{added} make "
                            f"{prompt + max_tokens}: expected at most {self.context}, the context")

    def _tokens(self, ask: Ask) -> np.ndarray:
        if not isinstance(ask.prompt, str) and ask.kind != "chat":
            return np.asarray(ask.prompt, dtype=np.int64)
        if self.tokenizer is None:
            raise UserError(f"{self.path}: holds text, and there is no tokenizer in the weights: "
                            "expected token ids (a list as body.prompt, or HDF5)")
        try:
            if ask.kind != "chat":
                return self.tokenizer.encode(ask.prompt)
            text = self.tokenizer.chat(ask.prompt, answer=self.task != "score")
            return self.tokenizer.encode(text, bos=False)
        except UserError as error:
            raise Malformed("invalid_prompt", str(error)) from error


def read_requests(path, tokenizer, sampling: SamplingJob, model: ModelConfig, task: str,
                  context: int = 0, limit: int = 0) -> list[Request]:
    """All requests of a file in its order, malformed ones with their `error`.

    The suffix tells the form: .jsonl, .txt, .h5 or .hdf5. tokenizer: None where there is none;
    sampling: what requests that do not say use; task "score": the prompts are the texts to
    score; context: longest prompt + output in tokens (0: the model's); limit: stop after so many.
    Raises UserError for a file that cannot be read, holds no request, or holds text while there
    is no tokenizer, and for defaults that are out of range.
    """
    path = os.fspath(path)
    readers = {".jsonl": _read_jsonl, ".txt": _read_text, ".h5": _read_h5, ".hdf5": _read_h5}
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in readers:
        raise at(path, "suffix", suffix, "a file of requests named .jsonl, .txt, .h5 or .hdf5")
    if limit < 0:
        raise at("requests", "limit", limit, "an integer >= 0")
    maker = _Maker(path, tokenizer, _defaults(sampling), model, task,
                   min(context or model.context, model.context))
    found: list[Request] = []
    try:
        if os.path.isdir(path):
            raise UserError(f"{path}: is a folder: expected a file of requests")
        for request in readers[suffix](path, maker):
            found.append(request)
            if len(found) == limit:
                break
    except OSError as error:
        raise UserError(f"{path}: cannot read the requests: {error.strerror or error}") from error
    if not found:
        raise UserError(f"{path}: holds no request")
    return found


def _defaults(sampling: SamplingJob) -> dict[str, Any]:
    try:
        return {name: batchform.setting(name, getattr(sampling, name), f"sampling.{name}")
                for name in SETTINGS}
    except Malformed as error:
        raise UserError(str(error)) from error


# ---------------------------------------------------------------- lines
def _lines(path: str) -> Iterator[tuple[int, str | Malformed]]:
    """Number from 1 and text of each line that is not blank, or what is wrong with it."""
    with open(path, "rb") as file:
        number = 0
        while raw := file.readline(LONGEST_LINE + 1):
            number += 1
            if number == 1:
                if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
                    raise UserError(f"{path}: is UTF-16: expected UTF-8")
                raw = raw.removeprefix(_BOM)
            if len(raw) > LONGEST_LINE and not raw.endswith(b"\n"):
                while raw and not raw.endswith(b"\n"):
                    raw = file.readline(LONGEST_LINE)
                yield number, Malformed("line_too_long", f"the line has more than {LONGEST_LINE} bytes")
                continue
            try:
                text = raw.decode("utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                yield number, Malformed("invalid_utf8", f"not UTF-8: byte {raw[error.start]:#04x} "
                                        f"at place {error.start} of the line")
                continue
            if text.strip():
                yield number, text


def _read_jsonl(path: str, maker: _Maker) -> Iterator[Request]:
    line_of: dict[str, int] = {}
    for index, (number, text) in enumerate(_lines(path)):
        request = Request(index, number)
        try:
            if isinstance(text, Malformed):
                raise text
            doc = batchform.document(text)
            _claim(request, batchform.custom_id(doc), line_of, f"line {number}")
            yield maker.request(request, batchform.ask(doc, maker.task))
        except Malformed as error:
            yield _failed(request, error)
        except RecursionError:
            # What the parser can nest, printing the value in a message may not.
            yield _failed(request, Malformed("invalid_json", "nested too deeply"))


def _read_text(path: str, maker: _Maker) -> Iterator[Request]:
    for index, (number, text) in enumerate(_lines(path)):
        request = Request(index, number, f"line-{number}", kind="text")
        try:
            if isinstance(text, Malformed):
                raise text
            yield maker.request(request, Ask("text", text))
        except Malformed as error:
            yield _failed(request, error)


def _read_h5(path: str, maker: _Maker) -> Iterator[Request]:
    row_of: dict[str, int] = {}
    least_tokens = 0 if maker.task == "score" else 1
    for index, (ids, values) in enumerate(read_ids(path)):
        request = Request(index, kind="ids")
        try:
            name = batchform.custom_id({"custom_id": values.pop("custom_id", f"row-{index}")})
            _claim(request, name, row_of, f"row {index}")
            settings = {name: batchform.setting(name, value, name, least_tokens)
                        for name, value in values.items()}
            yield maker.request(request, Ask("ids", ids, settings))
        except Malformed as error:
            yield _failed(request, error)


def _claim(request: Request, name: str, place_of: dict[str, str], place: str) -> None:
    """Give `name` to the request. A name that is taken is refused and not given, so that in the
    output a custom_id stands for one request."""
    if name in place_of:
        raise Malformed("duplicate_custom_id", f"custom_id {batchform.short(name)} was given to "
                        f"{place_of[name]} already")
    place_of[name] = place
    request.custom_id = name


def _failed(request: Request, error: Malformed) -> Request:
    request.error, request.error_code = str(error), error.code
    return request


# ---------------------------------------------------------------- synthetic
def synthetic_requests(job: ThroughputJob, model: ModelConfig) -> list[Request]:
    """The batch of task throughput: random token ids, all outputs of full length, greedy.

    Raises UserError where a size is below 1 or a sequence does not fit the model's context.
    """
    for name in ("sequences", "prompt_tokens", "output_tokens"):
        if getattr(job, name) < 1:
            raise at("throughput", name, getattr(job, name), "an integer >= 1")
    if job.seed < 0:
        raise at("throughput", "seed", job.seed, "an integer >= 0")
    length = job.prompt_tokens + job.output_tokens
    if length > model.context:
        raise UserError(f"throughput: prompt_tokens = {job.prompt_tokens} and output_tokens = "
                        f"{job.output_tokens} make {length}: expected at most {model.context}, "
                        f"the model's context")
    random = np.random.default_rng(job.seed)
    return [Request(j, custom_id=f"synthetic-{j}", max_tokens=job.output_tokens, ignore_eos=True,
                    tokens=random.integers(0, model.vocab, job.prompt_tokens, dtype=np.int32),
                    seed=job.seed, kind="ids")
            for j in range(job.sequences)]
