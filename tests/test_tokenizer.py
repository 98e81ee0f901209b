"""Tokenizer: against the package itself, and chat templates against prompts written by hand."""

import json
import sys

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from small_text import BOS, CHAT, EOS, SENTENCES, tokenizer, tokenizer_json

from hpcmoe.data.tokenizer import Tokenizer, text_installed
from hpcmoe.errors import UserError

TALK = [{"role": "user", "content": "Hi <b>"}, {"role": "assistant", "content": "Ho"},
        {"role": "user", "content": "And?"}]


@pytest.mark.parametrize("kind", ["bytes", "metaspace"])
def test_ids_are_those_of_the_package(kind):
    package = tokenizers.Tokenizer.from_str(tokenizer_json(kind))
    for text in SENTENCES[:4]:
        ids = tokenizer(kind, bos_id=-1).encode(text)
        assert ids.dtype == np.int32
        assert ids.tolist() == package.encode(text).ids
        assert tokenizer(kind).decode(ids) == text


def test_first_token_only_where_the_model_has_one():
    text = SENTENCES[0]
    plain = tokenizer(bos_id=-1).encode(text).tolist()
    assert tokenizer().encode(text).tolist() == [BOS] + plain
    assert tokenizer().encode(text, bos=False).tolist() == plain
    assert BOS not in plain


def test_special_tokens_in_a_text_are_read_and_never_shown():
    ids = tokenizer(bos_id=-1).encode("</s>word").tolist()
    assert ids[0] == EOS
    assert tokenizer().decode(ids) == "word"
    assert tokenizer().decode([399 + 10_000]) == ""  # no such token: no text, no error


def test_truncation_and_padding_of_the_file_are_not_used():
    saved = json.loads(tokenizer_json())
    package = tokenizers.Tokenizer.from_str(json.dumps(saved))
    package.enable_truncation(3)
    package.enable_padding(length=50)
    ids = Tokenizer.from_json(package.to_str()).encode(SENTENCES[0]).tolist()
    assert ids == tokenizer(bos_id=-1).encode(SENTENCES[0]).tolist()
    assert 3 < len(ids) != 50


@pytest.mark.parametrize("kind", ["bytes", "metaspace"])
def test_pieces_join_to_the_text(kind):
    for text in SENTENCES[:4]:
        ids = tokenizer(kind).encode(text)
        pieces = tokenizer(kind).pieces(ids)
        assert len(pieces) == len(ids)
        assert "".join(pieces) == text
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert tokenizer(kind).pieces([]) == []


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 399), max_size=30))
def test_any_tokens_have_as_many_pieces(ids):
    pieces = tokenizer().pieces(ids)
    assert len(pieces) == len(ids)
    if "\N{REPLACEMENT CHARACTER}" not in tokenizer().decode(ids):
        assert "".join(pieces) == tokenizer().decode(ids)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=40))
def test_any_text_round_trips(text):
    found = tokenizer().decode(tokenizer().encode(text))
    if "<" not in text:  # special tokens are not shown
        assert found == text


def test_chat_prompt():
    made = tokenizer().chat(TALK)
    assert made == "<|user|>Hi <b>\n<|assistant|>Ho\n<|user|>And?\n<|assistant|>"
    assert tokenizer().chat(TALK, answer=False) == made.removesuffix("<|assistant|>")


def test_chat_templates_get_what_hugging_face_gives_them():
    template = ("{{ bos_token }}{% for m in messages %}\n    {% if loop.index > 1 %}\n"
                "{% break %}{% endif %}\n{{ m.content | tojson }}{{ strftime_now('%%') }}\n{% endfor %}")
    # blocks take their line's spaces and end with them, as trim_blocks and lstrip_blocks say
    assert tokenizer(chat=template).chat(TALK) == '<s>"Hi <b>"%\n'


@pytest.mark.parametrize("template, words", [
    (None, "no chat template"),
    ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    ("{% for %}", "refuses the messages"),
    ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
    ("{{ messages.append(1) }}", "unsafe"),
    ("{{ messages[0].content + 1 }}", "refuses the messages"),
    ("{{ 1 // 0 }}", "refuses the messages"),
    ("{{ nothing.attribute }}", "undefined"),
])
def test_templates_that_cannot_be_used(template, words):
    assert tokenizer(chat=template).has_chat == bool(template)
    with pytest.raises(UserError, match=words):
        tokenizer(chat=template).chat(TALK)


@pytest.mark.parametrize("text", ["", "{}", "[1]", "no json", tokenizer_json()[:-40]])
def test_a_damaged_tokenizer_is_named(text):
    with pytest.raises(UserError, match="tokenizer in the weights"):
        Tokenizer.from_json(text)


@pytest.mark.parametrize("package", ["tokenizers", "jinja2"])
def test_without_the_extra_the_message_names_it(package, monkeypatch):
    assert text_installed()
    monkeypatch.setitem(sys.modules, package, None)
    assert not text_installed()
    with pytest.raises(UserError, match=r"hpcmoe\[text\]"):
        Tokenizer.from_json(tokenizer_json(), CHAT)
