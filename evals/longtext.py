"""Long text: how far the context really reaches, by four measurements.

Sliding window.  The perplexity of long documents when every prediction may look back one window of w tokens (PI paper,
section 3.2). Windows begin every S = 256 tokens; the first one scores all its tokens, each later one only those not
scored yet, so that every token but a document's first is scored once, with at least w - S tokens before it:

    perplexity(w) = exp(mean over all tokens of all documents of -log p(token | the window before it))

A document is cut to the longest w of the run, so that every w reads the same words. bits per byte = mean loss / ln 2 *
tokens / bytes, which models with different vocabularies can be compared by.

Loss by position.  Blocks as long as the stretched context are read whole; the loss of position p is the mean over
blocks. It falls as long as more context helps, and jumps where positions are no longer understood.

Passkey.  The share of five-digit keys found, by depth and by length (ruler.py). tokens reached: the largest length with
at least 20 % found, as in the PI paper (32 depths, 10 trials a depth: 320 samples a length).

RULER.  Prompts of ruler.py, made with the model's own tokenizer to fill the length, continued greedily by generate.py.
A prompt is read with the family's BOS, which RULER's count of tokens leaves out.

Limits.  Figures from fewer samples than the originals' (RULER 500, PI 320 a length) carry a standard error to match.
Held-out blocks run over document borders; `documents` reads whole documents, each with its BOS.

Source.  PI arXiv 2306.15595 (PG19's 100 test books; 128 Proof-pile documents of >= 32 768 tokens, cut there); RULER
2404.06654; Landmark attention 2305.16300.
"""

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from engine import data
from evals import ruler
from evals.generate import generate
from evals.report import COLOURS, Scores
from hub.tokenizer import Tokenizer
from model import Llama, next_token_loss

STRIDE = 256
REACHED = 0.2  # the share of passkeys that makes a length count
BINS = 64  # of the curve of loss by position


def batch_tokens(device: torch.device) -> int:
    return 65536 if device.type == "cuda" else 8192


# Sliding-window perplexity


def documents(paths: list[Path], tokenizer: Tokenizer, length: int, most: int) -> list[np.ndarray]:
    """The first length + 1 ids of up to `most` documents that have as many. ValueError where none has."""
    out, longest = [], 0
    for _, text in data.documents(data.find_files(paths)):
        ids = text if isinstance(text, np.ndarray) else tokenizer.encode(text, bos=True)
        longest = max(longest, len(ids))
        if len(ids) > length and len(out) < most:
            out.append(np.asarray(ids[: length + 1], dtype=np.int64))
    if not out:
        raise ValueError(
            f"no document has more than {length} tokens, the longest has {longest}; shorten --lengths"
        )
    return out


def windows(n: int, width: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(begin, end, first) over n predictions: tokens begin .. end-1 are read, predictions first .. end-1 scored."""
    begin = first = 0
    while first < n:
        end = min(begin + width, n)
        yield begin, end, first
        begin, first = begin + stride, end


@torch.no_grad()
def sliding_loss(
    model: Llama, texts: list[np.ndarray], width: int, dtype: torch.dtype, stride: int = STRIDE
) -> list[np.ndarray]:
    """The loss in nats of every token but the first of each document, with a window of `width` tokens."""
    if not 0 < stride <= width:
        raise ValueError(
            f"a window of {width} tokens is shorter than the stride {stride}; use longer --lengths"
        )
    device = model.device
    groups: dict[
        tuple[int, int], list[tuple[int, int]]
    ] = {}  # windows of one shape go through together
    for d, ids in enumerate(texts):
        for begin, end, first in windows(len(ids) - 1, width, stride):
            groups.setdefault((end - begin, end - first), []).append((d, begin))
    losses = [np.zeros(len(ids) - 1) for ids in texts]
    bar = tqdm(total=sum(map(len, groups.values())), unit=" windows", leave=False, disable=None)
    for (long, scored), where in groups.items():
        rows = max(1, batch_tokens(device) // long)
        for part in (where[i : i + rows] for i in range(0, len(where), rows)):
            ids = torch.from_numpy(
                np.stack([texts[d][begin : begin + long + 1] for d, begin in part])
            ).to(device)
            h = model.hidden(ids[:, :-1], dtype)[:, long - scored :]
            loss = (
                next_token_loss(model, h, ids[:, long - scored + 1 :], reduction="none")
                .double()
                .cpu()
                .numpy()
            )
            for (d, begin), row in zip(part, loss, strict=True):
                losses[d][begin + long - scored : begin + long] = row
            bar.update(len(part))
    bar.close()
    return losses


def sliding_scores(
    scores: Scores,
    models: dict[str, Llama],
    tokenizer: Tokenizer,
    texts: list[np.ndarray],
    lengths: list[int],
    **facts,
) -> None:
    """Adds "sliding perplexity at w" for every w of `lengths`."""
    size = sum(len(tokenizer.decode(ids[1:].tolist()).encode()) for ids in texts)
    about = facts | {
        "documents": len(texts),
        "tokens each": len(texts[0]) - 1,
        "stride": STRIDE,
        "bits per byte": {},
    }
    for width in lengths:
        row = f"sliding perplexity at {width}"
        for name, model in models.items():
            losses = sliding_loss(model, texts, width, scores.dtype)
            each = np.asarray([loss.mean() for loss in losses])
            every = np.concatenate(losses)
            value = math.exp(min(every.mean(), 700.0))
            error = value * each.std(ddof=1) / len(each) ** 0.5 if len(each) > 1 else None
            scores.add(
                name, row, value, error=error, items=len(every), **about, weighting="by token"
            )
            scores.facts[row]["bits per byte"] = scores.facts[row]["bits per byte"] | {
                name: float(every.sum() / math.log(2) / size)
            }


# Loss by position


@torch.no_grad()
def loss_by_position(model: Llama, blocks: Tensor, dtype: torch.dtype) -> np.ndarray:
    """Mean loss [T] in nats at every position of blocks [n, T + 1]."""
    device = model.device
    rows = max(1, batch_tokens(device) // (blocks.shape[1] - 1))
    total = np.zeros(blocks.shape[1] - 1)
    for part in blocks.split(rows):
        h = model.hidden(part[:, :-1].to(device), dtype)
        losses = next_token_loss(model, h, part[:, 1:].to(device), reduction="none")
        total += losses.double().sum(0).cpu().numpy()
    return total / len(blocks)


def position_scores(
    scores: Scores, models: dict[str, Llama], blocks: Tensor, native: int, **facts
) -> dict:
    """Adds "loss in a-bx" by octaves of the native length; returns the curve, {"positions", column: losses}."""
    T = blocks.shape[1] - 1
    cuts = [0, *(native * 2**k for k in range(64) if native * 2**k < T), T]
    edges = np.linspace(0, T, min(BINS, T) + 1).astype(int)
    curve: dict[str, list] = {"positions": ((edges[:-1] + edges[1:]) / 2).tolist()}
    for name, model in models.items():
        losses = loss_by_position(model, blocks, scores.dtype)
        curve[name] = [float(losses[a:b].mean()) for a, b in itertools.pairwise(edges)]
        for a, b in itertools.pairwise(cuts):
            row = f"loss in {a / native:g}-{b / native:g}x"
            scores.add(
                name,
                row,
                float(losses[a:b].mean()),
                items=(b - a) * len(blocks),
                blocks=len(blocks),
                **facts,
            )
    return curve


def draw_positions(file: Path, curve: dict[str, list], native: int) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axis = figure.subplots()
    for i, name in enumerate(name for name in curve if name != "positions"):
        axis.plot(
            np.asarray(curve["positions"]) / native, curve[name], label=name, color=COLOURS[i % 5]
        )
    axis.set_xlabel(f"position, in native lengths of {native} tokens")
    axis.set_ylabel("loss (nats a token)")
    axis.axvline(1, color="0.7", lw=1, ls=":")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(file, dpi=130)


# Prompts that are answered: passkey and RULER


def answers(
    model: Llama, tokenizer: Tokenizer, samples: list[ruler.Sample], dtype: torch.dtype
) -> list[str]:
    """What the model says to each sample, greedily, the samples in batches of like length."""
    prompts = [tokenizer.encode(s.prompt + s.answer_prefix, bos=True) for s in samples]
    order = sorted(range(len(samples)), key=lambda i: -len(prompts[i]))
    said, device = [""] * len(samples), model.device
    bar = tqdm(total=len(samples), unit=" prompts", leave=False, disable=None)
    while order:
        rows = max(1, batch_tokens(device) // len(prompts[order[0]]))
        now, order = order[:rows], order[rows:]
        new = max(samples[i].max_new_tokens for i in now)
        for i, ids in zip(
            now,
            generate(model, [prompts[i] for i in now], new, dtype, tokenizer.eos_id),
            strict=True,
        ):
            said[i] = tokenizer.decode(ids)
        bar.update(len(now))
    bar.close()
    return said


def marks(task: str, said: list[str], samples: list[ruler.Sample]) -> np.ndarray:
    """Each sample's own score, 0 .. 1; their mean is the task's."""
    return np.asarray(
        [ruler.score(task, [a], [s.outputs]) / 100 for a, s in zip(said, samples, strict=True)]
    )


def feasible(
    tokenizer: Tokenizer, names: list[str], lengths: list[int], seed: int, folder: Path | None
) -> tuple[list[tuple[int, str]], list[str]]:
    """([(length, task)] of which prompts can be made, why the others cannot), from one sample each.

    Asked before any model reads anything, so that a damaged file or a wrong name costs no GPU time.
    """
    able, lacking = [], [why for name in names if (why := ruler.missing(name, folder))]
    for length, task in itertools.product(lengths, names):
        if ruler.missing(task, folder):
            continue
        try:
            ruler.generate(
                task, length, 1, lambda t: len(tokenizer.encode(t)), seed=seed, data_dir=folder
            )
            able.append((length, task))
        except ruler.TooShort as e:
            lacking.append(str(e))
    if names and not able:
        raise ValueError(f"none of {', '.join(names)} can be made: {'; '.join(lacking)}")
    return able, lacking


def passkey_scores(
    scores: Scores,
    models: dict[str, Llama],
    tokenizer: Tokenizer,
    lengths: list[int],
    samples: int,
    seed: int,
) -> dict:
    """Adds "passkey at L" and the tokens reached; returns the map, {"lengths", "depths", column: [depth][length]}."""
    depths = np.linspace(0, 1, min(samples, 32)).tolist()
    grid: dict[str, list] = {"lengths": lengths, "depths": depths} | {
        name: [[] for _ in depths] for name in models
    }
    reached, about = dict.fromkeys(models, 0), {"seed": seed, "depths": len(depths)}
    for length in lengths:
        made = ruler.generate(
            "passkey", length, samples, lambda t: len(tokenizer.encode(t)), seed=seed
        )
        about["version"] = made[0].variant
        for name, model in models.items():
            right = marks("passkey", answers(model, tokenizer, made, scores.dtype), made)
            scores.add(name, f"passkey at {length}", float(right.mean()), values=right, **about)
            for d in range(len(depths)):
                grid[name][d].append(float(right[d :: len(depths)].mean()))
            if right.mean() >= REACHED:
                reached[name] = max(reached[name], length)
    for name in models:
        scores.add(
            name, "passkey, tokens reached", reached[name], items=samples * len(lengths), **about
        )
    return grid


def draw_passkey(file: Path, grid: dict[str, list]) -> None:
    """A heat map a model: depth down, length to the right, green where the key was found."""
    from matplotlib.figure import Figure

    names = [name for name in grid if name not in ("lengths", "depths")]
    figure = Figure(figsize=(1.5 + 3.2 * len(names), 4), layout="constrained")
    axes = figure.subplots(1, len(names), squeeze=False)[0]
    for axis, name in zip(axes, names, strict=True):
        image = axis.imshow(
            grid[name], vmin=0, vmax=1, cmap="RdYlGn", aspect="auto", origin="upper"
        )
        axis.set_xticks(
            range(len(grid["lengths"])),
            [f"{n:,}" for n in grid["lengths"]],
            fontsize=8,
            rotation=45,
        )
        step = max(1, len(grid["depths"]) // 8)
        axis.set_yticks(
            *zip(
                *[(i, f"{100 * d:.0f} %") for i, d in enumerate(grid["depths"])][::step],
                strict=True,
            )
        )
        axis.set_title(name, fontsize=10)
    axes[0].set_ylabel("depth of the key")
    figure.supxlabel("tokens", fontsize=9)
    figure.colorbar(image, ax=list(axes), label="keys found")
    figure.savefig(file, dpi=130)


def ruler_scores(
    scores: Scores,
    models: dict[str, Llama],
    tokenizer: Tokenizer,
    able: list[tuple[int, str]],
    samples: int,
    seed: int,
    folder: Path | None,
    said_to: Path | None = None,
) -> None:
    """Adds "RULER task at L" of every (L, task), and their mean at every L. said_to: a folder for the predictions."""
    versions: dict[int, dict[str, str]] = {}
    for length, task in able:
        made = ruler.generate(
            task, length, samples, lambda t: len(tokenizer.encode(t)), seed=seed, data_dir=folder
        )
        row, version = f"RULER {task} at {length}", made[0].variant
        versions.setdefault(length, {})[task] = version
        for name, model in models.items():
            said = answers(model, tokenizer, made, scores.dtype)
            value = ruler.score(task, said, [s.outputs for s in made]) / 100
            right = marks(task, said, made)
            scores.add(name, row, value, values=right, version=version, seed=seed)
            if said_to:
                _keep(said_to / f"{name}.{task}.{length}.jsonl", said, made, right)
    for length, done in versions.items():
        kind = (
            "13"
            if set(done) == set(ruler.RULER_TASKS)
            else f"{len(done)} task{'s' * (len(done) > 1)}"
        )
        version = "; ".join(f"{task}: {variant}" for task, variant in done.items())
        for name in models:
            value = float(
                np.mean([scores.columns[name][f"RULER {task} at {length}"] for task in done])
            )
            row = f"RULER mean of {kind} at {length}"
            scores.add(name, row, value, items=samples * len(done), version=version, seed=seed)


def _keep(file: Path, said: list[str], samples: list[ruler.Sample], right: np.ndarray) -> None:
    """One line a sample: what was expected, what was said, and what it scored."""
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "index": s.index,
            "outputs": s.outputs,
            "prediction": a,
            "score": float(r),
            "tokens": s.length,
        }
        for s, a, r in zip(samples, said, right, strict=True)
    ]
    file.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
