"""Outputs: one JSONL row per request in the OpenAI batch form, and HDF5 for scores.

Files are written under a temporary name in their folder, flushed to disk and renamed: under its
final name a file is whole or not there.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hpcmoe.data.requests import Request
from hpcmoe.files import replacing

OUTPUTS = "outputs.jsonl"
SCORES = "scores.h5"
SCORES_VERSION = 1


@dataclass(eq=False)
class Result:
    """What came of one request.

    tokens: the output tokens, int32 [n] (with the stop token, where one ended it); logprobs: of
    the output tokens, float64 [n] or None; for task score of prompt tokens 1 .. n - 1;
    finish_reason: "stop", "length" or "score".
    """

    index: int
    tokens: np.ndarray
    logprobs: np.ndarray | None = None
    finish_reason: str = "length"


# ---------------------------------------------------------------- rows
def write_outputs(dir, task: str, requests: list[Request], results: list[Result], tokenizer,
                  model_name: str, created: int | None = None) -> Path:
    """Write outputs.jsonl, and for task score scores.h5, into `dir`; the path of the first.

    One row per request in the order of `requests`, whatever that of `results`. tokenizer: None
    leaves texts empty; created: seconds since 1970 in every row (None: now).
    Raises UserError where a file cannot be written.
    """
    made = int(time.time()) if created is None else created
    of = {result.index: result for result in results}
    path = Path(dir) / OUTPUTS
    with contextlib.ExitStack() as stack:
        if task == "score":  # renamed last of all: both files are of this run, or neither
            temporary = stack.enter_context(replacing(Path(dir) / SCORES))
            _write_scores(temporary, requests, of, model_name)
        temporary = stack.enter_context(replacing(path))
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            for request in requests:
                row = _row(task, request, of.get(request.index), tokenizer, model_name, made)
                file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
    return path


def _row(task, request: Request, result: Result | None, tokenizer, model_name, created) -> dict:
    row = {"id": f"batch_req_{request.index}", "custom_id": request.custom_id or None,
           "response": None, "error": None}
    if request.error or result is None:
        row["error"] = {"code": request.error_code or "not_run",
                        "message": request.error or "the job ended without a result for this request",
                        "line": request.line or None}
        return row
    make = _score if task == "score" else _chat if request.kind == "chat" else _completion
    body = make(request, result, tokenizer)
    made = len(result.tokens) if task != "score" else 0
    body = {"id": f"cmpl-{request.index}", "created": created, "model": model_name, **body,
            "usage": {"prompt_tokens": len(request.tokens), "completion_tokens": made,
                      "total_tokens": len(request.tokens) + made}}
    row["response"] = {"status_code": 200, "request_id": f"req-{request.index}", "body": body}
    return row


def output_text(request: Request, result: Result, tokenizer) -> tuple[str, str]:
    """Text and finish reason: without the stop token, cut before the first stop text."""
    ids = result.tokens
    if result.finish_reason == "stop" and len(ids) and int(ids[-1]) in request.stop_ids:
        ids = ids[:-1]
    if tokenizer is None:
        return "", result.finish_reason
    text = tokenizer.decode(ids)
    cuts = [at for at in (text.find(stop) for stop in request.stop) if at >= 0]
    return (text[:min(cuts)], "stop") if cuts else (text, result.finish_reason)


def _completion(request: Request, result: Result, tokenizer) -> dict:
    text, reason = output_text(request, result, tokenizer)
    logprobs = None
    if request.logprobs and result.logprobs is not None:
        pieces, offsets = _pieces(result.tokens, tokenizer, len(text))
        logprobs = {"tokens": pieces, "text_offset": offsets, "top_logprobs": None,
                    "token_logprobs": [_json_number(p) for p in result.logprobs[:len(pieces)]]}
    return {"object": "text_completion",
            "choices": [{"index": 0, "text": text, "token_ids": _ids(result.tokens),
                         "logprobs": logprobs, "finish_reason": reason}]}


def _chat(request: Request, result: Result, tokenizer) -> dict:
    text, reason = output_text(request, result, tokenizer)
    logprobs = None
    if request.logprobs and result.logprobs is not None:
        pieces, _ = _pieces(result.tokens, tokenizer, len(text))
        logprobs = {"content": [
            {"token": piece, "logprob": _json_number(p), "bytes": list(piece.encode("utf-8")),
             "top_logprobs": []} for piece, p in zip(pieces, result.logprobs)]}
    return {"object": "chat.completion",
            "choices": [{"index": 0, "message": {"role": "assistant", "content": text},
                         "token_ids": _ids(result.tokens), "logprobs": logprobs,
                         "finish_reason": reason}]}


def _score(request: Request, result: Result, tokenizer) -> dict:
    """The row of a text that was scored, as a completion with echo and no output."""
    logprobs = None
    if request.logprobs:
        pieces, offsets = _pieces(request.tokens, tokenizer, None)
        logprobs = {"tokens": pieces, "text_offset": offsets, "top_logprobs": None,
                    "token_logprobs": [None] + [_json_number(p) for p in result.logprobs]}
    return {"object": "text_completion", "perplexity": _json_number(perplexity_of([result])),
            "log_probability": _json_number(np.sum(result.logprobs)), "scored_tokens": len(result.logprobs),
            "choices": [{"index": 0, "text": "", "logprobs": logprobs, "finish_reason": "length"}]}


def perplexity_of(results: list[Result]) -> float:
    """exp(-mean log-probability) over all scored tokens of all results; NaN where there are none."""
    scored = [r.logprobs for r in results if r.logprobs is not None and len(r.logprobs)]
    if not scored:
        return math.nan
    mean = sum(float(np.sum(p)) for p in scored) / sum(len(p) for p in scored)
    return math.exp(-mean) if mean > -700 else math.inf


def _pieces(ids, tokenizer, length: int | None) -> tuple[list[str], list[int]]:
    """Text of each token and where it begins, for the tokens whose text begins before `length`."""
    pieces = tokenizer.pieces(ids) if tokenizer is not None else [""] * len(ids)
    offsets = np.cumsum([0] + [len(p) for p in pieces]).tolist()[:-1]
    if length is not None and offsets and length < offsets[-1] + len(pieces[-1]):
        keep = sum(offset < length for offset in offsets)
        pieces, offsets = pieces[:keep], offsets[:keep]
    return pieces, offsets


def _ids(tokens) -> list[int]:
    return [int(t) for t in tokens]


def _json_number(value) -> float | None:
    """JSON has no infinities: a probability of 0 has the logarithm null."""
    return float(value) if math.isfinite(value) else None


# ---------------------------------------------------------------- scores
def _write_scores(path: str, requests: list[Request], of: dict[int, Result], model_name: str) -> None:
    """HDF5, described in docs/requests.md: tokens and log-probabilities end to end, and offsets."""
    import h5py
    ran = [(r, of.get(r.index) if not r.error else None) for r in requests]
    lengths = [len(r.tokens) if result is not None else 0 for r, result in ran]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    columns: dict[str, Any] = {
        "tokens": np.concatenate([r.tokens for r, result in ran if result is not None]
                                 or [np.zeros(0)]).astype(np.int32),
        "offsets": offsets,
        # the first token of a text follows nothing, so that it has no probability
        "logprobs": np.concatenate([part for _, result in ran if result is not None
                                    for part in ([np.nan], result.logprobs)] or [np.zeros(0)]),
        "perplexity": np.array([math.nan if result is None else perplexity_of([result])
                                for _, result in ran]),
    }
    # Made in memory and written by ourselves: HDF5 crashes where a disk is full when it closes.
    image = io.BytesIO()
    with h5py.File(image, "w") as file:
        for name, values in columns.items():
            file[name] = values
        file.create_dataset("custom_id", data=[r.custom_id for r in requests], dtype=h5py.string_dtype())
        file.attrs["format"] = "hpcmoe-scores"
        file.attrs["version"] = SCORES_VERSION
        file.attrs["model"] = model_name
        file.attrs["perplexity"] = perplexity_of([result for _, result in ran if result is not None])
    with open(path, "wb") as file:
        file.write(image.getbuffer())


def show_texts(requests: list[Request], results: list[Result], tokenizer) -> None:
    """Prompt and generated text of each request, on standard output."""
    of = {result.index: result for result in results}
    for r in requests:
        if r.index not in of:
            continue
        if tokenizer is None:
            prompt, text = r.tokens.tolist(), of[r.index].tokens.tolist()
        else:
            prompt, (text, _) = tokenizer.decode(r.tokens), output_text(r, of[r.index], tokenizer)
        print(f"--- {r.custom_id or r.index}\n{prompt} >>>{text}\n")
