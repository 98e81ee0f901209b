"""Text to token ids and back, and chat templates.

The tokenizer is the `tokenizer.json` text that travels inside the weights file. The packages
`tokenizers` and `jinja2` are the optional extra [text]: jobs on token ids run without them.
"""

from __future__ import annotations

import datetime
import importlib.util
import json

import numpy as np

from hpcmoe.errors import UserError

# A token that ends inside a character decodes to this mark until its other bytes come.
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
# Longest run of tokens that may wait for the end of one character (UTF-8 needs 4 bytes).
_LONGEST_WAIT = 8


def text_installed() -> bool:
    """True where the packages of the extra [text] can be imported."""
    return all(importlib.util.find_spec(name) for name in ("tokenizers", "jinja2"))


class Tokenizer:
    """Encodes prompts, decodes tokens, renders chats. Made by `from_json`.

    bos_id: token id put before a plain text prompt, -1 for none. Chat templates write their own.
    """

    def __init__(self, engine, chat_template: str | None, special: dict[str, str], bos_id: int):
        self._engine = engine
        self._template_text = chat_template
        self._template = None
        self._special = dict(special)
        self.bos_id = bos_id

    @classmethod
    def from_json(cls, text: str, chat_template: str | None = None,
                  special: dict[str, str] | None = None, bos_id: int = -1) -> "Tokenizer":
        """A tokenizer from the text of a `tokenizer.json`.

        special: names and texts that chat templates may use, such as {"bos_token": "<s>"}.
        Raises UserError where the extra [text] is not installed or the text is no tokenizer.
        """
        if not text_installed():
            raise UserError("text prompts need the packages tokenizers and jinja2: "
                            "pip install 'hpcmoe[text]', or give token ids")
        import tokenizers
        try:
            engine = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the package raises plain Exception
            raise UserError(f"the tokenizer in the weights cannot be read: {error}") from error
        # Settings for training batches, which some files carry, would cut or fill prompts.
        engine.no_truncation()
        engine.no_padding()
        return cls(engine, chat_template, special or {}, bos_id)

    @property
    def has_chat(self) -> bool:
        """True where the model came with a chat template."""
        return bool(self._template_text)

    def encode(self, text: str, bos: bool = True) -> np.ndarray:
        """Token ids, int32 [n], with the model's first token where it has one and `bos` is true.

        Raises UserError where the text holds something that the tokenizer has no token for.
        """
        try:
            ids = self._engine.encode(text, add_special_tokens=False).ids
        except Exception as error:  # the package raises plain Exception
            raise UserError(f"the tokenizer refuses the text: {error}") from error
        head = [self.bos_id] if bos and self.bos_id >= 0 else []
        return np.array(head + ids, dtype=np.int32)

    def decode(self, ids) -> str:
        """The text of token ids [n]; special tokens and ids without a text are left out."""
        return self._engine.decode([int(i) for i in ids], skip_special_tokens=True)

    def pieces(self, ids) -> list[str]:
        """The text that each of ids [n] adds; joined they are the text of all.

        A character spread over several tokens belongs to the last of them. A token is decoded
        together with the one before, since some decoders treat the first token otherwise.
        """
        out: list[str] = []
        first = shown = 0
        for end in range(1, len(ids) + 1):
            before, now = self.decode(ids[first:shown]), self.decode(ids[first:end])
            waits = now.endswith(_UNFINISHED) and end - shown < _LONGEST_WAIT and end < len(ids)
            out.append("" if waits else now[len(before):])
            if not waits and now != before:
                first, shown = shown, end
        return out

    def chat(self, messages: list[dict], answer: bool = True) -> str:
        """The prompt of a chat; `answer`: end it where the assistant's answer begins.

        The environment is the one that Hugging Face templates are written for: a sandbox with
        `raise_exception`, `strftime_now` and a `tojson` that does not escape HTML.
        Raises UserError where there is no template or the template refuses the messages.
        """
        if not self._template_text:
            raise UserError("the model has no chat template: give a prompt, not messages")
        import jinja2
        try:
            if self._template is None:
                self._template = _environment().from_string(self._template_text)
            return self._template.render(messages=messages, add_generation_prompt=answer,
                                         **self._special)
        except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError,
                AttributeError) as error:  # what a template's expressions can raise
            raise UserError(f"the model's chat template refuses the messages: {error}") from error


def _environment():
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(value, indent=None, **options):
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment
