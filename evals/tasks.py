"""Short-text tasks: files of items, and which data set, prompts and figures they are.

What.  A task is a file of JSON lines, plain or gzip, one item per line, all in one layout of
formats.py. DATASETS knows the sets that lm-evaluation-harness scores: their layout on the Hub,
where they come from, which figures are reported (likelihood.py has the formulas) and the harness's
version.

Names.  A file that is named like a data set, and is in that set's layout, has the harness's
prompts, and its figures carry the harness's version. In any other layout the prompts are those of
the file, and the figures say so.

Limits.  A folder, or "all", means the known names alone; any other task is named by its file.

Source.  lm-evaluation-harness 0.4.13: the tasks' yaml files.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from evals.formats import LAYOUTS, Item, mmlu_example
from hub.files import json_lines

ACC, NORMED, PERPLEXITY = "accuracy", "accuracy normed", "perplexity"
ENDS = (".jsonl", ".jsonl.gz")


@dataclass(frozen=True)
class Task:
    name: str
    items: list[Item]
    metrics: tuple[str, ...]
    version: str  # whose prompts these are

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Every item's requests, one after another."""
        return [request for item in self.items for request in item.requests]


@dataclass(frozen=True)
class Dataset:
    layout: str  # the Hub's, one of LAYOUTS
    hub: str  # the data set, its configuration if it has several, and the split that is scored
    metrics: tuple[str, ...]
    version: str  # the harness' own number
    names: tuple[str, ...] = ()  # other names that its file may have


BOTH, ONE = (ACC, NORMED), (ACC,)
# fmt: off
DATASETS = {
    "lambada_openai": Dataset("LAMBADA", "EleutherAI/lambada_openai default test",
                              (ACC, PERPLEXITY), "1.0", ("lambada",)),
    "piqa": Dataset("PIQA", "baber/piqa - validation", BOTH, "1.0"),
    "arc_easy": Dataset("ARC", "allenai/ai2_arc ARC-Easy test", BOTH, "1.0"),
    "arc_challenge": Dataset("ARC", "allenai/ai2_arc ARC-Challenge test", BOTH, "1.0"),
    "hellaswag": Dataset("HellaSwag", "Rowan/hellaswag - validation", BOTH, "1.0"),
    "winogrande": Dataset("WinoGrande", "allenai/winogrande winogrande_xl validation", ONE, "1.0"),
    "openbookqa": Dataset("OpenBookQA", "allenai/openbookqa main test", BOTH, "1.0",
                          ("openbook_qa",)),
    "boolq": Dataset("BoolQ", "aps/super_glue boolq validation", ONE, "2.0"),
    "copa": Dataset("COPA", "aps/super_glue copa validation", ONE, "1.0"),
    "commonsense_qa": Dataset("CommonsenseQA", "tau/commonsense_qa - validation", ONE, "0.4.13",
                              ("commonsenseqa", "csqa")),
    "wsc": Dataset("WSC", "aps/super_glue wsc.fixed validation", ONE, "1.0"),
    "wsc273": Dataset("WSC273", "lighteval/winograd_wsc wsc273 test", ONE, "1.0",
                      ("winograd_wsc",)),
    "social_iqa": Dataset("SIQA", "lighteval/siqa - validation", ONE, "0.0", ("siqa",)),
    "mathqa": Dataset("MathQA", "regisss/math_qa - test", BOTH, "1.0", ("math_qa",)),
    "mmlu": Dataset("MMLU", "cais/mmlu all test", ONE, "2, 5-shot"),
}
# fmt: on


def fetch(*names: str) -> str:
    """The command that writes data sets' files; the package `datasets` is needed for it alone."""
    writes = []
    for name in names:
        path, config, split = DATASETS[name].hub.split()
        which = f"'{path}'" + (f", '{config}'" if config != "-" else "")
        writes.append(f"load_dataset({which}, split='{split}').to_json('{name}.jsonl')")
        if name == "mmlu":
            dev = writes[-1].replace("'test'", "'dev'")
            writes.append(dev.replace("mmlu.jsonl", "mmlu_dev.jsonl"))
    return f'python -c "from datasets import load_dataset; {"; ".join(writes)}"'


def find(words: list[str], folder: Path | None, limit: int | None) -> tuple[list[Task], list[str]]:
    """(tasks, what is left out and why) of what was asked for.

    words: files, folders, names of DATASETS, or "all" of those; a name is looked for in `folder`.
    Raises ValueError where a file that was named is malformed, or where nothing is left; of "all"
    and of a folder a malformed file is left out.
    """
    found, absent, lacking = {}, {}, []
    for word in words:
        for name, places in _places(word, folder):
            file = next((place for place in places if place.is_file()), None)
            if file is None:
                absent[name] = str(places[0])
                continue
            try:
                found[file] = load(file, limit)
            except ValueError as e:
                if name == word:
                    raise
                lacking.append(f"{name}: {e}")
    if absent:
        places = " ".join(absent.values())
        made_by = f"made, after pip install datasets, by  {fetch(*absent)}"
        lacking.insert(0, f"{', '.join(absent)}: expected as {places} (or .gz); {made_by}")
    if lacking and not found:
        raise ValueError(f"none of the --tasks can be used: {'; '.join(lacking)}")
    return list(found.values()), lacking


def _places(word: str, folder: Path | None) -> Iterator[tuple[str, list[Path]]]:
    """(name, files that may hold it) of a word; the name is the word where it means one file."""
    path = Path(word)
    if path.is_file():
        yield word, [path]
        return
    place, names = folder or Path("."), [word] if word in DATASETS else list(DATASETS)
    if word not in DATASETS and path.is_dir():
        place = path
    elif word not in DATASETS and word != "all":
        known = f"neither a file, a folder, 'all', nor one of {', '.join(DATASETS)}"
        raise ValueError(f"--tasks {word} is {known}; a task is a .jsonl or .jsonl.gz file")
    for name in names:
        yield name, [place / f"{n}{end}" for n in (name, *DATASETS[name].names) for end in ENDS]


def load(file: Path, limit: int | None = None) -> Task:
    """The task in a file, of at most `limit` items. Raises ValueError naming the malformed line."""
    if not file.is_file():
        raise ValueError(f"--tasks {file} does not exist; a task is a .jsonl or .jsonl.gz file")
    stem = os.fsencode(file.name).decode(errors="replace").split(".")[0]  # names need not be UTF-8
    name = next((n for n, d in DATASETS.items() if stem in (n, *d.names)), stem)
    items, layout, shots = [], "", ()
    for line, row in islice(json_lines(file, "task row"), limit):
        if not layout:
            layout = _layout(file, line, row)
            shots = (_shots(file),) if layout == "MMLU" else ()
        items.append(_made(file, line, layout, LAYOUTS[layout][1], row, *shots))
    if not items:
        raise ValueError(f"{file} holds no items")
    known = DATASETS.get(name)
    version = f"own task, {layout}, not lm-eval's prompts"
    if known and known.layout == layout:
        version = f"lm-eval {known.version}"
    if known:
        metrics = known.metrics
    elif all(len(item.requests) == 1 for item in items):
        metrics = (ACC, PERPLEXITY)
    else:
        alike = (d.metrics for d in DATASETS.values() if d.layout == layout)
        metrics = BOTH if layout == "query/choices/gold" else next(alike, ONE)
    return Task(name, items, metrics, version)


def notes(found: list[Task]) -> list[str]:
    """A sentence for each task that is not one of DATASETS: as what its rows were read."""
    other = [task for task in found if not task.version.startswith("lm-eval")]
    return [f"{t.name}: {t.version}; evals/formats.py says what that layout asks." for t in other]


def _layout(file: Path, line: int, row: dict) -> str:
    for name, (keys, _) in LAYOUTS.items():
        if all(key in row for key in keys):
            return name
    keys = ", ".join(map(repr, row))[:200]
    raise ValueError(
        f"{file}, line {line}: not a task row, its keys {keys} are those of no layout in "
        'evals/formats.py; the simplest is {"query": "2 + 2 =", "choices": ["3", "4"], "gold": 1}'
    )


def _made(file: Path, line: int, layout: str, make: Callable, *row):
    try:
        return make(*row)
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as e:
        why = f", it lacks {e}" if isinstance(e, KeyError) else f": {e}"
        raise ValueError(f"{file}, line {line}: not a task row ({layout}){why}") from None


def _shots(file: Path) -> dict[str, list[str]]:
    """subject -> its examples in order, from the dev file that stands with MMLU's."""
    stem = file.name.split(".")[0]
    places = [file.with_name(f"{stem}_dev{end}") for end in ENDS]
    dev = next((place for place in places if place.is_file()), None)
    if dev is None:
        raise ValueError(
            f"{file} needs its five examples in {places[0]} (or .gz); made by  {fetch('mmlu')}"
        )
    shots: dict[str, list[str]] = {}
    for line, row in json_lines(dev, "task row"):
        subject, example = _made(dev, line, "MMLU", mmlu_example, row)
        shots.setdefault(subject, []).append(example)
    return shots
