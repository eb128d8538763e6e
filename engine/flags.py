"""The command line of train.py: every flag, its range and its meaning, in one gate.

A value out of range, a flag without the flag it needs, a preset's values: all are settled here,
before anything is read. The result is never changed afterwards.

Presets stand for a whole recipe (train.py): `authors` is the paper's own; `demo` is taken where no
--teacher is named, and the plan says so. A flag that is given wins over a preset.
"""

import argparse
import importlib.util
import math
from collections.abc import Callable
from pathlib import Path

import torch

from hub import download
from relation_kl import IMPLEMENTATIONS
from rope import STUDENT_KINDS

HERE = Path(__file__).resolve().parents[1]
SUBSETS = ("q", "k", "v", "qk", "qv", "kv", "qkv", "none")


def parser(about: str) -> argparse.ArgumentParser:
    """Every flag, its range and its help."""
    p = new_parser(about)
    _what(p.add_argument_group("what").add_argument)
    _how(p.add_argument_group("how (what is left out is printed with the plan)").add_argument)
    _running(p.add_argument_group("running").add_argument)
    return p


def _what(add: Callable) -> None:
    add("--teacher", type=path, help="Hugging Face directory of a LLaMA (default: the demo's)")
    add("--scale", type=scale, default=8.0, help="how many times the context, above 1 (8)")
    add(
        "--rope",
        choices=STUDENT_KINDS,
        help="how positions are stretched (the teacher's kind, or linear)",
    )
    add("--data", type=path, nargs="+", default=[], help="text files or folders (sympy's sources)")
    add("--text-field", help="of rows, where it is not `text` or a chat's `messages`")
    add("--out", type=folder, help="a new folder for the result (out/NAME-xSCALE)")
    add("--stage", choices=("1", "2", "both"), default="both", help="which stages to run (both)")


def _how(add: Callable) -> None:
    for n in (1, 2):
        add(f"--tokens{n}", type=count, help=f"tokens that stage {n} reads")
        add(f"--length{n}", type=count, help=f"tokens per block of stage {n}")
        add(f"--batch{n}", type=count, help=f"blocks per step of stage {n}")
        add(f"--lr{n}", type=positive, help=f"peak learning rate of stage {n}")
        add(
            f"--skips{n}",
            type=whole,
            help=f"in every other step, cut stage {n}'s blocks in so many places and move the "
            f"parts on, up to the whole context ({'0; the linear demo 4' if n == 2 else 0})",
        )
    add(
        "--logit-weight",
        type=weight,
        help="of the next-token KL beside the relations (1; the demo 3)",
    )
    add(
        "--relations",
        choices=SUBSETS,
        help="which relations stage 1 compares (qkv; qv where keys have biases)",
    )
    add(
        "--teacher-share",
        type=share,
        help="of stage 2's target that is the teacher's distribution (0.5 where the teacher can "
        "read so long a block, else 0)",
    )
    add(
        "--native-blocks",
        type=whole,
        help="blocks of stage 1's kind beside each of stage 2's (0, as SmolLM2 lost by them; the "
        "yarn demo 4)",
    )
    add(
        "--lookups",
        type=share,
        help="share of blocks that are look-up documents (0; the demo 0.25)",
    )
    add(
        "--move-pairs",
        action="store_true",
        help="with linear: start each slot of q and k with the rotary pair that yarn would have "
        "turn as fast; short texts come back sooner (rope.py)",
    )
    add("--lora-rank", type=count, help="train adapters of this rank instead of full projections")
    add("--lora-alpha", type=positive, help="their weight is alpha / rank (twice the rank)")
    add("--lora-dropout", type=share, help="on the adapters' input (0)")
    add(
        "--bits",
        type=int,
        choices=(4,),
        help="with --lora-rank: the frozen weights in 4 bits (NF4, by bitsandbytes)",
    )
    add(
        "--preset",
        choices=("authors", "demo"),
        help="authors: the paper's adapters and stage 1; demo: what no --teacher means",
    )
    add("--micro", type=count, help="blocks at a time (as many as fill 8192 tokens)")
    add("--impl", choices=IMPLEMENTATIONS, default="auto", help="of the relation loss (auto)")
    dtypes = ("auto", "float32", "bfloat16")
    add("--dtype", choices=dtypes, default="auto", help="to compute in (auto)")
    add("--seed", type=seed, default=0, help="of the text's order and of all noise (0)")
    add(
        "--eval-blocks",
        type=whole,
        help="long held-out blocks for the table, and as many look-up documents of each length, up "
        "to 8; 0: no table (as many as cost 4%% of the steps; where one of each costs more, one "
        "block without look-ups; the demo 4)",
    )


def _running(add: Callable) -> None:
    add("--resume", action="store_true", help="go on from the last state in --out")
    add("--save-minutes", type=weight, default=10, help="write the state at least this often (10)")
    add(
        "--deterministic",
        action="store_true",
        help="the same bits every run on a GPU too, attention's backward being slower",
    )
    add("--dry-run", action="store_true", help="print the plan and stop")
    add("--shard", action="store_true", help="under torchrun: cut the models over the GPUs (FSDP2)")
    add("--peak-tflops", type=positive, help="what 100 %% MFU means (measured at the start)")
    add("--tensorboard", action="store_true", help="also write figures for TensorBoard")
    add("--wandb", metavar="PROJECT", help="also write figures to Weights & Biases")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=device, help="a torch device (cuda where there is one)")
    add("--cache", type=folder, help="folder for tokenised text, to share between runs (in --out)")


def parse(argv: list[str] | None, about: str, presets: dict[str, dict]) -> argparse.Namespace:
    """The arguments of a run, complete and in range. presets: train.py's.

    Raises ValueError in one sentence.
    """
    args = parser(about).parse_args(argv)
    names = [args.preset]
    if not args.teacher or args.preset == "demo":
        names += [f"demo {args.rope or 'linear'}", "demo"]
    args.preset = args.preset or (None if args.teacher else "demo")
    for name in (*names, "default"):
        for key, value in presets.get(name, {}).items():
            if getattr(args, key, None) is None:
                setattr(args, key, value)
    if args.lora_rank is None and (args.lora_alpha or args.lora_dropout):
        raise ValueError("--lora-alpha and --lora-dropout are of adapters: add --lora-rank")
    if args.lora_rank and args.lora_alpha is None:
        args.lora_alpha = 2.0 * args.lora_rank
    if args.lora_rank and args.move_pairs:
        raise ValueError(
            "--move-pairs moves rows of q and k, which adapters leave the teacher's: leave out "
            "--lora-rank or --move-pairs"
        )
    if args.lora_dropout >= 1:
        raise ValueError(f"--lora-dropout is {args.lora_dropout:g}; it must be below 1")
    if args.bits and not args.lora_rank:
        raise ValueError("--bits 4 packs what does not learn, beside adapters: add --lora-rank")
    if args.bits and args.shard:
        raise ValueError(
            "--bits 4 packs whole matrices, which --shard would cut over the processes: give one "
            "of the two"
        )
    if args.bits:
        require("bitsandbytes", "--bits 4")
    if args.relations == "none" and not args.logit_weight:
        raise ValueError("--relations none with --logit-weight 0 leaves stage 1 no loss: give one")
    if args.tensorboard:
        require("tensorboard", "--tensorboard")
    if args.wandb is not None:
        if not args.wandb.strip():
            raise ValueError("--wandb is empty; name a project of Weights & Biases")
        require("wandb", "--wandb")
    check_device(args.device)
    teacher = download.resolve(args.teacher) if args.teacher else HERE / "demo" / "teacher"
    name = f"{download.model_name(teacher) if args.teacher else 'demo'}-x{args.scale:g}"
    args.teacher, args.out = teacher, args.out or Path("out") / name
    args.cache = args.cache or args.out / "cache"
    return args


def new_parser(about: str) -> argparse.ArgumentParser:
    """A parser that raises ValueError in one sentence, instead of a page of usage."""

    def refuse(message: str) -> None:
        raise ValueError(message)

    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=about, formatter_class=raw)
    p.error = refuse
    return p


def require(package: str, flag: str) -> None:
    """Raises ValueError where `package`, which `flag` needs, is not installed."""
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"{flag} needs the package: pip install {package}, or leave the flag out")


def check_device(name: str) -> None:
    """Raises ValueError if torch has no such device here."""
    try:
        if torch.device(name).type not in ("cpu", "cuda"):
            raise ValueError(f"--device {name}: this program computes on cpu or cuda")
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as e:
        raise ValueError(
            f"--device {name} is not available here: {str(e).splitlines()[0]}"
        ) from None


# ---- types: each takes the text of a flag and says what it must be


def _number(what: str, good: Callable, kind: type = float) -> Callable:
    """A type of numbers, called `what` in the sentence, that are `good`."""

    def read(text: str):
        try:
            value = kind(text)
            if good(value):
                return value
        except (ValueError, OverflowError):
            pass
        raise argparse.ArgumentTypeError(f"{text[:40]} is not {what}")

    return read


scale = _number("a number above 1 and up to 1000, such as 8", lambda v: 1 < v <= 1000)
positive = _number("a number above 0", lambda v: 0 < v < math.inf)
weight = _number("a number from 0 up", lambda v: 0 <= v < math.inf)
share = _number("a number from 0 to 1", lambda v: 0 <= v <= 1)
count = _number("a whole number from 1 up", lambda v: 1 <= v < 1 << 48, int)
whole = _number("a whole number from 0 up", lambda v: 0 <= v < 1 << 31, int)
seed = _number("a whole number from 0 up to 2^32", lambda v: 0 <= v < 1 << 32, int)


def path(text: str) -> Path:
    """argparse's type of a flag that names what is there: "" would be the current folder."""
    if text.strip() and "\0" not in text:
        return Path(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not the name of a file or folder")


def folder(text: str) -> Path:
    """argparse's type of a flag that names a folder; it need not exist."""
    try:
        text.encode()
        if text.strip() and "\0" not in text:
            return Path(text)
    except UnicodeEncodeError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is not the name of a folder")
