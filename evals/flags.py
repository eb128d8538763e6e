"""The command line of eval.py: every flag, its range and its meaning, in one gate.

What.  A value out of range, a flag without the flag it needs, a flag that changes nothing here: all
are refused in one sentence before anything is read. The result is never changed afterwards.

Limits.  What depends on a model's config or on the text is refused in eval.py, before a weight is
loaded.
"""

import argparse
import shlex
import sys

import torch

from engine.flags import check_device, count, folder, new_parser, path, positive, seed
from evals.ruler_tasks import TASKS
from hub import download

# Of flags that are None where they are not given, as they change nothing by themselves
DEFAULTS = {"samples": 32, "new_tokens": 100, "blocks": 8, "ruler_seed": 42}
# The most that is taken for what somebody means: prompts are made before a model is asked
MOST = {"lengths": 1 << 24, "samples": 100_000}
# What each flag is of: it changes nothing without one of these
NEEDS = {
    "task_dir": ("tasks",),
    "limit": ("tasks",),
    "documents": ("ppl",),
    "ruler_data": ("ruler",),
    "ruler_seed": ("ruler", "passkey"),
    "samples": ("ruler", "passkey"),
    "lengths": ("ppl", "positions", "passkey", "ruler"),
    "predictions": ("out",),
}
# What --prompt, which measures nothing, has a use for
CONTINUING = ("model", "device", "dtype", "seed", "prompt", "new_tokens")


def parse(argv: list[str] | None, about: str) -> argparse.Namespace:
    """The arguments of an evaluation, complete and in range. Raises ValueError in one sentence."""
    p = new_parser(about)
    _add_flags(p)
    args = p.parse_args(argv)
    _check(args)
    args.command = shlex.join(["python", "eval.py", *(sys.argv[1:] if argv is None else argv)])
    args.model = download.resolve(args.model)
    args.against = download.resolve(args.against) if args.against else None
    for key, value in DEFAULTS.items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    args.lengths = sorted(set(args.lengths)) if args.lengths else None
    return args


def _add_flags(p: argparse.ArgumentParser) -> None:
    add = p.add_argument
    add("--model", type=path, required=True, help="the directory to score")
    add("--against", type=path, help="its teacher: adds the columns teacher and untrained")
    add("--out", type=folder, help="a new folder for report.json, report.md and the pictures")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=device, help="a torch device (cuda where there is one)")
    kinds = ("auto", "float32", "bfloat16")
    add("--dtype", choices=kinds, default="auto", help="to compute in (auto)")
    add("--seed", type=seed, default=0, help="of look-ups and confidence intervals (0)")
    add("--predictions", action="store_true", help="also write every item's scores, under --out")
    add("--prompt", help="continue this text, and measure nothing; - reads standard input")
    add("--new-tokens", type=count, help=f"of --prompt, at most ({DEFAULTS['new_tokens']})")
    add = p.add_argument_group("held-out text").add_argument
    add("--data", type=path, nargs="+", default=[], help="text (sympy's sources)")
    add("--text-field", help="of rows, where it is not `text` or a chat's `messages`")
    add("--no-text", action="store_true", help="leave the held-out text out")
    add("--native", type=count, help="tokens that count as 1x (the teacher's length)")
    add("--scale", type=positive, help="the longest blocks, in native lengths (the student's)")
    add("--blocks", type=count, help="long blocks or documents to read (8)")
    add("--cache", type=folder, help="folder to keep tokenised text in (none: it is not kept)")
    add = p.add_argument_group("short text").add_argument
    add("--tasks", nargs="+", default=[], help="task files, folders of them, names, or all")
    add("--task-dir", type=path, help="the folder in which named tasks lie (the current one)")
    add("--limit", type=count, help="at most this many items per task (all)")
    add = p.add_argument_group("long text").add_argument
    add("--lengths", type=count, nargs="+", help="tokens (1, 2, 4, ... native lengths)")
    add("--ppl", action="store_true", help="sliding-window perplexity at each length")
    add("--documents", type=path, nargs="+", help="long texts for --ppl (held-out text)")
    add("--positions", action="store_true", help="loss as a function of position")
    add("--passkey", action="store_true", help="passkey by depth and length")
    add("--ruler", nargs="*", metavar="TASK", help="RULER, or some of its tasks")
    add("--ruler-data", type=path, help="folder with RULER's word lists, essays and QA sets")
    add("--ruler-seed", type=seed, help="of RULER's and passkey's prompts (42, as RULER's)")
    usual = f"{DEFAULTS['samples']}; RULER: 500, PI's passkey: 320"
    add("--samples", type=count, help=f"prompts per task and length ({usual})")
    add = p.add_argument_group("diagnosis").add_argument
    add("--layers", action="store_true", help="relation KL by layer, relation and head")


def _given(args: argparse.Namespace, key: str) -> bool:
    """--ruler without names is an empty list, and given; no --data is one too, and is not."""
    value = getattr(args, key)
    return value is not None if key == "ruler" else value not in (None, False, [])


def _flag(key: str) -> str:
    return "--" + key.replace("_", "-")


def _check(args: argparse.Namespace) -> None:
    check_device(args.device)
    if args.prompt is not None:
        for key in vars(args):
            if key not in CONTINUING and _given(args, key):
                raise ValueError(
                    f"--prompt continues a text and measures nothing: leave {_flag(key)} out"
                )
        return
    if args.new_tokens:
        raise ValueError("--new-tokens is of a text that is continued: add --prompt")
    if args.layers and not args.against:
        raise ValueError(
            "--layers compares a student with its teacher; name the teacher with --against"
        )
    for key, needed in NEEDS.items():
        if _given(args, key) and not any(_given(args, other) for other in needed):
            either = " or ".join(map(_flag, needed))
            raise ValueError(f"{_flag(key)} changes nothing by itself: add {either}")
    for key, most in MOST.items():
        value = getattr(args, key) or 0
        if (max(value) if isinstance(value, list) else value) > most:
            raise ValueError(f"{_flag(key)} goes up to {most:,}")
    for key in ("task_dir", "ruler_data"):
        if (place := getattr(args, key)) and not place.is_dir():
            raise ValueError(f"{_flag(key)} {place} is not a folder")
    for name in args.ruler or ():
        if name not in TASKS or name == "passkey":
            known = ", ".join(task for task in TASKS if task != "passkey")
            raise ValueError(f"--ruler {name} is not one of {known}")
    if args.scale is not None and not 1 <= args.scale <= 1e6:
        raise ValueError(f"--scale is {args.scale:g}; it must be from 1 to a million")
    families = ("tasks", "ppl", "positions", "passkey", "ruler", "layers")
    if args.no_text and not any(_given(args, key) for key in families):
        raise ValueError(
            "--no-text leaves nothing to do; ask for --tasks, --ruler, --passkey, --ppl or --layers"
        )
    if (args.native or 1) * (args.scale or 1) > 1 << 31:
        raise ValueError(f"--native {args.native} is too long to be read in one block")
