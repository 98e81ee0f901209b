"""A tokenizer and a model's sizes, small and the same in every run, for tests on text."""

from __future__ import annotations

import functools

from hpcmoe.config import AttentionConfig, ExpertConfig, ModelConfig, RouterConfig
from hpcmoe.data.tokenizer import Tokenizer

SENTENCES = [
    "In the beginning was the word, and the word was with the reader.",
    "A process is a program in execution; see also the manual page of fork.",
    "def area(width, height): return width * height  # in metres",
    "Zürich, naïve, 東京, Ελλάδα and \N{GRINNING FACE} are texts as well.",
] * 3
CHAT = ("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}")
BOS, EOS = 0, 1


@functools.lru_cache(maxsize=None)
def tokenizer_json(kind: str = "bytes") -> str:
    """tokenizer.json of a BPE over bytes ("bytes"), or over words marked by ▁ ("metaspace")."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers
    special = ["<s>", "</s>", "<unk>"]
    if kind == "bytes":
        engine = tokenizers.Tokenizer(models.BPE())
        engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        engine.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        engine = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
        engine.pre_tokenizer = pre_tokenizers.Metaspace()
        engine.decoder = decoders.Metaspace()
        alphabet = []
    engine.train_from_iterator(SENTENCES, trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False))
    return engine.to_str()


@functools.lru_cache(maxsize=None)
def tokenizer(kind: str = "bytes", chat: str | None = CHAT, bos_id: int = BOS) -> Tokenizer:
    return Tokenizer.from_json(tokenizer_json(kind), chat, {"bos_token": "<s>"}, bos_id)


def model(context: int = 64, vocab: int = 400) -> ModelConfig:
    return ModelConfig("mixtral", vocab, 8, 1, AttentionConfig(1, 1, 8), RouterConfig(4, 2),
                       ExpertConfig(8), context, stop_ids=(EOS,), bos_id=BOS)
