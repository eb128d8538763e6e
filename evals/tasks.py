"""Short-text tasks, with the prompts and the scoring of lm-evaluation-harness.

What.  A task is a file of JSON lines, plain or gzip, one item a line, in the layout that its data set has on the Hub
(LAYOUTS; DATASETS says where it comes from and which figures are reported), or in one of two plain layouts:

    {"context": ..., "continuation": ...}            LAMBADA: is every token of the last word the most likely one?
    {"query": ..., "choices": [...], "gold": n}      multiple choice; "Question: ..." is followed by "\\nAnswer:"

Formula.  An item is a list of requests (context, continuation), one a choice, each scored by the sum of the
continuation's log-probabilities, s_c = sum_t log p(token_t | all before it), over the tokens of " " + choice:

    accuracy          argmax_c s_c is the gold choice (one request: every token is the greedy one)
    accuracy normed   argmax_c s_c / (characters of choice c) is
    perplexity        exp(-mean of s over items)                                    LAMBADA: per word, not per token

WinoGrande is scored in part: its two contexts hold the two names, the continuation is what follows them. MMLU shows
the first five rows of the subject's dev file, and its accuracy is the mean over all questions.

How it is computed.  Context and continuation are encoded together and cut at the length of the context's own ids;
spaces at the context's end go to the continuation; the family's BOS stands first; an empty context is BOS, or the end
token; what is longer than the model loses its beginning. Inputs are sorted by length and padded on the right, which
causal attention never sees; equal ones (the four letters of an MMLU question) are read once; logits are taken at the
continuations' tokens alone, in float32, and summed in float64.

Limits.  Under bf16 the harness takes the log-softmax in bf16 and we in float32, so near ties can differ there. Its
standard errors are those of report.summary but for perplexity (a bootstrap) and MMLU (the subjects' own, pooled).

Source.  lm-evaluation-harness 0.4.13: api/task.py, api/model.py, models/huggingface.py, the tasks' yaml files.
"""

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from hub.tokenizer import Tokenizer
from model import Llama

ACC, NORMED, PERPLEXITY = "accuracy", "accuracy normed", "perplexity"


@dataclass(frozen=True)
class Item:
    requests: tuple[
        tuple[str, str], ...
    ]  # (context, continuation); one: a continuation that must be the greedy one
    gold: int
    characters: tuple[int, ...]  # of each choice, for the normed accuracy


@dataclass(frozen=True)
class Task:
    name: str
    items: list[Item]
    metrics: tuple[str, ...]
    version: str


@dataclass(frozen=True)
class Result:
    """What a model did with every item of a task, in the items' order."""

    logps: list[np.ndarray]  # s_c of each choice
    greedy: list[np.ndarray]  # of each choice: is every token the most likely one
    values: dict[str, np.ndarray] = field(
        default_factory=dict
    )  # row -> [items]: 0 or 1, or s for a perplexity

    @property
    def predictions(self) -> np.ndarray:
        """The likeliest choice; of a single request, 0 where it is greedy and -1 where not."""
        each = zip(self.logps, self.greedy, strict=True)
        return np.asarray([int(np.argmax(s)) if len(s) > 1 else int(g[0]) - 1 for s, g in each])


# One function a data set: a row as it lies on the Hub -> Item. Each is the harness' yaml in Python.


def text(row: dict, key: str) -> str:
    if not isinstance(row[key], str):
        raise ValueError(f"{key} is {row[key]!r}, not text")
    return row[key]


def texts(row: dict, key: str) -> list[str]:
    if (
        not isinstance(row[key], list)
        or not row[key]
        or not all(isinstance(x, str) for x in row[key])
    ):
        raise ValueError(f"{key} is {row[key]!r}, not a list of texts")
    return row[key]


def number(row: dict, key: str) -> int:
    """A label: 3, "3" or true. "" and -1 mark the rows of a test split whose answers are not public."""
    value = row[key]
    if isinstance(value, str) and value.strip().isdigit():
        value = int(value)
    if not isinstance(value, int) or value < 0:
        raise ValueError(f"{key} is {value!r}, not an answer; take the split that has them")
    return int(value)


def choose(context: str, choices: list[str], gold: int) -> Item:
    if not 0 <= gold < len(choices):
        raise ValueError(f"the answer is number {gold} of {len(choices)} choices")
    return Item(
        tuple((context, " " + c) for c in choices), gold, tuple(max(1, len(c)) for c in choices)
    )


def labelled(row: dict, context: str, answer: str) -> Item:
    """ARC and OpenBookQA: {"text": [...], "label": ["A", "B", ...]} and the label of the answer."""
    labels = texts(row["choices"], "label")
    if answer not in labels:
        raise ValueError(f"answerKey is {answer!r}, not one of {labels}")
    return choose(context, texts(row["choices"], "text"), labels.index(answer))


def pair(row: dict) -> Item:
    continuation = " " + text(row, "continuation").removeprefix(" ")
    return Item(((text(row, "context"), continuation),), 0, (len(continuation) - 1,))


def plain(row: dict) -> Item:
    query = text(row, "query")
    if query.startswith("Question:") and not query.rstrip().endswith("Answer:"):
        query = query.removesuffix("\n") + "\nAnswer:"
    return choose(query, texts(row, "choices"), number(row, "gold"))


def lambada(row: dict) -> Item:
    *first, last = text(row, "text").split(" ")
    return pair({"context": " ".join(first), "continuation": " " + last})


def piqa(row: dict) -> Item:
    answers = [text(row, "sol1"), text(row, "sol2")]
    return choose(f"Question: {text(row, 'goal')}\nAnswer:", answers, number(row, "label"))


def arc(row: dict) -> Item:
    return labelled(row, f"Question: {text(row, 'question')}\nAnswer:", text(row, "answerKey"))


def hellaswag(row: dict) -> Item:
    def clean(words: str) -> str:  # brackets are what WikiHow's markup left
        words = re.sub(r"\[.*?\]", "", words.strip().replace(" [title]", ". "))
        return words.replace("  ", " ")

    words = f"{text(row, 'activity_label')}: {text(row, 'ctx_a')} {text(row, 'ctx_b').capitalize()}"
    return choose(clean(words), [clean(e) for e in texts(row, "endings")], number(row, "label"))


def winogrande(row: dict) -> Item:
    before, blank, after = text(row, "sentence").partition("_")
    if not blank:
        raise ValueError(f"sentence {row['sentence']!r} has no _ for the name")
    gold, names = number(row, "answer") - 1, [text(row, "option1"), text(row, "option2")]
    if gold not in (0, 1):
        raise ValueError(f"answer is {row['answer']!r}, not 1 or 2")
    return Item(tuple((before + name, " " + after.strip()) for name in names), gold, (1, 1))


def openbookqa(row: dict) -> Item:
    return labelled(row, text(row, "question_stem"), text(row, "answerKey").lstrip())


def boolq(row: dict) -> Item:
    gold = number(row, "label" if "label" in row else "answer")
    return choose(
        f"{text(row, 'passage')}\nQuestion: {text(row, 'question')}?\nAnswer:", ["no", "yes"], gold
    )


def siqa(row: dict) -> Item:
    answers = [text(row, f"answer{letter}") for letter in "ABC"]
    return choose(
        f"Q: {text(row, 'context')} {text(row, 'question')}\nA:", answers, number(row, "label") - 1
    )


def mathqa(row: dict) -> Item:
    options = re.findall(r"[abcd] \) .*?, |e \) .*?$", text(row, "options"))
    gold = "abcde".index(text(row, "correct"))
    return choose(
        f"Question: {text(row, 'Problem')}\nAnswer:", [o[4:].rstrip(" ,") for o in options], gold
    )


def mmlu(row: dict, shots: dict[str, list[str]]) -> Item:
    subject = text(row, "subject")
    if len(shots.get(subject, ())) < 5:
        raise ValueError(
            f"the dev file has {len(shots.get(subject, ()))} rows of subject {subject!r}; 5 are shown"
        )
    head = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
    return choose(
        head + "".join(shots[subject][:5]) + _ask(row), list("ABCD"), number(row, "answer")
    )


def _ask(row: dict) -> str:
    listed = "".join(
        f"\n{letter}. {c}" for letter, c in zip("ABCD", texts(row, "choices"), strict=True)
    )
    return f"{text(row, 'question').strip()}{listed}\nAnswer:"


LAYOUTS: dict[
    str, tuple[tuple[str, ...], Callable[..., Item]]
] = {  # the keys that tell a layout, and its function
    "context/continuation": (("context", "continuation"), pair),
    "query/choices/gold": (("query", "choices", "gold"), plain),
    "MMLU": (("question", "subject", "choices", "answer"), mmlu),
    "PIQA": (("goal", "sol1", "sol2", "label"), piqa),
    "ARC": (("question", "choices", "answerKey"), arc),
    "HellaSwag": (("activity_label", "ctx_a", "ctx_b", "endings", "label"), hellaswag),
    "WinoGrande": (("sentence", "option1", "option2", "answer"), winogrande),
    "OpenBookQA": (("question_stem", "choices", "answerKey"), openbookqa),
    "BoolQ": (("passage", "question"), boolq),
    "SIQA": (("context", "question", "answerA", "answerB", "answerC", "label"), siqa),
    "MathQA": (("Problem", "options", "correct"), mathqa),
    "LAMBADA": (("text",), lambada),
}


@dataclass(frozen=True)
class Dataset:
    hub: str  # the data set, its configuration if it has several, and the split that the harness scores
    metrics: tuple[str, ...]
    version: str  # the harness' own number
    names: tuple[str, ...] = ()  # other names that its file may have


BOTH = (ACC, NORMED)
DATASETS = {
    "lambada_openai": Dataset(
        "EleutherAI/lambada_openai default test", (ACC, PERPLEXITY), "1.0", ("lambada",)
    ),
    "piqa": Dataset("baber/piqa - validation", BOTH, "1.0"),
    "arc_easy": Dataset("allenai/ai2_arc ARC-Easy test", BOTH, "1.0"),
    "arc_challenge": Dataset("allenai/ai2_arc ARC-Challenge test", BOTH, "1.0"),
    "hellaswag": Dataset("Rowan/hellaswag - validation", BOTH, "1.0"),
    "winogrande": Dataset("allenai/winogrande winogrande_xl validation", (ACC,), "1.0"),
    "openbookqa": Dataset("allenai/openbookqa main test", BOTH, "1.0", ("openbook_qa",)),
    "boolq": Dataset("aps/super_glue boolq validation", (ACC,), "2.0"),
    "social_iqa": Dataset("lighteval/siqa - validation", (ACC,), "0.0", ("siqa",)),
    "mathqa": Dataset("regisss/math_qa - test", BOTH, "1.0", ("math_qa",)),
    "mmlu": Dataset("cais/mmlu all test", (ACC,), "2, 5-shot"),
}


def fetch(name: str) -> str:
    """The command that writes the file of a data set; the package `datasets` is needed for it alone."""
    path, config, split = DATASETS[name].hub.split()
    which = f"'{path}'" + (f", '{config}'" if config != "-" else "")
    write = f"load_dataset({which}, split='{split}').to_json('{name}.jsonl')"
    more = (
        ""
        if name != "mmlu"
        else "; " + write.replace("'test'", "'dev'").replace("mmlu.jsonl", "mmlu_dev.jsonl")
    )
    return f'python -c "from datasets import load_dataset; {write}{more}"'


def rows(file: Path) -> Iterator[tuple[int, dict]]:
    """(line number, row). Raises ValueError naming the line that is no JSON object, or the damage."""
    with (
        gzip.open(file, "rt", encoding="utf-8")
        if file.suffix == ".gz"
        else file.open(encoding="utf-8") as f
    ):
        try:
            for line_no, line in enumerate(f, 1):
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError(
                        f"{file}, line {line_no}: not a task row, it is no JSON object"
                    )
                yield line_no, row
        except json.JSONDecodeError as e:
            raise ValueError(
                f"{file}, line {line_no}: not a task row, it is no JSON ({e.msg})"
            ) from None
        except UnicodeDecodeError as e:
            raise ValueError(f"{file} is not UTF-8 text ({e.reason}); convert it") from None
        except (gzip.BadGzipFile, EOFError, zlib.error) as e:
            raise ValueError(f"{file} is damaged: {e}; get it again") from None


def load(file: Path, limit: int | None = None) -> Task:
    """The task in a file, of at most `limit` items. Raises ValueError naming the line that is malformed."""
    if not file.is_file():
        raise ValueError(f"--tasks {file} does not exist; a task is a .jsonl or .jsonl.gz file")
    stem = file.name.split(".")[0]
    name = next((n for n, d in DATASETS.items() if stem in (n, *d.names)), stem)
    items, layout, shots = [], "", ()
    for line, row in islice(rows(file), limit):
        if not layout:
            layout = next(
                (k for k, (keys, _) in LAYOUTS.items() if all(key in row for key in keys)), ""
            )
            shots = (_shots(file),) if layout == "MMLU" else ()
        if not layout:
            keys = ", ".join(map(repr, row))
            raise ValueError(
                f"{file}, line {line}: not a task row, its keys {keys} are those of none of {[*LAYOUTS]}"
            )
        items.append(_made(file, line, layout, LAYOUTS[layout][1], row, *shots))
    if not items:
        raise ValueError(f"{file} holds no items")
    known = DATASETS.get(name)
    metrics = (
        known.metrics
        if known
        else (ACC, PERPLEXITY)
        if layout in ("context/continuation", "LAMBADA")
        else BOTH
    )
    return Task(
        name, items, metrics, f"lm-eval {known.version}" if known else f"own task, {layout}"
    )


def _made(file: Path, line: int, layout: str, make: Callable, *given):
    try:
        return make(*given)
    except KeyError as e:
        raise ValueError(f"{file}, line {line}: not a task row ({layout}), it lacks {e}") from None
    except (TypeError, AttributeError, ValueError, IndexError) as e:
        raise ValueError(f"{file}, line {line}: not a task row ({layout}): {e}") from None


def _shots(file: Path) -> dict[str, list[str]]:
    """subject -> its examples in order, from the dev file beside MMLU's."""
    beside = [
        file.with_name(f"{file.name.split('.')[0]}_dev{end}") for end in (".jsonl", ".jsonl.gz")
    ]
    found = next((f for f in beside if f.is_file()), None)
    if found is None:
        raise ValueError(
            f"{file} needs its five examples in {beside[0]} (or .gz); made by  {fetch('mmlu')}"
        )
    shots: dict[str, list[str]] = {}
    for line, row in rows(found):

        def make(row):
            return (
                text(row, "subject"),
                f"{_ask(row)} {'ABCD'[number(row, 'answer')]}\n\n",
            )

        subject, shown = _made(found, line, "MMLU", make, row)
        shots.setdefault(subject, []).append(shown)
    return shots


# Scoring


def encode(
    tokenizer: Tokenizer, pairs: list[tuple[str, str]], longest: int
) -> list[tuple[tuple[int, ...], list[int]]]:
    """[(what the model reads, the continuation's ids)]: goal[-1] is predicted at the last position read."""
    kept = [context.rstrip() for context, _ in pairs]
    moved = [(k, context[len(k) :] + more) for k, (context, more) in zip(kept, pairs, strict=True)]
    whole = tokenizer.encode_documents(
        [a + b for a, b in moved]
    )  # in parallel; each ends with the end token
    alone = dict.fromkeys(a for a, _ in moved)
    lengths = dict(zip(alone, map(len, tokenizer.encode_documents(list(alone))), strict=True))
    out = []
    for (context, continuation), ids in zip(moved, whole, strict=True):
        ids, cut = ids[:-1], lengths[context] - 1
        if not context:
            first = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
            ids, cut = ids if ids[:1] == [first] and len(ids) > 1 else [first, *ids], 1
        if not ids[cut:]:
            raise ValueError(
                f"the continuation {continuation!r} after {context[-40:]!r} has no tokens of its own"
            )
        out.append((tuple(ids[-(longest + 1) : -1]), ids[cut:][-longest:]))
    return out


@torch.no_grad()
def likelihoods(
    model: Llama,
    tokenizer: Tokenizer,
    pairs: list[tuple[str, str]],
    dtype: torch.dtype,
    tokens: int | None = None,
) -> list[tuple[float, bool]]:
    """[(sum of the continuation's log-probabilities in nats, is it greedy)] of (context, continuation) pairs.

    tokens: how many go through the model at a time, padding included.
    """
    device = model.device
    tokens = tokens or (65536 if device.type == "cuda" else 4096)
    requests = encode(tokenizer, pairs, model.config.rope.length)
    readers: dict[tuple[int, ...], list[int]] = {}  # an input -> the requests that it answers
    for i, (ids, _) in enumerate(requests):
        readers.setdefault(ids, []).append(i)
    inputs = sorted(
        readers, key=lambda ids: -len(ids)
    )  # stable: the order, and so every bit, is the same each time
    bar = tqdm(total=len(inputs), unit=" inputs", leave=False, disable=None)
    order, logps, hits = [], [], []
    while inputs:
        n = max(1, tokens // len(inputs[0]))
        now, inputs = inputs[:n], inputs[n:]
        asked = [(row, i) for row, ids in enumerate(now) for i in readers[ids]]
        logp, hit = _score_batch(model, now, [(row, requests[i][1]) for row, i in asked], dtype)
        order += [i for _, i in asked]
        logps.append(logp)
        hits.append(hit)
        bar.update(len(now))
    bar.close()
    flat, right = (
        torch.cat(logps).double().cpu().numpy(),
        torch.cat(hits).cpu().numpy(),
    )  # the one wait for a GPU
    starts = np.cumsum([0, *(len(requests[i][1]) for i in order)])[:-1]
    sums, greedy = np.add.reduceat(flat, starts), np.logical_and.reduceat(right, starts)
    found = dict(zip(order, zip(sums.tolist(), greedy.tolist(), strict=True), strict=True))
    return [found[i] for i in range(len(requests))]


def _score_batch(
    model: Llama,
    inputs: list[tuple[int, ...]],
    asked: list[tuple[int, list[int]]],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """log p [N] of every goal token and whether it is the greedy one [N]; asked: (row of inputs, goal ids)."""
    device = model.device
    ids = torch.zeros(len(inputs), len(inputs[0]), dtype=torch.int64)
    for row, one in enumerate(inputs):
        ids[row, : len(one)] = torch.tensor(one)
    at = [(row, len(inputs[row]) - len(goal) + k) for row, goal in asked for k in range(len(goal))]
    where, goals = (
        torch.tensor(at, device=device),
        torch.tensor([t for _, goal in asked for t in goal], device=device),
    )
    h = model.hidden(ids.to(device), dtype)[where[:, 0], where[:, 1]]  # [N, C]
    logp, hit = [], []
    for part, goal in zip(
        h.split(4096), goals.split(4096), strict=True
    ):  # at most [4096, V] logits alive
        logits = model.lm_head(part).float()
        logp.append(logits.log_softmax(-1).gather(1, goal[:, None])[:, 0])
        hit.append(logits.argmax(-1) == goal)
    return torch.cat(logp), torch.cat(hit)


def score(model: Llama, tokenizer: Tokenizer, task: Task, dtype: torch.dtype) -> Result:
    """Every item of one task, scored; report.summary makes figures of the values."""
    flat = iter(
        likelihoods(model, tokenizer, [r for item in task.items for r in item.requests], dtype)
    )
    got = [[next(flat) for _ in item.requests] for item in task.items]
    result = Result(
        [np.asarray([s for s, _ in g]) for g in got],
        [np.asarray([hit for _, hit in g]) for g in got],
    )
    single = all(len(item.requests) == 1 for item in task.items)
    gold = np.asarray([item.gold for item in task.items])
    if ACC in task.metrics:
        result.values[f"{task.name}, {ACC}"] = (result.predictions == gold).astype(np.float64)
    if NORMED in task.metrics and not single:
        best = [
            int(np.argmax(s / np.asarray(i.characters)))
            for s, i in zip(result.logps, task.items, strict=True)
        ]
        result.values[f"{task.name}, {NORMED}"] = (np.asarray(best) == gold).astype(np.float64)
    if PERPLEXITY in task.metrics and single:
        result.values[f"{task.name}, {PERPLEXITY}"] = np.concatenate(result.logps)
    return result
