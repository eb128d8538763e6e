"""RULER's thirteen tasks and the passkey test: their prompts, word for word, and their scores.

A task is one row of TASKS: which recipe of ruler_draw.py draws it, what hides in which haystack,
the template of the prompt, the first words of the answer, and the score of a sample:

    all      the share of its references that the prediction contains
    any      1 if it contains any reference                                               (qa)
    number   1 if its first number is the key                                        (passkey)

letter case ignored, control characters read as newlines. A task's figure is 100 times the mean over
samples, rounded to two decimals; RULER's is the mean of the 13, of 500 samples each at seed 42.

Two known variants of RULER; `Task.version` names the one used.
    vt   until 4a216f4 (2025-05-13) the answer prefix said "assgined"; figures published before,
         and lm-eval's, have the typo. Task `vt` has today's spelling, task `vt_typo` the old one.
    qa   lm-eval's string_match_part gives the share of a sample's references, not "any": lower.

Source.  RULER, arXiv 2404.06654, github.com/NVIDIA/RULER at c3f5e3b (its templates: Apache-2.0).
Passkey: Landmark attention, arXiv 2305.16300, as in PI, arXiv 2306.15595 (a length is reached at 20
% success); keys and scoring of YaRN.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {type_needle_v} for {key} is: {value}."


@dataclass(frozen=True)
class Task:
    kind: str  # which recipe of ruler_draw.py draws it
    max_new_tokens: int
    template: str
    answer_prefix: str
    metric: str = "all"  # "all", "any" or "number": the three scores above
    version: str = "RULER c3f5e3b"
    haystack: str = "noise"  # niah: "noise", "essay" or "needle"; qa: the data set
    key: str = "words"  # what a needle's key and value are: "words", "numbers" or "uuids"
    value: str = "numbers"
    keys: int = 1  # keys hidden, values per key, keys asked for
    values: int = 1
    queries: int = 1


NIAH = Task(
    "niah",
    128,
    "Some special magic {type_needle_v} are hidden within the following text. Make "
    "sure to memorize it. I will quiz you about the {type_needle_v} afterwards.\n"
    "{context}\nWhat are all the special magic {type_needle_v} for {query} mentioned "
    "in the provided text?",
    " The special magic {type_needle_v} for {query} mentioned in the provided text are",
)
VT = Task(
    "vt",
    30,
    "Memorize and track the chain(s) of variable assignment hidden in the following "
    "text.\n\n{context}\nQuestion: Find all variables that are assigned the value "
    "{query} in the text above.",
    " Answer: According to the chain(s) of variable assignment in the text above, "
    "{num_v} variables are assigned the value {query}, they are: ",
    version="RULER c3f5e3b, 'assigned' (since 4a216f4)",
)
QA = Task(
    "qa",
    32,
    "Answer the question based on the given documents. Only give me the answer and "
    "do not output any other words.\n\nThe following are given documents.\n\n"
    "{context}\n\nAnswer the question based on the given documents. Only give me the "
    "answer and do not output any other words.\n\nQuestion: {query}",
    " Answer:",
    metric="any",
    version="RULER c3f5e3b, any reference (lm-eval: fraction)",
)
TASKS = {
    "niah_single_1": NIAH,
    "niah_single_2": replace(NIAH, haystack="essay"),
    "niah_single_3": replace(NIAH, haystack="essay", value="uuids"),
    "niah_multikey_1": replace(NIAH, haystack="essay", keys=4),
    "niah_multikey_2": replace(NIAH, haystack="needle"),
    "niah_multikey_3": replace(NIAH, haystack="needle", key="uuids", value="uuids"),
    "niah_multivalue": replace(NIAH, haystack="essay", values=4),
    "niah_multiquery": replace(NIAH, haystack="essay", keys=4, queries=4),
    "vt": VT,
    "cwe": Task(
        "cwe",
        120,
        "Below is a numbered list of words. In these words, some appear more often "
        "than others. Memorize the ones that appear most often.\n{context}\n"
        "Question: What are the 10 most common words in the above list?",
        " Answer: The top 10 words that appear most often in the list are:",
    ),
    "fwe": Task(
        "fwe",
        50,
        "Read the following coded text and track the frequency of each coded word. "
        "Find the three most frequently appeared coded words. {context}\nQuestion: "
        "Do not provide any explanation. Please ignore the dots '....'. What are the "
        "three most frequently appeared words in the above coded text?",
        " Answer: According to the coded text above, the three most frequently appeared words are:",
    ),
    "qa_1": replace(QA, haystack="squad.json"),
    "qa_2": replace(QA, haystack="hotpotqa.json"),
}
RULER_TASKS = tuple(TASKS)  # the 13 whose mean is RULER's score
TASKS["vt_typo"] = replace(
    VT,
    answer_prefix=VT.answer_prefix.replace("assigned", "assgined"),
    version="RULER c3f5e3b, 'assgined' (until 4a216f4)",
)
TASKS["passkey"] = Task(
    "passkey",
    10,
    "There is an important info hidden inside a lot of irrelevant text. Find it and "
    "memorize them. I will quiz you about the important information there.\n"
    "{before}\nThe pass key is {key}. Remember it. {key} is the pass key.\n{after}\n"
    "What is the pass key?",
    " The pass key is",
    metric="number",
    version="passkey (Landmark, PI), key 1..50000",
)


def named(task: str) -> Task:
    """The task of that name. Raises ValueError for one that RULER does not have."""
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; the tasks are {', '.join(TASKS)}")
    return TASKS[task]


def marks(
    task: str, predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> list[float]:
    """0 .. 1 of each sample, by the task's rule. references: each sample's `outputs`.

    Raises ValueError where samples and predictions are not as many, or a sample has no references.
    """
    metric = named(task).metric
    if not predictions or len(predictions) != len(references):
        counts = f"{len(predictions)} predictions for {len(references)} samples"
        raise ValueError(f"{task}: {counts}; one each is needed")
    if not all(references):
        first = [bool(each) for each in references].index(False)
        raise ValueError(f"{task}: sample {first} has no references")
    out = []
    for prediction, wanted in zip(predictions, references, strict=True):
        answer = re.sub(r"[\x00-\x1f]", "\n", prediction.strip()).strip().lower()
        if metric == "number":
            found = [re.findall(r"\d+", answer)[:1] == list(wanted)]
        else:
            found = [reference.lower() in answer for reference in wanted]
        out.append(float(any(found)) if metric == "any" else sum(found) / len(found))
    return out


def score(task: str, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """RULER's own figure, 0 .. 100."""
    each = marks(task, predictions, references)
    return round(sum(each) / len(each) * 100, 2)
