"""Whatever the input file holds: error rows or one UserError, and the good requests run all the same."""

import io
import json
import math
import os
import tempfile
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from small_text import model, tokenizer

from hpcmoe.config import SamplingJob
from hpcmoe.data import batchform, idsfile
from hpcmoe.data.outputs import Result, write_outputs
from hpcmoe.data.requests import Request, read_requests
from hpcmoe.errors import UserError

FUZZ = settings(max_examples=120, deadline=None, derandomize=True,
                suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
SAMPLING = SamplingJob(max_tokens=8)
# HDF5 is read in another process each time, which takes a third of a second
FUZZ_HDF5 = settings(FUZZ, max_examples=40)
KNOWN = sorted(batchform._OWN | batchform._HARMLESS | set(batchform._NEUTRAL))

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(-2, 70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8)


@pytest.fixture
def folder(tmp_path):
    """Outputs are flushed to disk, some thousand times here: in memory where there is such a place."""
    if not os.path.isdir("/dev/shm"):
        yield tmp_path
    else:
        with tempfile.TemporaryDirectory(dir="/dev/shm") as made:
            yield Path(made)


def run(path, data: bytes, task: str, tokens: bool = True) -> list[Request]:
    """Read the file and write its outputs; every request is whole, or an error row with a reason."""
    path.write_bytes(data)
    made = tokenizer() if tokens else None
    try:
        requests = read_requests(path, made, SAMPLING, model(), task)
    except UserError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return []
    for index, request in enumerate(requests):
        assert request.index == index
        assert bool(request.error) == bool(request.error_code) == (len(request.tokens) == 0)
        assert request.tokens.dtype == np.int32 and len(request.error) < 1000
        if not request.error:
            assert len(request.tokens) + request.max_tokens <= 64
            assert 0 <= request.tokens.min() and request.tokens.max() < 400
            assert request.max_tokens >= (0 if task == "score" else 1) and 0 <= request.seed < 2**63
            assert math.isfinite(request.temperature) and request.temperature >= 0 and request.top_k >= 0
            assert 0 < request.top_p <= 1 and request.custom_id
    names = [r.custom_id for r in requests if r.custom_id]
    assert len(names) == len(set(names))
    results = [Result(r.index, np.array([5, 6]), np.zeros(len(r.tokens) - 1 if task == "score" else 2))
               for r in requests if not r.error]
    rows = write_outputs(path.parent, task, requests, results, made, "m").read_bytes().decode().split("\n")
    assert [json.loads(row)["custom_id"] or "" for row in rows[:-1]] == [r.custom_id for r in requests]
    return requests


@pytest.mark.parametrize("suffix", ["jsonl", "txt"])
@FUZZ
@given(data=st.binary(max_size=200), task=st.sampled_from(["generate", "score"]))
@example(data=b"\xef\xbb\xbf", task="generate")
@example(data=b"\0\n\r\n\x85\n\x0c", task="score")
def test_any_bytes(folder, suffix, data, task):
    run(folder / f"r.{suffix}", data, task)


@FUZZ
@given(doc=json_values | st.dictionaries(st.sampled_from(["custom_id", "method", "url", "body"]), json_values))
def test_any_json(folder, doc):
    run(folder / "r.jsonl", json.dumps(doc).encode(), "generate")


@settings(FUZZ, max_examples=200)
@given(body=st.dictionaries(st.sampled_from(KNOWN) | st.text(max_size=5), json_values, max_size=3),
       prompt=st.booleans(), ascii=st.booleans(), task=st.sampled_from(["generate", "score"]))
def test_any_value_in_any_field(folder, body, prompt, ascii, task):
    doc = {"custom_id": "a", "body": ({"prompt": "the word"} if prompt else {}) | body}
    text = json.dumps(doc, ensure_ascii=ascii)
    run(folder / "r.jsonl", text.encode("utf-8", "surrogatepass"), task)


messages = st.lists(st.dictionaries(st.sampled_from(["role", "content", "name", "audio"]),
                                    st.sampled_from(batchform.ROLES) | json_values, max_size=4), max_size=3)


@FUZZ
@given(messages=messages)
def test_any_messages(folder, messages):
    doc = {"custom_id": "a", "body": {"messages": messages}}
    run(folder / "r.jsonl", json.dumps(doc).encode(), "generate")


VALID = json.dumps({"custom_id": "id-1", "method": "POST", "url": "/v1/completions", "body": {
    "prompt": "In the beginning", "max_tokens": 5, "temperature": 0.5, "stop": ["x"], "seed": 3}}).encode()


def mutated(data: bytes):
    """`data` with up to 8 bytes changed, perhaps cut, perhaps with bytes put in."""
    changes = st.lists(st.tuples(st.integers(0, len(data) - 1), st.integers(0, 255)), max_size=8)
    return st.builds(_mutate, st.just(data), changes, st.integers(0, 2 * len(data)), st.binary(max_size=6))


def _mutate(data: bytes, changes, cut: int, insert: bytes) -> bytes:
    made = bytearray(data)
    for place, value in changes:
        made[place] = value
    return bytes(made[:cut]) if cut < len(made) else bytes(made[:cut - len(made)]) + insert + bytes(made[cut - len(made):])


@settings(FUZZ, max_examples=150)
@given(data=mutated(VALID))
def test_mutated_lines(folder, data):
    run(folder / "r.jsonl", data + b"\n" + VALID.replace(b"id-1", b"id-2"), "generate")


good_text = st.text(st.characters(codec="utf-8", exclude_characters="<"), min_size=1, max_size=12)
good_body = st.fixed_dictionaries(
    {"prompt": good_text | st.lists(st.integers(0, 399), min_size=1, max_size=20)},
    optional={"max_tokens": st.integers(1, 10), "temperature": st.floats(0.01, 2), "seed": st.integers(0, 2**63 - 1),
              "top_p": st.floats(0.01, 1), "top_k": st.integers(0, 500), "ignore_eos": st.booleans(),
              "stop": st.lists(good_text, max_size=3), "logprobs": st.booleans()})
# UTF-16's mark at the head of a file refuses the file
garbage = st.binary(max_size=40).map(lambda b: b.replace(b"\n", b"").replace(b"\r", b"")).filter(
    lambda b: b[:2] not in (b"\xff\xfe", b"\xfe\xff"))


@FUZZ
@given(bodies=st.lists(good_body, min_size=1, max_size=6), between=st.lists(garbage, min_size=6, max_size=6),
       ascii=st.booleans(), end=st.sampled_from(["\n", "\r\n"]))
def test_good_requests_come_through_whatever_stands_between(folder, bodies, between, ascii, end):
    lines, places = [], {}
    for j, body in enumerate(bodies):
        lines.append(between[j])
        places[f"good-{j}"] = len(lines) + 1
        lines.append(json.dumps({"custom_id": f"good-{j}", "body": body}, ensure_ascii=ascii).encode())
    requests = run(folder / "r.jsonl", end.encode().join(lines), "generate")
    found = {r.custom_id: r for r in requests if r.custom_id.startswith("good-")}
    assert [r.line for r in requests] == sorted(r.line for r in requests)
    for j, body in enumerate(bodies):
        request = found[f"good-{j}"]
        assert (request.error, request.line) == ("", places[f"good-{j}"])
        if isinstance(body["prompt"], str):
            assert tokenizer().decode(request.tokens) == body["prompt"]
        else:
            assert request.tokens.tolist() == body["prompt"]
        expected = {"max_tokens": 8, "temperature": 0.0, "seed": 0, "top_p": 1.0, "top_k": 0,
                    "ignore_eos": False, "stop": [], "logprobs": False} | body
        for name in expected.keys() - {"prompt", "stop"}:
            assert getattr(request, name) == expected[name]
        assert list(request.stop) == expected["stop"]


@pytest.mark.parametrize("depth", [50, 300, 600, 900, 950, 980, 990, 1000, 2000, 50_000])
def test_any_depth(folder, depth):
    """Deep values that the parser takes, and that printing or comparing them might not."""
    for field in ("prompt", "messages", "stop", "logit_bias", "metadata", "temperature", "n"):
        for open_, close in ("[", "]"), ('{"a":', "}"):
            value = open_ * depth + "1" + close * depth
            body = f'"{field}": {value}' if field == "prompt" else f'"prompt": "x", "{field}": {value}'
            run(folder / "r.jsonl", f'{{"custom_id": "a", "body": {{{body}}}}}'.encode(), "generate")


# ---------------------------------------------------------------- HDF5
def hdf5(**options) -> bytes:
    image = io.BytesIO()
    with h5py.File(image, "w") as file:
        for name, values in {"tokens": np.arange(40), "offsets": np.arange(0, 41, 8), "seed": np.arange(5),
                             "temperature": np.linspace(0, 1, 5), "max_tokens": np.full(5, 4)}.items():
            file.create_dataset(name, data=values, **options)
        file["custom_id"] = [f"name-{j}" for j in range(5)]
    return image.getvalue()


HDF5 = [hdf5(), hdf5(chunks=(4,), compression="gzip", fletcher32=True)]


@settings(FUZZ, max_examples=10)
@given(data=st.binary(max_size=200))
@example(data=b"\x89HDF\r\n\x1a\n")
def test_any_bytes_as_hdf5(folder, data):
    assert run(folder / "r.h5", data, "generate", tokens=False) == []


@pytest.mark.parametrize("form", [0, 1])
@FUZZ_HDF5
@given(data=st.data())
def test_mutated_hdf5(folder, form, data):
    run(folder / "r.h5", data.draw(mutated(HDF5[form])), "generate", tokens=False)


@pytest.mark.parametrize("form", [0, 1])
def test_truncated_hdf5(folder, form):
    whole = run(folder / "r.h5", HDF5[form], "generate", tokens=False)
    assert [len(r.tokens) for r in whole] == [8] * 5
    size = len(HDF5[form])
    for cut in (0, 1, 7, 8, 48, size // 10, size // 3, size // 2, size - 100, size - 1):
        assert run(folder / "r.h5", HDF5[form][:cut], "generate", tokens=False) == []


@pytest.mark.parametrize("name", ["ids_crash.h5", "ids_endless.h5"])
def test_one_bit_that_makes_the_hdf5_library_crash_or_run_for_ever(monkeypatch, name):
    """As HDF5 2.0 does on these two files. One that refuses or reads them is as welcome."""
    monkeypatch.setattr(idsfile, "_BASE_S", 5)
    path = Path(__file__).parent / "damaged" / name
    try:
        requests = read_requests(path, None, SAMPLING, model(), "generate")
        assert len(requests) == 5
    except UserError as error:
        assert f"{name}: " in str(error) and len(str(error).splitlines()) == 1


column = st.one_of(st.lists(st.integers(-2**63, 2**64 - 1), max_size=4), st.lists(st.floats(), max_size=4),
                   st.lists(st.text(max_size=4), max_size=4), st.integers(), st.just(h5py.Empty("i4")))


@FUZZ_HDF5
@given(datasets=st.dictionaries(st.sampled_from(["tokens", "offsets", "max_tokens", "seed", "custom_id", "top_p",
                                                 "temperature", "top_k", "ignore_eos", "other"]), column))
def test_any_datasets(folder, datasets):
    image = io.BytesIO()
    with h5py.File(image, "w") as file:
        for name, values in ({"tokens": [1, 2, 3], "offsets": [0, 2, 3]} | datasets).items():
            try:
                file[name] = values
            except (TypeError, OverflowError, ValueError):  # no such dataset can be written
                pass
    run(folder / "r.h5", image.getvalue(), "generate", tokens=False)
