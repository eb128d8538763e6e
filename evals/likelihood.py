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
differ there. Its standard errors are ours but for perplexity (a bootstrap) and MMLU (each
subject's, pooled).

Source.  lm-evaluation-harness 0.4.13: api/task.py, api/model.py, models/huggingface.py.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from evals import tasks
from evals.next_token import batch_tokens, token_scores
from evals.report import Scores
from evals.retention import AVERAGED, TEACHER, retention
from evals.subject import Subject
from evals.tasks import ACC, NORMED, PERPLEXITY, Task
from hub.tokenizer import Tokenizer
from model import Llama


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
    # Spaces go from the context's end to the continuation
    bare = [context.rstrip() for context, _ in pairs]
    pairs = [(a, context[len(a) :] + more) for a, (context, more) in zip(bare, pairs, strict=True)]
    # In parallel; each ends with the end token
    whole = tokenizer.encode_documents([context + more for context, more in pairs])
    contexts = list(dict.fromkeys(bare))
    lengths = dict(zip(contexts, map(len, tokenizer.encode_documents(contexts)), strict=True))
    out = []
    for (context, continuation), ids in zip(pairs, whole, strict=True):
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
    tokens = tokens or batch_tokens(model)
    requests = [request.cut(model.config.rope.length) for request in requests]
    readers: dict[tuple[int, ...], list[int]] = {}  # an input -> the requests that it answers
    for i, request in enumerate(requests):
        readers.setdefault(request.ids[:-1], []).append(i)
    # A stable sort: the order, and so every bit, is the same each time
    inputs = sorted(readers, key=lambda ids: -len(ids))
    bar = tqdm(total=len(inputs), unit=" inputs", leave=False, disable=None)
    order, losses, right, start = [], [], [], 0
    while start < len(inputs):
        batch = inputs[start : start + max(1, tokens // len(inputs[start]))]
        start += len(batch)
        asked = [(row, i) for row, ids in enumerate(batch) for i in readers[ids]]
        loss, hit = _read(model, batch, [(row, requests[i]) for row, i in asked])
        order += [i for _, i in asked]
        losses.append(loss)
        right.append(hit)
        bar.update(len(batch))
    bar.close()
    # The one wait for a GPU
    flat, hits = torch.cat(losses).double().cpu().numpy(), torch.cat(right).cpu().numpy()
    starts = np.cumsum([0, *(requests[i].scored for i in order)])[:-1]
    sums, greedy = -np.add.reduceat(flat, starts), np.logical_and.reduceat(hits, starts)
    found = dict(zip(order, zip(sums.tolist(), greedy.tolist(), strict=True), strict=True))
    return [found[i] for i in range(len(requests))]


def _read(
    model: Llama, inputs: list[tuple[int, ...]], asked: list[tuple[int, Request]]
) -> tuple[Tensor, Tensor]:
    """(loss [N], right [N]) of every scored token; asked: (row of inputs, request)."""
    ids = np.zeros((len(inputs), len(inputs[0])), dtype=np.int64)
    for row, one in enumerate(inputs):
        ids[row, : len(one)] = one
    where = []  # of each scored token: the row, the position before it, itself
    for row, request in asked:
        targets = request.ids[-request.scored :]
        first = len(request.ids) - 1 - request.scored
        where += [(row, first + k, target) for k, target in enumerate(targets)]
    ids, where = torch.from_numpy(ids), torch.tensor(where).T.contiguous()
    rows, at, targets = where.to(model.device, non_blocking=True)  # each [N]
    h = model.hidden(ids.to(model.device, non_blocking=True))[rows, at]  # [N, C]
    return token_scores(model, h, targets)


@dataclass(frozen=True)
class Result:
    """What a model did with every item of a task, in the items' order."""

    logps: list[np.ndarray]  # s_c of each choice
    greedy: list[np.ndarray]  # of each choice: is every token the most likely one
    predictions: np.ndarray  # the likeliest choice; of one request, 0 if it is greedy and -1 if not
    values: dict[str, np.ndarray]  # row -> [items]: 0 or 1, or s for a perplexity


def score(model: Llama, requests: list[Request], task: Task) -> Result:
    """Every item of one task, scored; requests: task.pairs, encoded."""
    flat = iter(likelihoods(model, requests))
    logps, greedy, best, normed = [], [], [], []
    for item in task.items:
        s, is_greedy = map(np.asarray, zip(*(next(flat) for _ in item.requests), strict=True))
        logps.append(s)
        greedy.append(is_greedy)
        best.append(int(np.argmax(s)) if len(s) > 1 else int(is_greedy[0]) - 1)
        normed.append(int(np.argmax(s / item.characters)))
    gold = np.asarray([item.gold for item in task.items])
    values = {ACC: (np.asarray(best) == gold).astype(np.float64)}
    if all(len(item.requests) == 1 for item in task.items):
        values[PERPLEXITY] = np.concatenate(logps)
    else:
        values[NORMED] = (np.asarray(normed) == gold).astype(np.float64)
    rows = {f"{task.name}, {kind}": values[kind] for kind in task.metrics if kind in values}
    return Result(logps, greedy, np.asarray(best), rows)


def short_tasks(subject: Subject, scores: Scores) -> None:
    """Every task's figures, their averages over two or more tasks, and what was kept of each."""
    results: dict[str, dict[str, np.ndarray]] = {}  # row, column: [items]
    for task, requests in subject.tasks:
        for name, model in subject.models.items():
            result = score(model, requests, task)
            for row, values in result.values.items():
                results.setdefault(row, {})[name] = values
                scores.add(name, row, values=values, version=task.version, seed=None)
            each = zip(task.items, result.predictions.tolist(), result.logps, strict=True)
            rows = ({"gold": i.gold, "prediction": p, "logps": s.tolist()} for i, p, s in each)
            scores.write_items(f"{name}.{task.name}", rows)
    items = sum(len(task.items) for task, _ in subject.tasks)
    for name in subject.models:
        for kind in AVERAGED:
            found = [x for row, x in scores.columns[name].items() if row.endswith(f", {kind}")]
            if len(found) > 1:
                about = {"version": "mean over tasks", "items": items, "seed": None}
                scores.add(name, f"average {kind}", sum(found) / len(found), **about)
    scores.notes += tasks.notes([task for task, _ in subject.tasks])
    # Of tasks alone: beyond its own length the teacher's score does not say what could be kept
    if TEACHER in subject.models:
        scores.retention = retention(results, subject.seed)
