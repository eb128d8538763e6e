"""How likely a model holds given words to be: the score of every short-text task.

Formula.  A request (context, continuation) scores the sum of the continuation's log-probabilities
in nats, s = sum_t log p(token_t | all before it). Over the choices c of an item

    accuracy          argmax_c s_c is the right choice (one request: every token is the greedy one)
    accuracy normed   argmax_c s_c / (characters of choice c) is the right choice
    perplexity        exp(-mean of s over items)                   LAMBADA: per word, not per token

A sum favours short choices; per character it does not.

How it is computed.  As lm-evaluation-harness does: context and continuation are encoded together
and cut at the length of the context's own ids; spaces at the context's end go to the continuation;
the family's BOS stands first; an empty context is BOS, or the end token; what is longer than the
model loses its beginning. A task is encoded once for all models. Inputs are sorted by length and
padded on the right, which causal attention never sees; equal ones (the four letters of an MMLU
question) are read once; as many as fill `batch_tokens` go through together; logits are taken at the
continuations' tokens alone, in float32, and summed in float64.

Limits.  Under bf16 the harness takes the log-softmax in bf16 and we in float32, so near ties can
differ there. Its standard errors are ours but for perplexity (a bootstrap) and
MMLU (the subjects' own, pooled).

Source.  lm-evaluation-harness 0.4.13: api/task.py, api/model.py, models/huggingface.py.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from evals.next_token import batch_tokens, token_scores
from evals.report import Scores
from evals.retention import AVERAGED
from evals.tasks import ACC, NORMED, PERPLEXITY, Task
from hub.tokenizer import Tokenizer
from model import Llama

# ---------------------------------------------------------------- requests


@dataclass(frozen=True)
class Request:
    """ids of the context and the continuation, which is the last `scored` of them."""

    ids: tuple[int, ...]
    scored: int

    def cut(self, longest: int) -> "Request":
        """What a model of `longest` positions can read: the last token is predicted, not read."""
        return Request(self.ids[-(longest + 1) :], min(self.scored, longest))


def encode(tokenizer: Tokenizer, pairs: list[tuple[str, str]]) -> list[Request]:
    """The requests of (context, continuation) pairs, by the rules above.

    Raises ValueError for a continuation that has no tokens of its own.
    """
    kept = [context.rstrip() for context, _ in pairs]
    moved = [(k, context[len(k) :] + more) for k, (context, more) in zip(kept, pairs, strict=True)]
    # In parallel; each ends with the end token
    whole = tokenizer.encode_documents([a + b for a, b in moved])
    alone = list(dict.fromkeys(a for a, _ in moved))
    lengths = dict(zip(alone, map(len, tokenizer.encode_documents(alone)), strict=True))
    out = []
    for (context, continuation), ids in zip(moved, whole, strict=True):
        ids, cut = ids[:-1], lengths[context] - 1
        if not context:
            first = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
            ids, cut = ids if ids[:1] == [first] and len(ids) > 1 else [first, *ids], 1
        if not ids[cut:]:
            where = f"the continuation {continuation!r} after {context[-40:]!r}"
            raise ValueError(f"{where} has no tokens of its own")
        out.append(Request(tuple(ids), len(ids) - cut))
    return out


@torch.no_grad()
def likelihoods(
    model: Llama, requests: list[Request], tokens: int | None = None
) -> list[tuple[float, bool]]:
    """[(sum of the continuation's log-probabilities in nats, is it greedy)] of every request.

    tokens: how many go through the model at a time, padding included.
    """
    tokens = tokens or batch_tokens(model.device)
    requests = [request.cut(model.config.rope.length) for request in requests]
    readers: dict[tuple[int, ...], list[int]] = {}  # an input -> the requests that it answers
    for i, request in enumerate(requests):
        readers.setdefault(request.ids[:-1], []).append(i)
    # A stable sort: the order, and so every bit, is the same each time
    inputs = sorted(readers, key=lambda ids: -len(ids))
    bar = tqdm(total=len(inputs), unit=" inputs", leave=False, disable=None)
    order, losses, hits, start = [], [], [], 0
    while start < len(inputs):
        now = inputs[start : start + max(1, tokens // len(inputs[start]))]
        start += len(now)
        asked = [(row, requests[i]) for row, ids in enumerate(now) for i in readers[ids]]
        order += [i for ids in now for i in readers[ids]]
        loss, hit = _read(model, now, asked)
        losses.append(loss)
        hits.append(hit)
        bar.update(len(now))
    bar.close()
    # The one wait for a GPU
    flat, right = torch.cat(losses).double().cpu().numpy(), torch.cat(hits).cpu().numpy()
    starts = np.cumsum([0, *(requests[i].scored for i in order)])[:-1]
    sums, greedy = -np.add.reduceat(flat, starts), np.logical_and.reduceat(right, starts)
    found = dict(zip(order, zip(sums.tolist(), greedy.tolist(), strict=True), strict=True))
    return [found[i] for i in range(len(requests))]


def _read(
    model: Llama,
    inputs: list[tuple[int, ...]],
    asked: list[tuple[int, Request]],
) -> tuple[Tensor, Tensor]:
    """Loss [N] and greediness [N] of every scored token; asked: (row of inputs, request)."""
    ids = np.zeros((len(inputs), len(inputs[0])), dtype=np.int64)
    for row, one in enumerate(inputs):
        ids[row, : len(one)] = one
    rows = np.repeat([row for row, _ in asked], [request.scored for _, request in asked])
    at = [np.arange(len(r.ids) - 1 - r.scored, len(r.ids) - 1) for _, r in asked]
    goals = [request.ids[-request.scored :] for _, request in asked]
    where = np.stack([rows, np.concatenate(at), np.concatenate(goals)])
    ids, where = torch.from_numpy(ids), torch.from_numpy(where)
    rows, at, goals = where.to(model.device, non_blocking=True)  # each [N]
    h = model.hidden(ids.to(model.device, non_blocking=True))[rows, at]  # [N, C]
    return token_scores(model, h, goals)


# ---------------------------------------------------------------- tasks


@dataclass(frozen=True)
class Result:
    """What a model did with every item of a task, in the items' order."""

    logps: list[np.ndarray]  # s_c of each choice
    greedy: list[np.ndarray]  # of each choice: is every token the most likely one
    # row -> [items]: 0 or 1, or s for a perplexity
    values: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def predictions(self) -> np.ndarray:
        """[items]: the likeliest choice; of a single request, 0 if it is greedy and -1 if not."""
        each = zip(self.logps, self.greedy, strict=True)
        return np.asarray([int(np.argmax(s)) if len(s) > 1 else int(g[0]) - 1 for s, g in each])


def score(model: Llama, requests: list[Request], task: Task) -> Result:
    """Every item of one task, scored; requests: task.pairs, encoded."""
    flat = iter(likelihoods(model, requests))
    got = [[next(flat) for _ in item.requests] for item in task.items]
    logps = [np.asarray([s for s, _ in g]) for g in got]
    result = Result(logps, [np.asarray([hit for _, hit in g]) for g in got])
    single = all(len(item.requests) == 1 for item in task.items)
    gold = np.asarray([item.gold for item in task.items])
    if ACC in task.metrics:
        result.values[f"{task.name}, {ACC}"] = (result.predictions == gold).astype(np.float64)
    if NORMED in task.metrics and not single:
        each = zip(logps, task.items, strict=True)
        best = np.asarray([int(np.argmax(s / np.asarray(item.characters))) for s, item in each])
        result.values[f"{task.name}, {NORMED}"] = (best == gold).astype(np.float64)
    if PERPLEXITY in task.metrics and single:
        result.values[f"{task.name}, {PERPLEXITY}"] = np.concatenate(logps)
    return result


def task_scores(
    scores: Scores,
    models: dict[str, Llama],
    tasks: list[Task],
    requests: list[list[Request]],
    write: Callable[[str, str], None] | None = None,
) -> None:
    """Adds every task's figures, and their averages over two or more tasks.

    requests: of each task, its pairs encoded; write(name, text): takes a file of items.
    """
    for task, encoded in zip(tasks, requests, strict=True):
        for name, model in models.items():
            result = score(model, encoded, task)
            for row, values in result.values.items():
                scores.add(name, row, values=values, version=task.version, seed=None)
            if write:
                write(f"predictions/{name}.{task.name}.jsonl", _items(task, result))
    about = {"version": "mean over tasks", "items": sum(len(t.items) for t in tasks), "seed": None}
    for name in models:
        for kind in AVERAGED:
            found = [x for row, x in scores.columns[name].items() if row.endswith(f", {kind}")]
            if len(found) > 1:
                scores.add(name, f"average {kind}", sum(found) / len(found), **about)


def _items(task: Task, result: Result) -> str:
    """A JSON line per item: the right choice, the model's, and every choice's score."""
    lines = []
    for item, chosen, s in zip(task.items, result.predictions.tolist(), result.logps, strict=True):
        lines.append(json.dumps({"gold": item.gold, "prediction": chosen, "logps": s.tolist()}))
    return "\n".join(lines) + "\n"
