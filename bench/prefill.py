"""What reading one long block takes where nobody trains: the two ways in which eval.py reads.

    python -m bench prefill --model llama2-7b --length 131072

What.  A model of a named shape with random weights, made on the device (step.py), reads T tokens:

    scores    as --ppl and --positions do: the loss of every token, layers in tiles, logits some
              rows at a time (evals/next_token.py)
    prompt    as --prompt does: CHUNK tokens at a time into the cache of keys and values, and then
              --new tokens one by one (evals/generate.py)

How it is measured.  Wall clock around one synchronised call after one of at most WARM tokens; peak
of torch's allocator, on a CPU of the resident set. Weights and cache, which must be there, stand
beside it. --memory holds the allocator to so many GiB, as a smaller GPU would.

Limits.  eval.py --against holds two models more or less: the untrained one shares the teacher's.
"""

import json
import time

import torch

from bench import step as steps
from engine import cost
from evals import generate
from evals.next_token import block_scores
from precision import choose_dtype

ROWS = ("scores", "prompt")


def add_flags(parser) -> None:
    """The flags of `python -m bench prefill`."""
    parser.add_argument("--model", choices=list(steps.SHAPES), default="llama2-7b")
    parser.add_argument(
        "--length", type=int, default=131072, metavar="T", help="tokens of the block [131072]"
    )
    parser.add_argument("--new", type=int, default=8, metavar="N", help="tokens after them [8]")
    parser.add_argument("--memory", type=float, metavar="GIB", help="as if there were no more")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS, help="which [both]")


def bench_prefill(arguments, fixed: dict, log) -> None:
    """Prints and logs a row for each way of reading."""
    if min(arguments.length, arguments.new) < 1:
        raise SystemExit("--length and --new must be at least 1")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    steps.hold(arguments.memory, device)
    dtype, _ = choose_dtype(device)
    model = steps.random_model(steps.config_of(arguments.model), device, dtype)
    weights = sum(p.nbytes for p in model.parameters()) / 2**30
    shape = 1, arguments.length + 1
    ids = torch.randint(0, model.config.vocab_size, shape, generator=torch.Generator())
    print(", ".join(f"{k} {v}" for k, v in fixed.items()))
    for name in arguments.rows:
        row = {"model": arguments.model, "row": name, "T": arguments.length}
        row |= {"memory_limit_gib": arguments.memory, "weights_gib": weights}
        read = {"scores": _scores, "prompt": _prompt}[name]
        try:
            read(model, ids[:, : steps.WARM + 1], 2)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            row |= read(model, ids, arguments.new)
        except torch.OutOfMemoryError:
            raise SystemExit(f"{name}: out of memory at {arguments.length} tokens") from None
        except ValueError as e:
            raise SystemExit(f"{name}: {e}") from None
        row |= {"tokens_per_second": arguments.length / row["seconds"]}
        row["gib"] = cost.peak_memory(device)
        print(json.dumps(row | fixed), file=log, flush=True)
        after = f" and {row['new_seconds']:.3f} s each new token" if name == "prompt" else ""
        held = f", cache {row['cache_gib']:.1f}" if name == "prompt" else ""
        print(
            f"{name}  {arguments.length:,} tokens: {row['seconds']:.3f} s, "
            f"{row['tokens_per_second']:,.0f} tokens/s{after}, {row['gib']:.2f} GiB "
            f"(weights {weights:.1f}{held})",
            flush=True,
        )


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _scores(model, ids: torch.Tensor, new: int) -> dict:
    began = _now(model.device)
    losses, _ = block_scores(model, ids)
    return {"seconds": _now(model.device) - began, "loss": float(losses.mean())}


def _prompt(model, ids: torch.Tensor, new: int) -> dict:
    prompt, times = ids[0, :-1].tolist(), [_now(model.device)]
    for _ in generate.steps(model, [prompt], new, None):
        times.append(_now(model.device))
    each = (times[-1] - times[1]) / max(1, new - 1)
    room = generate.cache_bytes(model, 1, len(prompt) + new)
    out = {"seconds": times[1] - times[0], "new_seconds": each, "cache_gib": room / 2**30}
    return out | {"chunk": generate.CHUNK}
