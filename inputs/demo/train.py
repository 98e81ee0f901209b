"""Train the demonstration model: 4 MoE layers x 16 experts, top-2, 8.5 M parameters.

    pip install '.[train]'                        # in the root of the checkout
    python train.py --work /tmp/demo --out /tmp/demo-hf --minutes 80

Fetches its text from Debian packages (corpus.py), trains a byte-level BPE tokenizer and a
Hugging Face MixtralForCausalLM on it with one CPU thread, and ends by itself: the learning
rate follows a cosine of the share of the time or token budget that is used up, whichever is
larger, so a slow machine reaches the low end of the schedule too. The checkpoint in --out
(FP16, replaced every few minutes) is what `hpcmoe weights convert` reads; --resume goes on
from the full-precision state in --work.
"""

import argparse
import csv
import json
import math
import random
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

import corpus

END = "<|endoftext|>"  # between documents, and where generation stops; its id is 0


@dataclass(frozen=True)
class Plan:
    """Every number that shapes the result; written beside the model."""
    seed: int = 20
    minutes: float = 80.0
    token_budget: int = 20_000_000
    tokens_per_step: int = 3072
    learning_rate: float = 2.4e-3
    final_share: float = 0.03        # of the learning rate, at the end
    warmup_steps: int = 100
    weight_decay: float = 0.1
    clip: float = 1.0
    balance: float = 0.01            # weight of the router's load-balancing loss
    short: int = 256                 # row length, until `lengthen`
    long: int = 512                  # row length after it: the whole context gets trained
    lengthen: float = 0.75
    start_share: float = 0.1         # of rows that begin exactly where a document begins


def model_config(vocabulary):
    """Mixtral, small: 4 layers, 16 experts of width 208, 6 heads over 2 key/value heads."""
    return MixtralConfig(
        vocab_size=vocabulary, hidden_size=192, intermediate_size=208, num_hidden_layers=4,
        num_attention_heads=6, num_key_value_heads=2, head_dim=32, num_local_experts=16,
        num_experts_per_tok=2, max_position_embeddings=512, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, sliding_window=None,
        bos_token_id=0, eos_token_id=0, router_aux_loss_coef=Plan.balance)


def train_tokenizer(texts, vocabulary=2048):
    """Byte-level BPE on an equal number of bytes of each kind of text."""
    size = min(sum(map(len, documents)) for documents, _ in texts.values())
    sample = []
    for kind in corpus.KINDS:
        documents, taken = list(texts[kind][0]), 0
        random.Random(0).shuffle(documents)
        while documents and taken < size:
            sample.append(documents.pop())
            taken += len(sample[-1])
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(sample, trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return tokenizer


class Stream:
    """The documents of one kind as one run of token ids, END between them."""

    def __init__(self, tokenizer, documents, order):
        documents = list(documents)
        order.shuffle(documents)
        parts = [np.array(e.ids + [0], np.int64) for e in tokenizer.encode_batch(documents)]
        self.ids = np.concatenate(parts)
        self.starts = np.cumsum([0] + [len(p) for p in parts[:-1]])
        self.tokens_per_byte = len(self.ids) / sum(len(d.encode()) for d in documents)

    def row(self, length, rng, start_share):
        at = rng.choice(self.starts) if rng.random() < start_share else rng.integers(len(self.ids))
        at = min(int(at), len(self.ids) - length - 1)
        return self.ids[at:at + length + 1]


def batch(streams, length, rows, rng, start_share):
    """[rows, length + 1] ids; kinds in equal shares of bytes, not of tokens."""
    share = np.array([s.tokens_per_byte for s in streams])
    kinds = rng.choice(len(streams), rows, p=share / share.sum())
    return torch.from_numpy(np.stack([streams[k].row(length, rng, start_share) for k in kinds]))


def loss_of(logits, ids):
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def balance_loss(router_logits, top_k=2):
    """Switch Transformer's load-balancing loss, layer by layer; 1 when balanced.

    The one in transformers adds the layers' loads before it compares, so an expert that
    starves in one layer can hide behind its namesakes in the others.
    """
    total = 0.0
    for logits in router_logits:
        probability = logits.float().softmax(-1)
        chosen = probability.topk(top_k, -1).indices
        load = F.one_hot(chosen, logits.shape[-1]).float().mean((0, 1))
        total = total + logits.shape[-1] * (load * probability.mean(0)).sum()
    return total / len(router_logits)


def make_optimizer(model, plan):
    """AdamW; weight decay on matrices, not on norms and embeddings."""
    decayed = [p for n, p in model.named_parameters() if p.dim() > 1 and "embed" not in n]
    plain = [p for n, p in model.named_parameters() if p.dim() <= 1 or "embed" in n]
    return torch.optim.AdamW([{"params": decayed, "weight_decay": plan.weight_decay},
                              {"params": plain, "weight_decay": 0.0}],
                             lr=plan.learning_rate, betas=(0.9, 0.95), fused=True)


def learning_rate(plan, step, done):
    warm = min(1.0, (step + 1) / plan.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    return plan.learning_rate * warm * (plan.final_share + (1 - plan.final_share) * cosine)


@torch.no_grad()
def quick_look(model, held):
    """Held-out loss per kind on a few fixed rows, and the emptiest expert's share of the mean."""
    model.eval()
    losses, least = {}, []
    for kind, stream in held.items():
        rng = np.random.default_rng(1)
        ids = torch.from_numpy(np.stack([stream.row(256, rng, 0.1) for _ in range(8)]))
        out = model(input_ids=ids[:, :-1], output_router_logits=True, use_cache=False)
        losses[kind] = round(loss_of(out.logits, ids).item(), 3)
        least.append(torch.stack([F.one_hot(l.topk(2, -1).indices, 16).float().sum((0, 1))
                                  for l in out.router_logits]))
    load = sum(least)
    model.train()
    return losses, float((load.min() / load.mean())), float(load.max() / load.mean())


def save(model, tokenizer, out, note):
    """Write the FP16 checkpoint beside `out`, then put it in its place."""
    fresh, old = out.with_name(out.name + ".new"), out.with_name(out.name + ".old")
    shutil.rmtree(fresh, ignore_errors=True)
    half = MixtralForCausalLM(model.config).half()
    half.load_state_dict(model.state_dict())
    half.save_pretrained(fresh)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END,
                            model_max_length=model.config.max_position_embeddings).save_pretrained(fresh)
    (fresh / "STATUS").write_text(note + "\n")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    fresh.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def prepare(work, python_version, plan):
    """Text, tokenizer and token streams: (tokenizer, training streams, held-out streams)."""
    texts = corpus.load(work / "corpus", python_version)
    path = work / "tokenizer.json"
    if not path.exists():
        train_tokenizer(texts).save(str(path))
    tokenizer = Tokenizer.from_file(str(path))
    order = random.Random(plan.seed)
    train = [Stream(tokenizer, texts[kind][0], order) for kind in corpus.KINDS]
    held = {kind: Stream(tokenizer, texts[kind][1], order) for kind in corpus.KINDS}
    for kind, stream in zip(corpus.KINDS, train):
        print(f"{kind}: {len(stream.ids):,} tokens to train on, "
              f"{1 / stream.tokens_per_byte:.2f} bytes each", flush=True)
    return tokenizer, train, held


def train(args, plan):
    tokenizer, streams, held = prepare(args.work, args.python_version, plan)
    torch.manual_seed(plan.seed)
    rng = np.random.default_rng(plan.seed)
    model = MixtralForCausalLM._from_config(model_config(tokenizer.get_vocab_size()),
                                            attn_implementation="sdpa",
                                            experts_implementation="grouped_mm").train()
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    optimizer = make_optimizer(model, plan)
    step = tokens = 0
    spent = 0.0  # minutes of earlier runs
    state_path, curve_path = args.work / "state.pt", args.work / "loss.csv"
    if args.resume:
        state = torch.load(state_path)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, tokens, spent = state["step"], state["tokens"], state["minutes"]
        rng = np.random.default_rng([plan.seed, step])  # not the rows that it has seen
    else:
        curve_path.write_text("step,tokens,minutes,train_loss,learning_rate\n")
    begin, saved, recent = time.monotonic(), spent, []
    while True:
        minutes = spent + (time.monotonic() - begin) / 60
        done = max(tokens / plan.token_budget, minutes / plan.minutes)
        rate = learning_rate(plan, step, done)
        if step % 50 == 0 and recent:
            with open(curve_path, "a", newline="") as file:
                row = [step, tokens, f"{minutes:.2f}", f"{np.mean(recent):.4f}", f"{rate:.2e}"]
                csv.writer(file, lineterminator="\n").writerow(row)
            print("step {} tokens {} minutes {} loss {} rate {}".format(*row), flush=True)
            recent = []
        if done >= 1 or minutes - saved >= args.save_every or (saved == 0 and minutes >= 3):
            look, least, most = quick_look(model, held)
            note = (f"step {step}, {tokens} tokens, held-out loss {json.dumps(look)}, expert load "
                    f"min {least:.2f} max {most:.2f} of mean, {'final' if done >= 1 else 'not final'}")
            print(note, flush=True)
            fresh = state_path.with_suffix(".new")
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step,
                        "tokens": tokens, "minutes": minutes}, fresh)
            fresh.rename(state_path)
            save(model, tokenizer, args.out, note)
            saved = minutes
        if done >= 1:
            return
        length = plan.short if done < plan.lengthen else plan.long
        ids = batch(streams, length, plan.tokens_per_step // length, rng, plan.start_share)
        for group in optimizer.param_groups:
            group["lr"] = rate
        out = model(input_ids=ids[:, :-1], output_router_logits=True, use_cache=False)
        loss = loss_of(out.logits, ids)
        (loss + plan.balance * balance_loss(out.router_logits)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), plan.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        recent.append(loss.item())
        step, tokens = step + 1, tokens + ids.numel() - len(ids)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="scratch folder: text, state, loss.csv")
    parser.add_argument("--out", type=Path, required=True, help="Hugging Face checkpoint folder to write")
    parser.add_argument("--minutes", type=float, default=Plan.minutes, help="wall time of the whole run")
    parser.add_argument("--tokens", type=int, default=Plan.token_budget, help="token budget")
    parser.add_argument("--seed", type=int, default=Plan.seed)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save-every", type=float, default=5.0, help="minutes between checkpoints")
    parser.add_argument("--python-version", default="3.11", help="of the Debian release, for its package names")
    parser.add_argument("--resume", action="store_true", help="go on from the state in --work")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.disable_progress_bar()
    plan = Plan(seed=args.seed, minutes=args.minutes, token_budget=args.tokens)
    args.work.mkdir(parents=True, exist_ok=True)
    (args.work / "plan.json").write_text(json.dumps(asdict(plan), indent=1) + "\n")
    train(args, plan)


if __name__ == "__main__":
    main()
