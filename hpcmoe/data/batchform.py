"""One line of the OpenAI batch form, checked field by field.

A line is {"custom_id", "method", "url", "body": {"prompt" or "messages", settings ...}}. Every
fault is a `Malformed`: the line becomes an error row, and the other lines run.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

LONGEST_ID = 512
MAX_STOPS = 16
URLS = {"/v1/completions": "completion", "/v1/chat/completions": "chat"}
ROLES = ("system", "developer", "user", "assistant")

# Fields with no effect on the answer here.
_HARMLESS = {"model", "user", "metadata", "store", "service_tier", "safety_identifier",
             "prompt_cache_key", "prompt_cache_retention", "parallel_tool_calls", "priority",
             "request_id"}
# Known fields that the engine does not offer: these values ask for nothing, others are refused.
# null asks for nothing everywhere.
_NEUTRAL: dict[str, tuple] = {
    "n": (1,), "best_of": (1,), "stream": (False,), "stream_options": (), "suffix": ("",),
    "echo": (False,), "top_logprobs": (0,), "presence_penalty": (0,), "frequency_penalty": (0,),
    "repetition_penalty": (1,), "length_penalty": (1,), "min_p": (0,), "min_tokens": (0,),
    "logit_bias": ({},), "tools": ([],), "tool_choice": ("none",), "functions": ([],),
    "function_call": ("none",), "response_format": ({"type": "text"},), "modalities": (["text"],),
    "audio": (), "prediction": (), "reasoning_effort": (), "verbosity": (),
    "web_search_options": (), "use_beam_search": (False,), "bad_words": ([],),
    "include_stop_str_in_output": (False,), "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,), "truncate_prompt_tokens": (),
    "prompt_logprobs": (), "add_special_tokens": (), "structured_outputs": (),
    "guided_json": (), "guided_regex": (), "guided_choice": (), "guided_grammar": (),
    "chat_template": (), "chat_template_kwargs": ({},), "add_generation_prompt": (True,),
    "continue_final_message": (False,), "documents": ([],),
}
SETTINGS = ("max_tokens", "temperature", "top_k", "top_p", "seed", "ignore_eos")
_OWN = {"prompt", "messages", "max_completion_tokens", "stop", "stop_token_ids", "logprobs",
        *SETTINGS}


class Malformed(Exception):
    """A fault in one request: a code for programs and a message for people."""

    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code = code


@dataclass
class Ask:
    """What a request asks for, before the job's defaults and the tokenizer.

    prompt: a text, token ids, or the messages of a chat; settings: those of SETTINGS given.
    """

    kind: str
    prompt: Any
    settings: dict[str, Any] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    logprobs: bool = False


def short(value: Any) -> str:
    """repr of a value, cut to a length that a message can hold."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def wrong(name: str, value: Any, expected: str) -> Malformed:
    """The fault of a field with a value it cannot have."""
    return Malformed("invalid_value", f"{name} = {short(value)}: expected {expected}")


# ---------------------------------------------------------------- settings
def setting(name: str, value: Any, label: str, least_tokens: int = 1) -> Any:
    """The value of one of SETTINGS, checked; Malformed calls it `label`.

    least_tokens: the smallest max_tokens, 0 where nothing is generated.
    """
    if name == "ignore_eos":
        if type(value) is not bool:
            raise wrong(label, value, "true or false")
        return value
    if name == "max_tokens":
        return _integer(label, value, least_tokens, 2**31 - 1)
    if name == "top_k":  # -1 is what vLLM users write for "no limit"
        return max(0, _integer(label, value, -1, 2**31 - 1))
    if name == "seed":
        return _integer(label, value, 0, 2**63 - 1)
    if name == "top_p":
        return _number(label, value, 0.0, 1.0, above=True)
    temperature = _number(label, value, 0.0, 100.0)
    # Dividing fp32 logits by less would overflow; what is drawn is the largest one anyway.
    return temperature if temperature >= 1e-5 else 0.0


def _integer(label: str, value: Any, least: int, most: int) -> int:
    if type(value) is not int or not least <= value <= most:
        raise wrong(label, value, f"an integer from {least} to {most}")
    return value


def _number(label: str, value: Any, least: float, most: float, above: bool = False) -> float:
    expected = f"a number {'above' if above else 'from'} {least:g} {'up ' if above else ''}to {most:g}"
    if type(value) not in (int, float) or not least <= value <= most or (above and value == least):
        raise wrong(label, value, expected)  # NaN fails the comparison
    return float(value)


# ---------------------------------------------------------------- a line
def document(text: str) -> dict:
    """The object of one line; Malformed where it is not one strict JSON object.

    NaN, infinities, a key given twice and half surrogate pairs, which Python's parser
    lets pass, are refused.
    """
    def unique(pairs):
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in found if keys.count(key) > 1)
            raise Malformed("invalid_json", f"field {short(twice)} is given twice")
        return found

    def constant(name):
        raise Malformed("invalid_json", f"{name} is not JSON")

    try:
        doc = json.loads(text, object_pairs_hook=unique, parse_constant=constant)
        if "\\ud" in text.lower():
            json.dumps(doc, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise Malformed("invalid_json", "half of a surrogate pair in a text") from error
    except RecursionError as error:
        raise Malformed("invalid_json", "nested too deeply") from error
    except json.JSONDecodeError as error:
        raise Malformed("invalid_json", f"not JSON: {error.msg} at character {error.pos}") from error
    except ValueError as error:  # an integer of thousands of digits
        raise Malformed("invalid_json", f"not JSON: {error}") from error
    if not isinstance(doc, dict):
        raise Malformed("invalid_json", f"{short(doc)} is not an object of fields")
    return doc


def custom_id(doc: dict) -> str:
    """The request's own name; Malformed where it is missing or no name."""
    if "custom_id" not in doc:
        raise Malformed("missing_field", "custom_id is missing")
    name = doc["custom_id"]
    if not isinstance(name, str) or not 0 < len(name) <= LONGEST_ID:
        raise wrong("custom_id", name, f"a text of 1 to {LONGEST_ID} characters")
    if "\0" in name:  # HDF5 texts end there
        raise wrong("custom_id", name, "a text without NUL")
    return name


def ask(doc: dict, task: str) -> Ask:
    """What a line asks for; Malformed names the first field that is wrong."""
    for key in doc:
        if key not in ("custom_id", "method", "url", "body"):
            hint = " beside body: settings belong in body" if key in _OWN else ""
            raise Malformed("unknown_field", f"unknown field {short(key)}{hint}")
    if doc.get("method", "POST") != "POST":
        raise wrong("method", doc["method"], "'POST'")
    url = doc.get("url")
    if url is not None and (not isinstance(url, str) or url not in URLS):
        raise wrong("url", url, " or ".join(URLS))
    if "body" not in doc:
        raise Malformed("missing_field", "body is missing")
    body = doc["body"]
    if not isinstance(body, dict):
        raise wrong("body", body, "an object of fields")
    body = {key: value for key, value in body.items() if value is not None}
    _refuse_fields(body, task)
    kind, prompt = _prompt(body)
    if url is not None and URLS[url] != kind:
        raise Malformed("invalid_value", f"url = {url!r} does not take "
                        f"{'messages' if kind == 'chat' else 'a prompt'}")
    found = Ask(kind, prompt, stop=_stop(body), stop_ids=_ids(body, "stop_token_ids"),
                logprobs=_logprobs(body))
    least_tokens = 0 if task == "score" else 1
    for name in SETTINGS:
        if name in body:
            found.settings[name] = setting(name, body[name], f"body.{name}", least_tokens)
    if "max_completion_tokens" in body:
        _longer_name(body, found.settings, least_tokens)
    return found


def _refuse_fields(body: dict, task: str) -> None:
    for key, value in body.items():
        if key in _OWN or key in _HARMLESS:
            continue
        if key not in _NEUTRAL:
            raise Malformed("unknown_field", f"unknown field body.{key[:80]}")
        if key == "echo" and task == "score" and value is True:
            continue  # the usual way to ask a completion service for a text's score
        # True == 1 in Python, not in JSON
        if not any(type(value) is type(v) and value == v or
                   type(v) is int and type(value) is float and value == v for v in _NEUTRAL[key]):
            allowed = " or ".join(json.dumps(v) for v in (*_NEUTRAL[key], None))
            raise Malformed("unsupported_field", f"body.{key} = {short(value)} is not supported: "
                            f"expected {allowed}")


def _longer_name(body: dict, settings: dict, least_tokens: int) -> None:
    value = setting("max_tokens", body["max_completion_tokens"], "body.max_completion_tokens",
                    least_tokens)
    if settings.setdefault("max_tokens", value) != value:
        raise Malformed("invalid_value", f"body.max_tokens = {settings['max_tokens']} and "
                        f"body.max_completion_tokens = {value}: expected one of them")


def _prompt(body: dict) -> tuple[str, Any]:
    if "prompt" in body and "messages" in body:
        raise Malformed("invalid_value", "body has prompt and messages: expected one of them")
    if "messages" in body:
        return "chat", _messages(body["messages"])
    if "prompt" not in body:
        raise Malformed("missing_field", "body.prompt (or body.messages) is missing")
    prompt = body["prompt"]
    if not isinstance(prompt, str):
        prompt = _ids(body, "prompt")
    if not prompt:
        raise Malformed("empty_prompt", "body.prompt is empty")
    return "completion", prompt


def _ids(body: dict, name: str) -> tuple[int, ...]:
    value = body.get(name, [])
    expected = "a list of token ids" if name != "prompt" else \
        "a text or a list of token ids; one prompt per line"
    if not isinstance(value, list) or any(type(v) is not int for v in value):
        raise wrong(f"body.{name}", value, expected)
    if any(v < 0 or v >= 2**31 for v in value):
        bad = next(v for v in value if v < 0 or v >= 2**31)
        raise Malformed("token_out_of_range", f"body.{name} holds {short(bad)}: expected token ids")
    return tuple(value)


def _messages(value: Any) -> list[dict]:
    if not isinstance(value, list) or not all(isinstance(m, dict) for m in value):
        raise wrong("body.messages", value, "a list of messages with role and content")
    if not value:
        raise Malformed("empty_prompt", "body.messages is empty")
    return [_message(f"body.messages[{i}]", message) for i, message in enumerate(value)]


def _message(where: str, message: dict) -> dict:
    for key, value in message.items():
        if key not in ("role", "content", "name") and value is not None:
            raise Malformed("unsupported_field", f"{where}.{key[:80]} is not supported")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise wrong(f"{where}.role", role, "one of " + ", ".join(ROLES))
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, dict) or part.get("type") != "text" \
                    or not isinstance(part.get("text"), str):
                raise wrong(f"{where}.content", part, 'parts {"type": "text", "text": ...}')
        content = "\n".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise wrong(f"{where}.content", content, "a text or a list of text parts")
    found = {"role": role, "content": content}
    if message.get("name") is not None:
        if not isinstance(message["name"], str):
            raise wrong(f"{where}.name", message["name"], "a text")
        found["name"] = message["name"]
    return found


def _stop(body: dict) -> tuple[str, ...]:
    value = body.get("stop", [])
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > MAX_STOPS \
            or not all(isinstance(s, str) and s for s in stops):
        raise wrong("body.stop", value, f"a text or a list of at most {MAX_STOPS} texts")
    return tuple(stops)


def _logprobs(body: dict) -> bool:
    """true, false, or how many alternatives: 0 and 1 give the token's own, more are not kept."""
    value = body.get("logprobs", False)
    if type(value) is bool:
        return value
    if type(value) is int and value in (0, 1):
        return True
    raise wrong("body.logprobs", value, "true, false, 0 or 1")
