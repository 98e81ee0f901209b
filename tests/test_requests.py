"""Reading requests: what each form gives, and the row or message for each fault."""

import json
import os

import h5py
import numpy as np
import pytest
from small_text import EOS, model, tokenizer

from hpcmoe.config import SamplingJob, ThroughputJob
from hpcmoe.data import requests as requests_module
from hpcmoe.data.requests import Request, read_requests, synthetic_requests
from hpcmoe.errors import UserError


def line(custom_id="a", **body) -> str:
    body = {"prompt": "In the beginning"} | body
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": "/v1/completions",
                       "body": {k: v for k, v in body.items() if v != "absent"}})


def read(path, data, task="generate", tokens=True, sampling=SamplingJob(max_tokens=8), **more):
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return read_requests(path, tokenizer() if tokens else None, sampling, model(), task, **more)


def only(path, data, **more) -> Request:
    found = read(path, data, **more)
    assert len(found) == 1
    return found[0]


# ---------------------------------------------------------------- what is understood
def test_a_line_with_everything(tmp_path):
    body = {"max_tokens": 5, "temperature": 0.5, "top_k": 7, "top_p": 0.9, "seed": 11,
            "stop": ["x", "yz"], "logprobs": True, "stop_token_ids": [9, 5]}
    found = only(tmp_path / "r.jsonl", line("α 1", **body))
    assert (found.index, found.line, found.custom_id, found.kind) == (0, 1, "α 1", "completion")
    assert found.tokens.dtype == np.int32
    assert found.tokens.tolist() == tokenizer().encode("In the beginning").tolist()
    assert (found.max_tokens, found.temperature, found.top_k, found.top_p) == (5, 0.5, 7, 0.9)
    assert (found.seed, found.stop, found.logprobs, found.ignore_eos) == (11, ("x", "yz"), True, False)
    assert found.stop_ids == (EOS, 5, 9)
    assert found.error == "" and found.error_code == ""


def test_the_jobs_defaults_fill_what_a_line_leaves_open(tmp_path):
    job = SamplingJob(max_tokens=3, temperature=0.25, top_k=4, top_p=0.5, seed=6, ignore_eos=True)
    found = only(tmp_path / "r.jsonl", line(top_k=5, temperature=None), sampling=job)
    assert (found.max_tokens, found.temperature, found.top_k, found.top_p) == (3, 0.25, 5, 0.5)
    assert (found.seed, found.ignore_eos, found.stop_ids) == (6, True, ())


@pytest.mark.parametrize("body, name, value", [
    ({"max_completion_tokens": 4}, "max_tokens", 4),
    ({"max_completion_tokens": 4, "max_tokens": 4}, "max_tokens", 4),
    ({"top_k": -1}, "top_k", 0),
    ({"temperature": 1}, "temperature", 1.0),
    ({"temperature": 1e-9}, "temperature", 0.0),
    ({"top_p": 1}, "top_p", 1.0),
    ({"seed": 2**63 - 1}, "seed", 2**63 - 1),
    ({"stop": "end"}, "stop", ("end",)),
    ({"stop": []}, "stop", ()),
    ({"logprobs": 0}, "logprobs", True),
    ({"logprobs": 1}, "logprobs", True),
    ({"ignore_eos": True}, "stop_ids", ()),
    ({"ignore_eos": True, "stop_token_ids": [8]}, "stop_ids", (8,)),
    ({"user": "me", "metadata": {"k": 1}, "model": "other", "store": True}, "error", ""),
    ({"n": 1, "stream": False, "presence_penalty": 0.0, "frequency_penalty": 0, "tools": [],
      "logit_bias": {}, "response_format": {"type": "text"}, "suffix": None}, "error", ""),
])
def test_fields(tmp_path, body, name, value):
    found = only(tmp_path / "r.jsonl", line(**body))
    assert getattr(found, name) == value and type(getattr(found, name)) is type(value)
    assert found.error == ""


def test_token_ids_as_prompt_need_no_tokenizer(tmp_path):
    found = only(tmp_path / "r.jsonl", line(prompt=[3, 2, 399]), tokens=False)
    assert found.tokens.tolist() == [3, 2, 399]  # no first token is added to ids
    with pytest.raises(UserError, match="no tokenizer in the weights"):
        read(tmp_path / "r.jsonl", line(), tokens=False)
    assert "stop_token_ids" in only(tmp_path / "r.jsonl", line(prompt=[3], stop="."), tokens=False).error


def test_chat(tmp_path):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    doc = {"custom_id": "c", "url": "/v1/chat/completions", "body": {"messages": [
        {"role": "system", "content": "Be brief.", "name": "boss"}, {"role": "user", "content": parts}]}}
    found = only(tmp_path / "r.jsonl", json.dumps(doc))
    assert found.error == "" and found.kind == "chat"
    expected = "<|system|>Be brief.\n<|user|>a\nb\n<|assistant|>"
    assert found.tokens.tolist() == tokenizer().encode(expected, bos=False).tolist()
    scored = only(tmp_path / "r.jsonl", json.dumps(doc), task="score")
    assert tokenizer().decode(scored.tokens) == expected.removesuffix("<|assistant|>")


def test_score_takes_the_text_itself(tmp_path):
    found = only(tmp_path / "r.jsonl", line(max_tokens=0, echo=True, logprobs=1), task="score")
    assert (found.error, found.max_tokens) == ("", 0)
    assert len(found.tokens) == len(tokenizer().encode("In the beginning"))
    whole = only(tmp_path / "r.jsonl", line(prompt=[5] * 64), task="score")
    assert whole.error == "" and len(whole.tokens) == 64
    assert only(tmp_path / "r.jsonl", line(prompt=[5]), task="score").error_code == "prompt_too_short"


def test_bom_crlf_blank_lines_and_no_last_newline(tmp_path):
    data = b"\xef\xbb\xbf" + f"{line('a')}\r\n\r\n   \n{line('b')}".encode()
    found = read(tmp_path / "r.jsonl", data)
    assert [(r.index, r.line, r.custom_id, r.error) for r in found] == [(0, 1, "a", ""), (1, 4, "b", "")]
    text = read(tmp_path / "r.txt", b"\xef\xbb\xbfthe word\r\n\r\n \xc3\xa9 \n")
    assert [(r.line, r.custom_id, r.kind) for r in text] == [(1, "line-1", "text"), (3, "line-3", "text")]
    assert [tokenizer().decode(r.tokens) for r in text] == ["the word", " é "]


def test_limit_stops_reading(tmp_path):
    lines = [line("a"), "{", line("b"), line("c")]
    assert [r.custom_id for r in read(tmp_path / "r.jsonl", "\n".join(lines), limit=3)] == ["a", "", "b"]
    with pytest.raises(UserError, match="limit"):
        read(tmp_path / "r.jsonl", "\n".join(lines), limit=-1)


# ---------------------------------------------------------------- malformed requests
FAULTS = [
    ('{"custom_id": "a", ', "invalid_json", "not JSON"),
    ("[1, 2]", "invalid_json", "not an object"),
    ('"text"', "invalid_json", "not an object"),
    ("[" * 100_000, "invalid_json", "nested too deeply"),
    ('{"a": ' * 100_000, "invalid_json", "nested too deeply"),
    ('{"custom_id": "a", "body": {"prompt": "x", "temperature": NaN}}', "invalid_json", "NaN"),
    ('{"custom_id": "a", "body": {"prompt": "x", "seed": ' + "9" * 5000 + "}}", "invalid_json", "JSON"),
    ('{"custom_id": "a", "body": {"prompt": "\\ud800"}}', "invalid_json", "surrogate"),
    ('{"custom_id": "a", "body": {"prompt": "x", "prompt": "y"}}', "invalid_json", "'prompt' is given twice"),
    ("{}", "missing_field", "custom_id is missing"),
    ('{"body": {"prompt": "x"}}', "missing_field", "custom_id"),
    (line(custom_id=3), "invalid_value", "custom_id = 3"),
    (line(custom_id=""), "invalid_value", "custom_id = ''"),
    (line(custom_id="n" * 513), "invalid_value", "1 to 512"),
    (line(custom_id="a\0"), "invalid_value", "NUL"),
    ('{"custom_id": "a"}', "missing_field", "body is missing"),
    ('{"custom_id": "a", "body": []}', "invalid_value", "body = []"),
    ('{"custom_id": "a", "prompt": "x"}', "unknown_field", "belong in body"),
    ('{"custom_id": "a", "bodie": {}}', "unknown_field", "'bodie'"),
    ('{"custom_id": "a", "method": "GET", "body": {}}', "invalid_value", "method = 'GET'"),
    ('{"custom_id": "a", "url": "/v1/embeddings", "body": {}}', "invalid_value", "/v1/embeddings"),
    ('{"custom_id": "a", "url": 1, "body": {}}', "invalid_value", "url = 1"),
    ('{"custom_id": "a", "url": "/v1/chat/completions", "body": {"prompt": "x"}}', "invalid_value",
     "does not take a prompt"),
    (line(prompt="absent"), "missing_field", "prompt"),
    (line(prompt=None), "missing_field", "prompt"),
    (line(prompt=""), "empty_prompt", "empty"),
    (line(prompt=[]), "empty_prompt", "empty"),
    (line(prompt=3), "invalid_value", "body.prompt = 3"),
    (line(prompt=["a", "b"]), "invalid_value", "one prompt per line"),
    (line(prompt=[1, True]), "invalid_value", "token ids"),
    (line(prompt=[1.0]), "invalid_value", "token ids"),
    (line(prompt=[1, 400]), "token_out_of_range", "token 400 at place 1 of the prompt: expected 0 to 399"),
    (line(prompt=[-1]), "token_out_of_range", "-1"),
    (line(prompt=[2**70]), "token_out_of_range", "1180591620717411303424"),
    (line(prompt=[5] * 60), "prompt_too_long", "60 tokens and 8 tokens of output make 68: expected at most 64"),
    (line(prompt=[5] * 60, max_tokens=5), "prompt_too_long", "make 65"),
    (line(prompt=[5] * 65), "prompt_too_long", "65 tokens"),
    (line(messages=[]), "invalid_value", "expected one of them"),
    (line(prompt="absent", messages=[]), "empty_prompt", "messages is empty"),
    (line(prompt="absent", messages="hello"), "invalid_value", "list of messages"),
    (line(prompt="absent", messages=[{"role": "robot", "content": "x"}]), "invalid_value", "'robot'"),
    (line(prompt="absent", messages=[{"role": "user"}]), "invalid_value", "messages[0].content"),
    (line(prompt="absent", messages=[{"role": ["user"], "content": "x"}]), "invalid_value", "role"),
    (line(prompt="absent", messages=[{"role": "user", "content": [{"type": "image_url"}]}]),
     "invalid_value", "image_url"),
    (line(prompt="absent", messages=[{"role": "user", "content": "x", "tool_calls": [1]}]),
     "unsupported_field", "tool_calls"),
    (line(max_tokens=0), "invalid_value", "body.max_tokens = 0"),
    (line(max_tokens=-4), "invalid_value", "body.max_tokens = -4"),
    (line(max_tokens=2.0), "invalid_value", "body.max_tokens = 2.0"),
    (line(max_tokens="5"), "invalid_value", "body.max_tokens = '5'"),
    (line(max_tokens=True), "invalid_value", "body.max_tokens = True"),
    (line(max_tokens=10**400), "invalid_value", "an integer from 1"),
    (line(max_completion_tokens=0), "invalid_value", "body.max_completion_tokens = 0"),
    (line(max_completion_tokens=3, max_tokens=4), "invalid_value", "expected one of them"),
    (line(temperature=-0.5), "invalid_value", "body.temperature = -0.5"),
    (line(temperature=10**400), "invalid_value", "body.temperature"),
    (line(temperature="hot"), "invalid_value", "body.temperature = 'hot'"),
    ('{"custom_id": "a", "body": {"prompt": "x", "temperature": 1e999}}', "invalid_value", "inf"),
    (line(top_p=0), "invalid_value", "body.top_p = 0"),
    (line(top_p=1.5), "invalid_value", "body.top_p = 1.5"),
    (line(top_k=-2), "invalid_value", "body.top_k = -2"),
    (line(seed=-1), "invalid_value", "body.seed = -1"),
    (line(seed=2**63), "invalid_value", "body.seed"),
    (line(ignore_eos=1), "invalid_value", "body.ignore_eos = 1"),
    (line(stop=[""]), "invalid_value", "body.stop"),
    (line(stop=5), "invalid_value", "body.stop = 5"),
    (line(stop=["x"] * 17), "invalid_value", "at most 16"),
    (line(stop_token_ids=["x"]), "invalid_value", "body.stop_token_ids"),
    (line(logprobs=5), "invalid_value", "body.logprobs = 5"),
    (line(n=2), "unsupported_field", "body.n = 2"),
    (line(n=True), "unsupported_field", "body.n = True"),
    (line(stream=True), "unsupported_field", "body.stream"),
    (line(echo=True), "unsupported_field", "body.echo"),
    (line(tools=[{"type": "function"}]), "unsupported_field", "body.tools"),
    (line(logit_bias={"5": 1}), "unsupported_field", "body.logit_bias"),
    (line(presence_penalty=0.1), "unsupported_field", "body.presence_penalty = 0.1"),
    (line(top_logprobs=2), "unsupported_field", "body.top_logprobs = 2"),
    (line(response_format={"type": "json_object"}), "unsupported_field", "body.response_format"),
    (line(max_token=5), "unknown_field", "unknown field body.max_token"),
]


@pytest.mark.parametrize("text, code, words", FAULTS, ids=[f"{i}-{f[1]}" for i, f in enumerate(FAULTS)])
def test_a_malformed_line_is_an_error_row_and_the_others_run(tmp_path, text, code, words):
    found = read(tmp_path / "r.jsonl", "\n".join([line("before"), text, line("after")]))
    assert [r.custom_id for r in found[::2]] == ["before", "after"]
    assert not found[0].error and not found[2].error and len(found[2].tokens)
    bad = found[1]
    assert (bad.index, bad.line, bad.error_code) == (1, 2, code)
    assert words in bad.error and len(bad.error) < 300
    assert len(bad.tokens) == 0


def test_a_custom_id_stands_for_one_request(tmp_path):
    found = read(tmp_path / "r.jsonl", "\n".join([line("a", n=2), line("b"), line("a"), line("b")]))
    assert [(r.custom_id, r.error_code) for r in found] == [
        ("a", "unsupported_field"), ("b", ""), ("", "duplicate_custom_id"), ("", "duplicate_custom_id")]
    assert "'a' was given to line 1 already" in found[2].error
    assert "'b' was given to line 2 already" in found[3].error


@pytest.mark.parametrize("suffix", ["jsonl", "txt"])
def test_bytes_that_are_not_utf8(tmp_path, suffix):
    good = line("g").encode() if suffix == "jsonl" else b"good"
    found = read(tmp_path / f"r.{suffix}", b"ab\xff\n" + good)
    assert (found[0].error_code, found[0].line, found[1].error) == ("invalid_utf8", 1, "")
    assert "0xff at place 2" in found[0].error


@pytest.mark.parametrize("suffix", ["jsonl", "txt"])
@pytest.mark.parametrize("size", [999, 1000, 1001, 1999, 2000, 2001, 2002, 5000])
def test_lines_that_are_too_long(tmp_path, monkeypatch, suffix, size):
    monkeypatch.setattr(requests_module, "LONGEST_LINE", 1000)
    good = line("g") if suffix == "jsonl" else "good"
    found = read(tmp_path / f"r.{suffix}", "x" * size + "\n" + good)
    assert (found[0].error_code == "line_too_long") == (size > 1000)
    assert [r.line for r in found] == [1, 2] and not found[1].error


def test_the_context_asked_for_is_a_limit_too(tmp_path):
    assert "at most 20" in only(tmp_path / "r.jsonl", line(prompt=[5] * 13), context=20).error
    assert not only(tmp_path / "r.jsonl", line(prompt=[5] * 12), context=20).error


def test_a_model_without_chat_template(tmp_path):
    data = "\n".join([line(prompt="absent", messages=[{"role": "user", "content": "x"}]), line("b")])
    (tmp_path / "r.jsonl").write_text(data)
    found = read_requests(tmp_path / "r.jsonl", tokenizer(chat=None), SamplingJob(max_tokens=2), model(),
                          "generate")
    url, chat = found[0].error, json.loads(data.splitlines()[0]) | {"url": "/v1/chat/completions"}
    assert "does not take messages" in url and not found[1].error
    (tmp_path / "r.jsonl").write_text(json.dumps(chat))
    found = read_requests(tmp_path / "r.jsonl", tokenizer(chat=None), SamplingJob(max_tokens=2), model(),
                          "generate")
    assert found[0].error_code == "invalid_prompt" and "no chat template" in found[0].error


# ---------------------------------------------------------------- HDF5
def write_h5(path, **datasets):
    with h5py.File(path, "w") as file:
        for name, values in ({"tokens": np.arange(6), "offsets": [0, 4, 6]} | datasets).items():
            if values is not None:
                file[name] = values
    return path


def read_h5(path, task="generate"):
    return read_requests(path, None, SamplingJob(max_tokens=8), model(), task)


def test_hdf5(tmp_path):
    found = read_h5(write_h5(tmp_path / "r.h5", max_tokens=[3, 4], temperature=np.float32([0, 0.5]),
                             top_k=[1, 2], top_p=[1.0, 0.5], seed=[7, 8], ignore_eos=[True, False],
                             custom_id=["x", "yé"]))
    assert [r.tokens.tolist() for r in found] == [[0, 1, 2, 3], [4, 5]]
    assert [(r.index, r.line, r.kind, r.custom_id) for r in found] == [(0, 0, "ids", "x"), (1, 0, "ids", "yé")]
    assert [(r.max_tokens, r.temperature, r.top_k, r.top_p, r.seed, r.ignore_eos, r.stop_ids)
            for r in found] == [(3, 0.0, 1, 1.0, 7, True, ()), (4, 0.5, 2, 0.5, 8, False, (EOS,))]
    plain = read_h5(write_h5(tmp_path / "r.hdf5", tokens=np.uint16([9, 8]), offsets=np.int32([0, 2])))
    assert (plain[0].custom_id, plain[0].max_tokens, plain[0].tokens.dtype) == ("row-0", 8, np.int32)


def test_hdf5_rows_that_cannot_run(tmp_path):
    found = read_h5(write_h5(
        tmp_path / "r.h5", tokens=np.array([1, 2, 3] + [4] * 70 + [400, -1, 5, 6]),
        offsets=[0, 3, 3, 73, 74, 75, 76, 77], max_tokens=[1, 1, 1, 1, 1, 0, 2],
        custom_id=["a", "b", "c", "d", "e", "f", "a"]))
    assert [r.error_code for r in found] == ["", "empty_prompt", "prompt_too_long", "token_out_of_range",
                                             "token_out_of_range", "invalid_value", "duplicate_custom_id"]
    assert "70 tokens and 1 tokens of output make 71: expected at most 64" in found[2].error
    assert "'a' was given to row 0 already" in found[6].error


@pytest.mark.parametrize("datasets, words", [
    ({"tokens": None}, "dataset tokens is missing"),
    ({"offsets": None}, "dataset offsets is missing"),
    ({"tokens": np.zeros(6)}, "tokens: expected a dataset of one dimension that holds integers"),
    ({"tokens": np.zeros((2, 3), int)}, "tokens: expected"),
    ({"tokens": 5}, "tokens: expected"),
    ({"offsets": np.zeros(0, int)}, "offsets has 0 entries"),
    ({"offsets": [0]}, "offsets has 1 entries"),
    ({"offsets": [0, 4, 7]}, "rise from 0 to 6"),
    ({"offsets": [1, 4, 6]}, "rise from 0 to 6"),
    ({"offsets": [0, 7, 4, 6]}, "rise from 0 to 6"),
    ({"offsets": [0, -1, 6]}, "rise from 0 to 6"),
    ({"max_tokens": [1]}, "max_tokens has 1 entries: expected 2"),
    ({"max_tokens": [1.0, 2.0]}, "max_tokens: expected"),
    ({"custom_id": [1, 2]}, "custom_id: expected a dataset of one dimension that holds texts"),
    ({"ignore_eos": [0, 2]}, "ignore_eos: expected 0 or 1"),
    ({"max_token": [1, 2]}, "unknown dataset 'max_token'"),
])
def test_hdf5_files_that_cannot_be_read(tmp_path, datasets, words):
    with pytest.raises(UserError, match=r"r\.h5: ") as raised:
        read_h5(write_h5(tmp_path / "r.h5", **datasets))
    assert words in str(raised.value)


def test_hdf5_groups_links_and_claims(tmp_path):
    with h5py.File(tmp_path / "r.h5", "w") as file:
        file.create_group("tokens")
        file["offsets"] = [0, 1]
    with pytest.raises(UserError, match="tokens: expected"):
        read_h5(tmp_path / "r.h5")
    with h5py.File(tmp_path / "r.h5", "w") as file:
        file["tokens"] = h5py.ExternalLink("nowhere.h5", "/tokens")
        file["offsets"] = [0, 1]
    with pytest.raises(UserError, match=r"r\.h5"):
        read_h5(tmp_path / "r.h5")
    with h5py.File(tmp_path / "r.h5", "w") as file:  # a dataset of 8 TiB, none of it written
        file.create_dataset("tokens", shape=(2**41,), dtype="i4", chunks=(1024,))
        file["offsets"] = [0, 2**41]
    with pytest.raises(UserError, match="more than the file can hold"):
        read_h5(tmp_path / "r.h5")


# ---------------------------------------------------------------- files
def test_files_that_cannot_be_read(tmp_path):
    def fails(path, words):
        with pytest.raises(UserError, match=words) as raised:
            read_requests(path, tokenizer(), SamplingJob(), model(), "generate")
        assert str(path) in str(raised.value)
        assert "\n" not in str(raised.value)

    for suffix in ("jsonl", "txt", "h5"):
        fails(tmp_path / f"none.{suffix}", "No such file")
        folder = tmp_path / f"folder.{suffix}"
        folder.mkdir()
        fails(folder, "is a folder")
        (tmp_path / f"empty.{suffix}").touch()
        fails(tmp_path / f"empty.{suffix}", "HDF5" if suffix == "h5" else "holds no request")
    (tmp_path / "blank.jsonl").write_text("\n  \r\n\n")
    fails(tmp_path / "blank.jsonl", "holds no request")
    (tmp_path / "wide.jsonl").write_bytes(line().encode("utf-16"))
    fails(tmp_path / "wide.jsonl", "UTF-16: expected UTF-8")
    (tmp_path / "text.h5").write_text("not HDF5 at all")
    fails(tmp_path / "text.h5", "cannot be read as HDF5")
    for name in ("r.csv", "r", "r.json"):
        (tmp_path / name).write_text(line())
        fails(tmp_path / name, r"expected a file of requests named \.jsonl")


@pytest.mark.parametrize("name, value", [("max_tokens", 0), ("temperature", -1.0), ("top_p", 0.0),
                                         ("top_k", -5), ("seed", -1), ("temperature", float("nan"))])
def test_defaults_out_of_range(tmp_path, name, value):
    with pytest.raises(UserError, match=rf"sampling\.{name} = "):
        read(tmp_path / "r.jsonl", line(), sampling=SamplingJob(**{name: value}))


def test_a_line_is_in_memory_alone(tmp_path):
    """A file far larger than what reading it takes: 40 MB of lines that are refused unparsed."""
    import resource
    path = tmp_path / "r.txt"
    with open(path, "wb") as file:
        for _ in range(40):
            file.write(b"\xff" * (2**20 - 1) + b"\n")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = read_requests(path, None, SamplingJob(), model(), "generate")
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert len(found) == 40 and os.path.getsize(path) == 40 * 2**20
    assert grown < 20 * 1024  # KiB


# ---------------------------------------------------------------- synthetic
def test_synthetic_requests():
    job = ThroughputJob(sequences=50, prompt_tokens=40, output_tokens=24, seed=3)
    found = synthetic_requests(job, model())
    assert [r.index for r in found] == list(range(50)) and len({r.custom_id for r in found}) == 50
    ids = np.stack([r.tokens for r in found])
    assert ids.shape == (50, 40) and ids.dtype == np.int32 and 0 <= ids.min() and ids.max() < 400
    assert len(np.unique(ids)) > 300
    assert all(r.max_tokens == 24 and r.ignore_eos and r.stop_ids == () and r.temperature == 0 for r in found)
    again = np.stack([r.tokens for r in synthetic_requests(job, model())])
    assert (again == ids).all()


@pytest.mark.parametrize("name, value, words", [
    ("sequences", 0, "sequences = 0"), ("prompt_tokens", 0, "prompt_tokens = 0"),
    ("output_tokens", -1, "output_tokens = -1"), ("seed", -1, "seed = -1"),
    ("output_tokens", 60, "prompt_tokens = 10 and output_tokens = 60 make 70: expected at most 64")])
def test_synthetic_sizes_that_do_not_fit(name, value, words):
    job = ThroughputJob(**({"sequences": 2, "prompt_tokens": 10, "output_tokens": 5} | {name: value}))
    with pytest.raises(UserError, match=words):
        synthetic_requests(job, model())
