"""`hpcmoe weights`: convert, inspect, verify, create."""

from __future__ import annotations

import argparse
import os
import sys
import time

from hpcmoe.errors import EXIT_OK, EXIT_USER, UserError


def add_parser(subparsers) -> None:
    """Adds `weights` and its sub-commands; each sets `handler`, a function of args -> exit code."""
    parser = subparsers.add_parser("weights", help="make, convert and check weights files",
                                   description="Make, convert and check HDF5 weights files.")
    commands = parser.add_subparsers(dest="weights_command", required=True, metavar="COMMAND")
    _convert_parser(commands)
    _inspect_parser(commands)
    _verify_parser(commands)
    _create_parser(commands)


def _command(commands, name: str, handler, help_: str, example: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=help_, description=help_[0].upper() + help_[1:] + ".",
                                 epilog="example:\n  " + example,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(handler=handler)
    return parser


def _free(path: str, force: bool) -> None:
    if os.path.exists(path) and not force:
        raise UserError(f"{path}: exists already; --force replaces it once the new one is complete")


class Bar:
    """Progress in bytes on stderr: one live line on a terminal, a plain line every few seconds else."""

    def __init__(self, what: str, quiet: bool = False, stream=None):
        self.what, self.quiet, self.stream = what, quiet, stream or sys.stderr
        self.live = self.stream.isatty()
        self.start = self.last = time.monotonic()
        self.first = None

    def __call__(self, done: int, total: int, name: str) -> None:
        now = time.monotonic()
        self.first = done if self.first is None else self.first
        if self.quiet or (done < total and now - self.last < (0.1 if self.live else 5.0)):
            return
        if done >= total and not self.live and now - self.start < 5.0:
            return
        self.last = now
        rate = (done - self.first) / max(now - self.start, 1e-9)
        text = f"{self.what} {done / 1e9:.2f}/{total / 1e9:.2f} GB {done / max(total, 1):4.0%} {rate / 1e6:.0f} MB/s"
        if self.live:
            filled = int(20 * done / max(total, 1))
            end = "\n" if done >= total else ""
            self.stream.write(f"\r\x1b[K[{'#' * filled}{'.' * (20 - filled)}] {text} {name}{end}")
        else:
            self.stream.write(f"{text} {name}\n")
        self.stream.flush()


# ---------------------------------------------------------------- convert
def _convert_parser(commands) -> None:
    parser = _command(commands, "convert", _convert, "turn a Hugging Face checkpoint into a weights file",
                      "hpcmoe weights convert OLMoE-1B-7B-0924 olmoe.h5 --dtype bf16\n\n"
                      "A conversion that was cut goes on where it stopped when the command is given again.")
    parser.add_argument("folder", help="folder with config.json, *.safetensors, tokenizer.json")
    parser.add_argument("out", help="weights file to write (.h5)")
    parser.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), help="storage type (default: the checkpoint's)")
    parser.add_argument("--force", action="store_true", help="replace OUT where it exists")
    parser.add_argument("--quiet", action="store_true", help="no progress")


def _convert(args) -> int:
    from hpcmoe.data.convert import convert
    _free(args.out, args.force)
    start = time.monotonic()
    say = (lambda line: None) if args.quiet else (lambda line: print(line, file=sys.stderr, flush=True))
    made = convert(args.folder, args.out, args.dtype, Bar("convert", args.quiet), say)
    if not args.quiet:
        for note in made.notes:
            print(note)
        print(f"{args.out}: {made.units} tensors and experts, {made.nbytes / 1e9:.3f} GB in {made.dtype}, "
              f"{time.monotonic() - start:.1f} s")
    return EXIT_OK


# ---------------------------------------------------------------- inspect, verify
def _inspect_parser(commands) -> None:
    parser = _command(commands, "inspect", _inspect, "show what a weights file holds",
                      "hpcmoe weights inspect inputs/demo/demo.h5")
    parser.add_argument("file", help="weights file (.h5)")
    parser.add_argument("--json", action="store_true", help="as JSON")


def _inspect(args) -> int:
    from hpcmoe.data.weights_check import as_json, describe
    print(as_json(args.file) if args.json else "\n".join(describe(args.file)))
    return EXIT_OK


def _verify_parser(commands) -> None:
    parser = _command(commands, "verify", _verify, "check every tensor: shape, checksum, NaN, infinities",
                      "hpcmoe weights verify inputs/demo/demo.h5\n\n"
                      "exit code 0: sound; 2: not, with one line for each thing that is wrong")
    parser.add_argument("file", help="weights file (.h5)")
    parser.add_argument("--quiet", action="store_true", help="no progress")


def _verify(args) -> int:
    from hpcmoe.data.weights_check import verify
    problems = verify(args.file, Bar("verify", args.quiet))
    for problem in problems[:50]:
        print(problem, file=sys.stderr)
    if len(problems) > 50:
        print(f"... and {len(problems) - 50} more", file=sys.stderr)
    if not problems:
        print(f"{args.file}: sound: every shape and checksum is right, no NaN, no infinity")
    return EXIT_USER if problems else EXIT_OK


# ---------------------------------------------------------------- create
def _create_parser(commands) -> None:
    parser = _command(commands, "create", _create, "random weights of any geometry, for benchmarks",
                      "hpcmoe weights create bench.h5 --layers 4 --d 1024 --f 3584 --experts 16 --top-k 2 "
                      "--heads 16 --kv-heads 4 --vocab 4096 --dtype bf16")
    parser.add_argument("out", help="weights file to write (.h5)")
    from hpcmoe.model.families import FAMILIES
    parser.add_argument("--family", choices=sorted(FAMILIES), default="mixtral")
    for name, default, text in (("layers", 4, "layers"), ("d", 1024, "model width"), ("f", 3584, "expert width"),
                                ("experts", 16, "experts per layer"), ("top-k", 2, "experts per token"),
                                ("heads", 16, "query heads"), ("kv-heads", 4, "key and value heads"),
                                ("head-dim", 0, "width of a head (0: d / heads)"), ("vocab", 4096, "vocabulary"),
                                ("context", 4096, "longest sequence, tokens"), ("seed", 0, "random seed")):
        parser.add_argument("--" + name, type=int, default=default, metavar="N", help=f"{text} (default {default})")
    parser.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), default="fp32")
    parser.add_argument("--tied", action="store_true", help="the head is the embedding")
    parser.add_argument("--force", action="store_true", help="replace OUT where it exists")
    parser.add_argument("--quiet", action="store_true", help="no progress")


def _create(args) -> int:
    from hpcmoe.data.create import create
    from hpcmoe.model.families import random_config
    _free(args.out, args.force)
    config = random_config(args.family, layers=args.layers, d=args.d, f=args.f, experts=args.experts,
                           top_k=args.top_k, heads=args.heads, kv_heads=args.kv_heads,
                           head_dim=args.head_dim, vocab=args.vocab, context=args.context, tied=args.tied)
    start = time.monotonic()
    size = create(args.out, config, args.dtype, args.seed, Bar("create", args.quiet))
    if not args.quiet:
        seconds = time.monotonic() - start
        print(f"{args.out}: {size / 1e9:.3f} GB of random {args.dtype} weights in {seconds:.1f} s "
              f"({size / max(seconds, 1e-9) / 1e6:.0f} MB/s)")
    return EXIT_OK
