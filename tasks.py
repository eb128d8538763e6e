"""Short-text tasks, scored as lm-evaluation-harness scores them.

A task file is JSON lines (.jsonl or .jsonl.gz). Two layouts:

    {"context": ..., "continuation": ...}            LAMBADA: is every token of the last word the most likely one?
    {"query": ..., "choices": [...], "gold": n}      multiple choice: which " " + choice is likeliest after the query?

A query that begins with "Question:" is followed by "\nAnswer:", as the harness writes PIQA and ARC. Two accuracies of a
choice: acc compares log-probabilities, acc_norm compares them per character of the choice.

How it is computed.  Context and continuation are encoded together and cut at the length of the context's own ids; the
family's BOS stands first; what is longer than the model loses its beginning. Requests are sorted by length and padded
on the right, which causal attention never sees, and logits are taken at the continuation's tokens alone.

Source.  lm-evaluation-harness, api/model.py and the tasks' yaml files.
"""

import gzip
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from model import Llama
from tokenizer import Tokenizer


@dataclass(frozen=True)
class Item:
    context: str
    choices: tuple[str, ...]  # one: a continuation that must be the greedy one
    gold: int


def load(file: Path, limit: int | None = None) -> list[Item]:
    """The items of a task file. Raises ValueError naming the line that is malformed."""
    if not file.is_file():
        raise ValueError(f"--tasks {file} does not exist; a task is a .jsonl or .jsonl.gz file")
    opened = gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8")
    items = []
    with opened as f:
        for number, line in enumerate(f, 1):
            if limit is not None and len(items) >= limit:
                break
            if line.strip():
                try:
                    items.append(_item(json.loads(line)))
                except (KeyError, TypeError, AttributeError, ValueError) as e:
                    raise ValueError(f"{file}, line {number}: not a task row ({type(e).__name__}: {e})") from None
    if not items:
        raise ValueError(f"{file} holds no items")
    return items


def _item(row: dict) -> Item:
    if "continuation" in row:
        return Item(row["context"].rstrip(), (" " + row["continuation"].strip(),), 0)
    query = row["query"].rstrip()
    query += "\nAnswer:" * query.startswith("Question:")
    choices, gold = tuple(" " + c for c in row["choices"]), row["gold"]
    if not 0 <= gold < len(choices):
        raise ValueError(f"gold is {gold} of {len(choices)} choices")
    return Item(query, choices, gold)


@torch.no_grad()
def likelihoods(
    model: Llama, tokenizer: Tokenizer, pairs: list[tuple[str, str]], dtype: torch.dtype, tokens: int = 8192
):
    """[(sum of the continuation's log-probabilities in nats, is it greedy)] of (context, continuation) pairs."""
    device = model.model.embed_tokens.weight.device
    longest = model.config.rope.length
    requests = []
    for context, continuation in pairs:
        whole, n = tokenizer.encode(context + continuation, bos=True), len(tokenizer.encode(context, bos=True))
        n = max(n, 1)  # an empty context without BOS leaves the first token unscored, as nothing comes before it
        requests.append((whole[-(longest + 1) :], min(len(whole) - n, longest)))
    order = sorted(range(len(requests)), key=lambda i: -len(requests[i][0]))
    out: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
    bar = tqdm(total=len(order), unit=" requests", leave=False, disable=None)
    while order:
        width = len(requests[order[0]][0]) - 1
        now, order = order[: max(1, tokens // max(width, 1))], order[max(1, tokens // max(width, 1)) :]
        ids = torch.zeros(len(now), max(width, 1), dtype=torch.int64)
        for row, i in enumerate(now):
            ids[row, : len(requests[i][0]) - 1] = torch.tensor(requests[i][0][:-1])
        h = model.hidden(ids.to(device), dtype)
        for row, i in enumerate(now):
            whole, n = requests[i]
            logits = model.lm_head(h[row, len(whole) - 1 - n : len(whole) - 1]).float()  # [n, V]
            goal = torch.tensor(whole[len(whole) - n :], device=device)
            logp = logits.log_softmax(-1).gather(1, goal[:, None]).sum().item()
            out[i] = (logp, bool((logits.argmax(-1) == goal).all()))
        bar.update(len(now))
    bar.close()
    return out


def score(model: Llama, tokenizer: Tokenizer, task: str, items: list[Item], dtype: torch.dtype) -> dict[str, float]:
    """{row name: accuracy in 0..1, or perplexity} of one task."""
    flat = [(item.context, choice) for item in items for choice in item.choices]
    scored = iter(likelihoods(model, tokenizer, flat, dtype))
    plain, normed, logps = [], [], []
    for item in items:
        got = [next(scored) for _ in item.choices]
        if len(item.choices) == 1:
            plain.append(got[0][1])
            logps.append(got[0][0])
            continue
        sums = torch.tensor([g[0] for g in got], dtype=torch.float64)
        characters = torch.tensor([len(c) - 1 for c in item.choices])  # without the leading space
        plain.append(int(sums.argmax()) == item.gold)
        normed.append(int((sums / characters).argmax()) == item.gold)
    out = {f"{task}, accuracy": sum(plain) / len(plain)}
    if normed:
        out[f"{task}, accuracy normed"] = sum(normed) / len(normed)
    if logps:
        out[f"{task}, perplexity"] = float(torch.tensor(logps, dtype=torch.float64).neg().mean().exp())
    return out
