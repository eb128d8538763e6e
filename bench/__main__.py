"""Speed and memory from the command line: kernel, memory, marked, step and prefill.

    python -m bench kernel     the loss alone: times, TFLOP/s and memory, beside its alternatives
    python -m bench memory     its peak memory against T, as a figure
    python -m bench marked     how often the Hopper forward goes over a model's rows twice
    python -m bench step       a training step and its parts, for models by name
    python -m bench prefill    reading a long block, as eval.py does

kernel.py, memory.py, marked.py, step.py and prefill.py say what is measured and how.
"""

import argparse
import os
from pathlib import Path

import torch

from bench import kernel as kernels
from bench import marked as marks
from bench import memory as memories
from bench import prefill as prefills
from bench import step as steps


def logged(bench, file: str):
    """A command that hands its arguments, its conditions and a file of JSON lines to `bench`."""

    def run(arguments) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        first = os.environ.get("RANK", "0") == "0"  # of torchrun's processes, the one that writes
        lines = kernels.open_lines(arguments.out, file) if first else open(os.devnull, "w")
        with lines as log:
            bench(arguments, kernels.conditions(device) if first else {}, log)

    return run


COMMANDS = {"kernel": kernels.bench_kernel, "memory": memories.bench_memory}
COMMANDS["marked"] = marks.bench_marked
COMMANDS["step"] = logged(steps.bench_step, "step.jsonl")
COMMANDS["prefill"] = logged(prefills.bench_prefill, "prefill.jsonl")


def main() -> None:
    """Reads the command line and runs one of COMMANDS."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    kernel = commands.add_parser(
        "kernel", help="times, TFLOP/s and peak memory at a list of shapes"
    )
    kernel.add_argument(
        "--shapes", nargs="+", metavar="HxTxD[t]", help="instead of the default list"
    )
    kernel.add_argument(
        "--deterministic", action="store_true", help="attention in a fixed order, as in train.py"
    )
    memory = commands.add_parser("memory", help="peak memory against T, as a figure")
    memory.add_argument(
        "--lengths", nargs="+", type=int, metavar="T", help="instead of the default list"
    )
    marked = commands.add_parser("marked", help="rows that the Hopper forward computes twice")
    marked.add_argument("--model", type=Path, required=True, metavar="DIR", help="the teacher")
    marked.add_argument("--text", type=Path, required=True, metavar="FILE", help="text to read")
    marked.add_argument("--lengths", nargs="+", type=int, metavar="T", default=[512, 8192, 32768])
    step = commands.add_parser(
        "step", help="a training step's speed, parts and memory", description=steps.__doc__
    )
    step.formatter_class = argparse.RawDescriptionHelpFormatter
    steps.add_flags(step)
    prefill = commands.add_parser(
        "prefill", help="reading a long block", description=prefills.__doc__
    )
    prefill.formatter_class = argparse.RawDescriptionHelpFormatter
    prefills.add_flags(prefill)
    for command in (kernel, memory):
        command.add_argument(
            "--only", nargs="+", metavar="NAME", help="these rows, such as triton dense"
        )
        command.add_argument(
            "--authors", type=Path, metavar="PATH", help="a clone of gracefulning/LinearARD (GPU)"
        )
    for command in (kernel, memory, marked, step, prefill):
        command.add_argument(
            "--out", type=Path, default=Path("out"), help="folder of JSON lines and figure [out]"
        )
    arguments = parser.parse_args()
    COMMANDS[arguments.command](arguments)


if __name__ == "__main__":
    main()
