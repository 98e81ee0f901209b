"""docs/requests.md: its examples run as they stand, and its lists are those of the program."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from small_text import model, tokenizer

from hpcmoe.config import SamplingJob
from hpcmoe.data import batchform, idsread
from hpcmoe.data import requests as requests_module
from hpcmoe.data.outputs import Result, write_outputs
from hpcmoe.data.requests import Request, read_requests

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "requests.md").read_text(encoding="utf-8")


def blocks(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", PAGE, re.S)


def shape(value):
    """The keys of nested objects, without their values."""
    if isinstance(value, dict):
        return {key: shape(inner) for key, inner in value.items()}
    return [shape(value[0])] if isinstance(value, list) and value and isinstance(value[0], dict) else None


def test_jsonl(tmp_path):
    (tmp_path / "r.jsonl").write_text(blocks("jsonl")[0], encoding="utf-8")
    found = read_requests(tmp_path / "r.jsonl", tokenizer(), SamplingJob(), model(context=128), "generate")
    assert [(r.custom_id, r.kind, r.error) for r in found] == [
        ("a", "completion", ""), ("b", "chat", ""), ("c", "completion", "")]


def test_hdf5_and_scores(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write, read = blocks("python")
    exec(write, {})
    found = read_requests("requests.h5", None, SamplingJob(), model(), "generate")
    assert [r.tokens.tolist() for r in found] == [[17, 4, 250], [9, 9], [3, 1, 4, 1, 5]]
    assert [r.max_tokens for r in found] == [16, 16, 8]
    results = [Result(r.index, np.zeros(0), np.full(len(r.tokens) - 1, -1.0), "score") for r in found]
    write_outputs(".", "score", found, results, None, "m")
    exec(read, {})
    assert capsys.readouterr().out == "row-0 2.718281828459045 [-1. -1.]\n"


def test_output_rows(tmp_path):
    good, bad = (json.loads(text) for text in blocks("json"))
    requests = [Request(0, 1, "a", np.zeros(3, np.int32), stop_ids=(0,)),
                Request(1, 2, "b", error=bad["error"]["message"], error_code=bad["error"]["code"])]
    results = [Result(0, np.array(good["response"]["body"]["choices"][0]["token_ids"]), None, "stop")]
    path = write_outputs(tmp_path, "generate", requests, results, tokenizer(), "demo",
                         created=good["response"]["body"]["created"])
    first, second = map(json.loads, path.read_text().splitlines())
    assert second == bad
    assert shape(first) == shape(good)
    first["response"]["body"]["choices"][0]["text"] = good["response"]["body"]["choices"][0]["text"]
    assert first == good
    assert str(batchform.wrong("body.temperature", -1, "a number from 0 to 100")) == bad["error"]["message"]


def test_lists():
    fields = {name for names in re.findall(r"^\| (`.*?) \|", PAGE.split("## Token ids")[0], re.M)
              for name in re.findall(r"`(\w+)`", names)}
    assert fields == batchform._OWN | {"echo"}
    for name in idsread.KINDS:
        assert f"`{name}`" in PAGE.split("## Token ids")[1].split("## What comes out")[0]
    source = "".join(Path(module.__file__).read_text() for module in (batchform, requests_module))
    source += (ROOT / "hpcmoe" / "data" / "outputs.py").read_text()
    codes = set(re.findall(r'Malformed\(\s*"(\w+)"', source)) | set(re.findall(r'error_code or "(\w+)"', source))
    table = PAGE.split("| code | the request |")[1].split("\n\n")[0]
    listed = {code for cell in re.findall(r"^\| (.*?) \|", table, re.M) for code in re.findall(r"`(\w+)`", cell)}
    assert codes == listed


@pytest.mark.parametrize("number, words", [
    (requests_module.LONGEST_LINE // 2**20, "longer than {} MiB"), (batchform.LONGEST_ID, "at most {} characters"),
    (batchform.MAX_STOPS, "up to {}")])
def test_limits(number, words):
    assert words.format(number) in PAGE
