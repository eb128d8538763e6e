"""A row of a task's file -> the requests that a model is asked: one function per layout.

What.  An item is a list of requests (context, continuation), one per choice, and the number of the
right one. LAYOUTS knows a layout by the keys of its rows. In the three plain ones the prompts are
those of the row:

    {"context": ..., "continuation": ...}             LAMBADA: is the last word the likeliest one?
    {"query": ..., "choices": [...], "gold": n}       multiple choice; "Question: ..." without an
                                                      "Answer:" at its end is given one
    {"context_options": [...], "continuation": ..., "gold": n}     partial scoring, as below

The others are the rows of data sets as they lie on the Hub, and their prompts are those of
lm-evaluation-harness, to the space. WinoGrande and WSC273 have partial scoring: the contexts hold
the names that a pronoun may stand for, the continuation is what follows it. MMLU shows the first
five rows of the subject's dev file.

Limits.  Rows whose answers are not public (label -1 or "") are refused.

Source.  lm-evaluation-harness 0.4.13: api/task.py and the tasks' yaml files.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Item:
    """(context, continuation) per choice; a single one must be the greedy continuation."""

    requests: tuple[tuple[str, str], ...]
    gold: int

    @property
    def characters(self) -> tuple[int, ...]:
        """Of each continuation, without its space, for the normed accuracy."""
        return tuple(max(1, len(continuation) - 1) for _, continuation in self.requests)


def text(row: dict, key: str) -> str:
    """Raises ValueError where it is none."""
    value = row[key]
    if not isinstance(value, str):
        raise ValueError(f"{key} is {value!r}, not text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{key} holds half a character, a surrogate alone") from None
    return value


def texts(row: dict, key: str) -> list[str]:
    """A list of texts. Raises ValueError where it is none, or empty."""
    if not isinstance(row[key], list) or not row[key]:
        raise ValueError(f"{key} is {row[key]!r}, not a list of texts")
    return [text({key: value}, key) for value in row[key]]


def number(row: dict, key: str) -> int:
    """A label: 3, "3" or true. ValueError for "" and -1: such a split's answers are not public."""
    value = row[key]
    if isinstance(value, str) and value.strip().isdigit():
        value = int(value)
    if not isinstance(value, int) or value < 0:
        raise ValueError(f"{key} is {value!r}, not an answer; take the split that has them")
    return int(value)


def choose(context: str, choices: list[str], gold: int) -> Item:
    """One context, one answer to choose. Raises ValueError where `gold` numbers no choice."""
    if not 0 <= gold < len(choices):
        raise ValueError(f"the answer is number {gold} of {len(choices)} choices")
    return Item(tuple((context, " " + c) for c in choices), gold)


def choose_context(contexts: list[str], continuation: str, gold: int) -> Item:
    """One continuation after each context. Raises ValueError where gold is none of them."""
    if not 0 <= gold < len(contexts):
        raise ValueError(f"the answer is number {gold} of {len(contexts)} contexts")
    return Item(tuple((context, continuation) for context in contexts), gold)


def labelled(row: dict, context: str, answer: str) -> Item:
    """ARC and OpenBookQA: {"text": [...], "label": ["A", "B", ...]} and the label of the answer.

    Raises ValueError where that is none of the labels.
    """
    labels = texts(row["choices"], "label")
    if answer not in labels:
        raise ValueError(f"answerKey is {answer!r}, not one of {labels}")
    return choose(context, texts(row["choices"], "text"), labels.index(answer))


def pair(row: dict) -> Item:
    continuation = " " + text(row, "continuation").removeprefix(" ")
    return Item(((text(row, "context"), continuation),), 0)


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
    """One ending after two beginnings. ValueError without a _, and for an answer but 1 or 2."""
    before, blank, after = text(row, "sentence").partition("_")
    if not blank:
        raise ValueError(f"sentence {row['sentence']!r} has no _ for the name")
    gold, names = number(row, "answer") - 1, [text(row, "option1"), text(row, "option2")]
    if gold not in (0, 1):
        raise ValueError(f"answer is {row['answer']!r}, not 1 or 2")
    return choose_context([before + name for name in names], " " + after.strip(), gold)


def openbookqa(row: dict) -> Item:
    return labelled(row, text(row, "question_stem"), text(row, "answerKey").lstrip())


def commonsense_qa(row: dict) -> Item:
    """The five answers are listed, and their letters scored."""
    listed = lettered(text(row, "question"), texts(row["choices"], "text"), "ABCDE")
    return choose(f"Question: {listed}", list("ABCDE"), "ABCDE".index(text(row, "answerKey")))


def copa(row: dict) -> Item:
    """The premise loses its full stop. The harness has two spaces before a choice: so have we.

    Raises ValueError for a question that is neither "cause" nor "effect".
    """
    joined = {"cause": "because", "effect": "therefore"}.get(text(row, "question"))
    if joined is None:
        raise ValueError(f"question is {row['question']!r}, neither 'cause' nor 'effect'")
    answers = [text(row, "choice1"), text(row, "choice2")]
    context = f"{text(row, 'premise').strip()[:-1]} {joined}"
    return choose(context, [f" {a[:1].lower()}{a[1:]}" for a in answers], number(row, "label"))


def wsc(row: dict) -> Item:
    """SuperGLUE's: does the marked pronoun stand for the noun? no or yes."""
    passage, pronoun = text(row, "text"), text(row, "span2_text")
    before = " ".join(passage.split()[: number(row, "span2_index")])
    passage = f"{before} *{pronoun}*{passage[len(before) + len(pronoun) + 1 :]}"
    for spaced, joined in ((" n't", "n't"), (" )", ")"), ("( ", "("), ('" ', '"'), (' "', '"')):
        passage = passage.replace(spaced, joined)
    passage = re.sub(r" (['.,])", r"\1", passage)
    asked = f'does the pronoun "*{pronoun}*" refer to "*{text(row, "span1_text")}*"?'
    context = f"Passage: {passage}\nQuestion: In the passage above, {asked}\nAnswer:"
    return choose(context, ["no", "yes"], number(row, "label"))


_UPPER = ("A", "An", "The", "She", "He", "It", "They", "My", "His", "Her", "Their")


def wsc273(row: dict) -> Item:
    """Either name in the pronoun's place, with 's for a possessive; what follows is scored."""
    passage, at = text(row, "text").replace("  ", " "), number(row, "pronoun_loc")
    names = texts(row, "options")
    if text(row, "pronoun").lower() in ("my", "his", "her", "our", "their"):
        names = [f"{name}'s" for name in names]
    if passage[at - 2] != ".":  # within a sentence
        firsts = [name.split()[0] for name in names]
        each = zip(names, firsts, strict=True)
        names = [n.replace(f, f.lower()) if f in _UPPER else n for n, f in each]
    rest = " " + passage[at + len(row["pronoun"]) :]
    return choose_context([passage[:at] + name for name in names], rest, number(row, "label"))


def options(row: dict) -> Item:
    rest = " " + text(row, "continuation").removeprefix(" ")
    return choose_context(texts(row, "context_options"), rest, number(row, "gold"))


def boolq(row: dict) -> Item:
    gold = number(row, "label" if "label" in row else "answer")
    context = f"{text(row, 'passage')}\nQuestion: {text(row, 'question')}?\nAnswer:"
    return choose(context, ["no", "yes"], gold)


def siqa(row: dict) -> Item:
    context = f"Q: {text(row, 'context')} {text(row, 'question')}\nA:"
    answers = [text(row, f"answer{letter}") for letter in "ABC"]
    return choose(context, answers, number(row, "label") - 1)


def mathqa(row: dict) -> Item:
    options = re.findall(r"[abcd] \) .*?, |e \) .*?$", text(row, "options"))
    answers, gold = [o[4:].rstrip(" ,") for o in options], "abcde".index(text(row, "correct"))
    return choose(f"Question: {text(row, 'Problem')}\nAnswer:", answers, gold)


def mmlu(row: dict, shots: dict[str, list[str]]) -> Item:
    """shots: {subject: examples, texts that end in an empty line}; ValueError for fewer than 5."""
    subject = text(row, "subject")
    shown = shots.get(subject, [])[:5]
    if len(shown) < 5:
        raise ValueError(f"the dev file has {len(shown)} rows of subject {subject!r}; 5 are shown")
    head = "The following are multiple choice questions (with answers) about "
    head += f"{subject.replace('_', ' ')}.\n\n"
    question = lettered(text(row, "question"), texts(row, "choices"), "ABCD")
    return choose(head + "".join(shown) + question, list("ABCD"), number(row, "answer"))


def mmlu_example(row: dict) -> tuple[str, str]:
    """(subject, the question with its answer), of a row of the dev file."""
    question = lettered(text(row, "question"), texts(row, "choices"), "ABCD")
    return text(row, "subject"), f"{question} {'ABCD'[number(row, 'answer')]}\n\n"


def lettered(question: str, choices: list[str], letters: str) -> str:
    listed = "".join(f"\n{a}. {choice}" for a, choice in zip(letters, choices, strict=True))
    return f"{question.strip()}{listed}\nAnswer:"


# The keys that tell a layout, and its function; where one's keys are among another's, it is later
LAYOUTS: dict[str, tuple[tuple[str, ...], Callable[..., Item]]] = {
    "context/continuation": (("context", "continuation"), pair),
    "query/choices/gold": (("query", "choices", "gold"), plain),
    "context_options/continuation/gold": (("context_options", "continuation", "gold"), options),
    "MMLU": (("question", "subject", "choices", "answer"), mmlu),
    "PIQA": (("goal", "sol1", "sol2", "label"), piqa),
    "CommonsenseQA": (("question", "question_concept", "choices", "answerKey"), commonsense_qa),
    "ARC": (("question", "choices", "answerKey"), arc),
    "HellaSwag": (("activity_label", "ctx_a", "ctx_b", "endings", "label"), hellaswag),
    "WinoGrande": (("sentence", "option1", "option2", "answer"), winogrande),
    "OpenBookQA": (("question_stem", "choices", "answerKey"), openbookqa),
    "BoolQ": (("passage", "question"), boolq),
    "COPA": (("premise", "choice1", "choice2", "question", "label"), copa),
    "SIQA": (("context", "question", "answerA", "answerB", "answerC", "label"), siqa),
    "MathQA": (("Problem", "options", "correct"), mathqa),
    "WSC": (("text", "span1_text", "span2_text", "span2_index", "label"), wsc),
    "WSC273": (("text", "options", "pronoun", "pronoun_loc", "label"), wsc273),
    "LAMBADA": (("text",), lambada),
}
