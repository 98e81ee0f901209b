"""Held-out perplexity, router load and samples of the demonstration model, as Markdown.

    python evaluate.py --model /tmp/demo-hf --work /tmp/demo > report.md

Perplexity is over every token of the held-out documents and the end-of-text token after
each, in windows of 512 tokens that do not overlap; a document's first token is predicted
from the end-of-text token before it. Perplexity per byte is exp(total loss / bytes).
"""

import argparse
import csv
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from transformers import MixtralForCausalLM

import corpus


def windows(tokenizer, documents, length):
    """Lists of (inputs, targets), each at most `length` long."""
    for encoded in tokenizer.encode_batch(documents):
        ids = [0] + encoded.ids + [0]
        for at in range(0, len(ids) - 1, length):
            piece = ids[at:at + length + 1]
            yield piece[:-1], piece[1:]


@torch.no_grad()
def score(model, tokenizer, documents, rows=8):
    """(total loss in nats, tokens, expert counts [layer, expert]) over the documents."""
    length = model.config.max_position_embeddings
    pieces = sorted(windows(tokenizer, documents, length), key=lambda p: len(p[0]))
    loss, tokens, counts = 0.0, 0, 0
    for at in range(0, len(pieces), rows):
        group = pieces[at:at + rows]
        longest = len(group[-1][0])
        # Padding stands on the right, where causal attention keeps it from every real token.
        inputs = torch.tensor([p + [0] * (longest - len(p)) for p, _ in group])
        targets = torch.tensor([t + [-100] * (longest - len(t)) for _, t in group])
        out = model(input_ids=inputs, output_router_logits=True, use_cache=False)
        loss += F.cross_entropy(out.logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
        real = (targets != -100).flatten()
        tokens += int(real.sum())
        counts = counts + torch.stack([
            F.one_hot(layer[real].topk(2, -1).indices, layer.shape[-1]).sum((0, 1))
            for layer in out.router_logits])
    return loss, tokens, counts


def tables(model, tokenizer, held):
    print("| kind | documents | bytes | tokens | perplexity per token | per byte | bits per byte |")
    print("|---|---|---|---|---|---|---|")
    loads = {}
    for kind, documents in held.items():
        loss, tokens, counts = score(model, tokenizer, documents)
        size = sum(len(d.encode()) for d in documents)
        print(f"| {kind} | {len(documents)} | {size:,} | {tokens:,} | {math.exp(loss / tokens):.2f} "
              f"| {math.exp(loss / size):.3f} | {loss / size / math.log(2):.3f} |", flush=True)
        loads[kind] = counts / counts.sum(-1, keepdim=True)
    # Each kind counts the same here, whatever the size of its held-out part.
    mean = sum(loads.values()) / len(loads)
    print("\n| layer | busiest / mean | quietest / mean | " +
          " | ".join(f"{kind}: most used experts (share of its rows), busiest / mean" for kind in held) + " |")
    print("|---|---|---|" + "---|" * len(held))
    for layer, load in enumerate(mean):
        cells = []
        for kind in held:
            share, expert = loads[kind][layer].topk(3)
            cells.append(", ".join(f"{e} ({100 * s:.0f} %)" for e, s in zip(expert.tolist(), share.tolist()))
                         + f"; {share[0] * len(load):.1f}")
        print(f"| {layer} | {load.max() * len(load):.2f} | {load.min() * len(load):.2f} | " + " | ".join(cells) + " |")


@torch.no_grad()
def complete(model, tokenizer, body):
    """One completion of an OpenAI completion body."""
    ids = torch.tensor([tokenizer.encode(body["prompt"]).ids])
    warm = body.get("temperature", 1.0) > 0
    choice = dict(do_sample=True, temperature=body["temperature"], top_p=body.get("top_p", 1.0),
                  top_k=0) if warm else dict(do_sample=False)
    torch.manual_seed(body.get("seed", 0))
    out = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0,
                         max_new_tokens=body["max_tokens"], **choice)
    return tokenizer.decode(out[0, ids.shape[1]:].tolist())


def samples(model, tokenizer, path, every):
    for number, line in enumerate(Path(path).read_text("utf-8").splitlines()):
        if number % every:
            continue
        request = json.loads(line)
        body = request["body"]
        print(f"\n`{request['custom_id']}`, temperature {body['temperature']}; the prompt ends at `|`:\n")
        text = f"{body['prompt']}|{complete(model, tokenizer, body)}"
        print("    " + text.replace("\n", "\n    "), flush=True)


def curve(path, rows=16):
    with open(path, newline="") as file:
        points = list(csv.DictReader(file))
    wanted = sorted({round(i * (len(points) - 1) / (rows - 1)) for i in range(rows)})
    print("   step      tokens  minutes   loss     rate")
    for point in (points[i] for i in wanted):
        bar = "#" * round(8 * float(point["train_loss"]))
        print(f"{point['step']:>7} {int(point['tokens']):>11,} {float(point['minutes']):8.1f} "
              f"{float(point['train_loss']):6.3f} {point['learning_rate']:>8}  {bar}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face checkpoint of train.py")
    parser.add_argument("--work", type=Path, required=True, help="train.py's scratch folder")
    parser.add_argument("--prompts", type=Path, default=Path(__file__).parent / "prompts.jsonl")
    parser.add_argument("--every", type=int, default=4, help="complete every n-th prompt")
    parser.add_argument("--no-tables", action="store_true", help="samples only")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--python-version", default="3.11")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = MixtralForCausalLM.from_pretrained(args.model, dtype=torch.float32,
                                               experts_implementation="grouped_mm").eval()
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    if not args.no_tables:
        curve(args.work / "loss.csv")
        print()
        texts = corpus.load(args.work / "corpus", args.python_version)
        tables(model, tokenizer, {kind: texts[kind][1] for kind in corpus.KINDS})
    samples(model, tokenizer, args.prompts, args.every)


if __name__ == "__main__":
    main()
