"""RULER's data on disk: word lists, essays and question sets, read as NVIDIA's scripts read them.

FILES says under which names they lie in a folder, and where each is to be had. Without the word
lists STAND_INS stands in, without the essays the caller's noise; each stand-in leaves a note, from
which ruler.py names the variant. RULER splits the essays into sentences with nltk, whose answer
changes with its version, so the split is a file too: FILES has the command that writes it.

Limits.  Files are read anew by every task. A malformed one ends in a ValueError that names the line
or the row.

Source.  github.com/NVIDIA/RULER at c3f5e3b, scripts/data/synthetic.
"""

import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

SENTENCES = "PaulGrahamEssays.sentences.json"
RULER_JSON = "scripts/data/synthetic/json of github.com/NVIDIA/RULER"
WONDERWORDS = "the folder wonderwords/assets of the Python package wonderwords (one word a line)"
FILES = {
    "nounlist.txt": WONDERWORDS,
    "adjectivelist.txt": WONDERWORDS,
    "verblist.txt": WONDERWORDS,
    "english_words.json": f"{RULER_JSON}, fetched with git-lfs (cwe at great lengths only)",
    "PaulGrahamEssays.json": f"running download_paulgraham_essay.py in {RULER_JSON}",
    SENTENCES: 'running, in the folder of the essays, python -c "import json, re, nltk; '
    "t = json.load(open('PaulGrahamEssays.json'))['text']; "
    f"json.dump(nltk.sent_tokenize(re.sub(r'\\s+', ' ', t).strip()), open('{SENTENCES}', 'w'))\"",
    "squad.json": "https://rajpurkar.github.io/SQuAD-explorer/dataset/dev-v2.0.json, renamed",
    "hotpotqa.json": "https://huggingface.co/datasets/namlh2004/hotpotqa/resolve/"
    "7e54db4656209750ff487f6fdf8e39a66dba136b/hotpot_dev_distractor_v1.json, renamed",
}
STAND_INS = {  # where the word lists are absent
    "adjectivelist.txt": """
        amber ancient bitter brave brief bright broken calm careful cheap clever cold common crisp
        crooked damp dark deep distant dry dusty early empty faint fair famous fierce flat fresh
        gentle golden grand green heavy hidden hollow humble icy idle keen late lean little lonely
        loud lucky mild narrow noble odd pale patient plain proud quick quiet rare rough sharp
        silver slow steep tidy warm
    """,
    "nounlist.txt": """
        anchor apple arrow basket bell boat bottle branch bridge bucket button candle canyon castle
        chair circle cloud coin compass copper corner desert door drum engine falcon feather fence
        field flame forest garden glove hammer harbor helmet hill island jacket kettle ladder
        lantern letter meadow mirror mountain needle orchard paper pencil pillow planet quarry
        ribbon river saddle shadow spoon station table tiger valley window
    """,
    "verblist.txt": """
        answer borrow build carry choose climb count dance draw enter follow gather guess hold
        invite join knock learn listen mend notice open paint plant promise read repair sing travel
        visit wander write
    """,
}


def folder_of(data_dir: str | Path | None) -> Path | None:
    """The folder of RULER's files, if one is named. ValueError where it is none."""
    if data_dir is not None and not Path(data_dir).is_dir():
        raise ValueError(f"data_dir {data_dir} is not a folder")
    return None if data_dir is None else Path(data_dir)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}, byte {error.start}: not UTF-8") from None


def _json(path: Path):
    try:
        return json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: not JSON ({error.msg})") from None
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply to be real") from None


def words_of(folder: Path | None, notes: list[str], *names: str) -> list[list[str]]:
    """The named lists of data_dir, or STAND_INS, and a note, where it has none of them.

    Raises FileNotFoundError where it lacks some of them, ValueError for a blank line.
    """
    absent = [name for name in names if not (folder and (folder / name).is_file())]
    if len(absent) == len(names):
        notes.append("own words")
        return [STAND_INS[name].split() for name in names]
    if absent:
        raise FileNotFoundError(
            f"data_dir {folder} lacks {absent[0]}: get it from {FILES[absent[0]]}"
        )
    return [_words(folder / name) for name in names]


def _words(path: Path) -> list[str]:
    words = [line.rstrip() for line in _text(path).removesuffix("\n").split("\n")]
    if "" in words:
        line = words.index("") + 1
        raise ValueError(f"{path}, line {line}: a word is expected, the line is blank")
    return words


def english_of(
    folder: Path | None, notes: list[str], lists: list[list[str]], length: int
) -> Sequence[str]:
    """The long list that cwe turns to when a length needs more words than the other lists have.

    Raises FileNotFoundError where it is absent, ValueError where it is not a list of words.
    """
    if "own words" in notes:
        words = [word for one in lists for word in one]
        return Pairs(words, words)
    path = folder / "english_words.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"cwe at length {length} needs {path}: get it from {FILES[path.name]}"
        )
    rows = _json(path)
    if not isinstance(rows, dict) or not all(isinstance(word, str) for word in rows.values()):
        raise ValueError(f"{path}: an object of number: word is expected")
    return list(rows.values())


class Pairs(Sequence):
    """sorted({f"{a}-{b}"}) without holding its millions of strings: a block for each `a`."""

    def __init__(self, firsts: list[str], seconds: list[str]):
        self.seconds, self.blocks = sorted(set(seconds)), []
        for first in sorted(set(firsts), key=lambda word: word + "-"):
            if self.blocks and first.startswith(self.blocks[-1][0] + "-"):
                self.blocks[-1].append(first)  # "blue-eyed" sorts among blue's pairs
            else:
                self.blocks.append([first])
        self.made = {
            i: sorted({f"{first}-{second}" for first in block for second in self.seconds})
            for i, block in enumerate(self.blocks)
            if len(block) > 1
        }
        sizes = [len(self.made.get(i, self.seconds)) for i in range(len(self.blocks))]
        self.ends = np.cumsum(sizes).tolist()

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, i: int) -> str:
        block = bisect_right(self.ends, i)
        i -= self.ends[block - 1] if block else 0
        if block in self.made:
            return self.made[block][i]
        return f"{self.blocks[block][0]}-{self.seconds[i]}"


def essays_of(folder: Path | None, notes: list[str]) -> Callable[[int], list[str]] | None:
    """n -> the sentences of the essays' first n words; None, and a note, where there are none.

    Raises ValueError for a file that is not RULER's, or sentences that are not those of its text.
    """
    path = folder and folder / "PaulGrahamEssays.json"
    if not path or not path.is_file():
        notes.append("noise haystack")
        return None
    essays = _json(path)
    text = essays.get("text") if isinstance(essays, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f'{path}: {{"text": "..."}} is expected')
    text = re.sub(r"\s+", " ", text)
    ends = [gap.start() for gap in re.finditer(" ", text)] + [len(text)]  # of each word
    split = folder / SENTENCES
    if split.is_file():
        sentences = _json(split)
    else:
        notes.append("own sentence split")
        sentences = re.findall(r"[^ ].*?(?:[.?!][\"')\]]*(?= [A-Z\"'(])|(?= ?$))", text)
    starts, at = [], 0  # a sentence starts where the one before it ended, or after one space
    for i, sentence in enumerate(sentences):
        if not isinstance(sentence, str) or not at <= (start := text.find(sentence, at)) <= at + 1:
            raise ValueError(f"{split}, sentence {i + 1}: not found at its place in {path.name}")
        at = start + len(sentence)
        starts.append(start)

    def first(words: int) -> list[str]:
        rounds, rest = divmod(words, len(ends))
        cut = ends[rest - 1] if rest else 0
        tail = sentences[: bisect_left(starts, cut)]
        if tail:
            tail[-1] = tail[-1][: cut - starts[len(tail) - 1]]
        return sentences * rounds + tail

    return first


# A question: its text, the answers, the documents that answer it, and others of the same article.
Question = tuple[str, list[str], list[str], list[str]]


def squad(path: Path) -> tuple[list[Question], list[str]]:
    """(questions, documents) of SQuAD v2's dev set. ValueError naming the row that is malformed."""
    questions, documents, where = [], set(), "the file"
    try:
        for a, article in enumerate(_json(path)["data"]):
            where = f"data[{a}]"
            texts = [paragraph["context"] for paragraph in article["paragraphs"]]
            documents.update(texts)
            for p, paragraph in enumerate(article["paragraphs"]):
                others = [text for text in texts if text != texts[p]]
                for q, qa in enumerate(paragraph["qas"]):
                    where = f"data[{a}].paragraphs[{p}].qas[{q}]"
                    if qa["is_impossible"]:
                        continue
                    answers = [answer["text"] for answer in qa["answers"]]
                    if not answers:
                        raise ValueError(
                            f"{path}, {where}: no answers, though is_impossible is false"
                        )
                    questions.append((qa["question"], answers, [texts[p]], others))
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}, {where}: not a SQuAD row ({error!r})") from None
    return questions, sorted(documents)


def hotpotqa(path: Path) -> tuple[list[Question], list[str]]:
    """(questions, documents) of HotpotQA's distractor set. ValueError naming a malformed row."""
    questions, documents, where = [], set(), "the file"
    try:
        for i, row in enumerate(_json(path)):
            where = f"row {i + 1}"
            texts = [f"{title}\n{''.join(sentences)}" for title, sentences in row["context"]]
            documents.update(texts)
            questions.append((row["question"], [row["answer"]], texts, []))
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}, {where}: not a HotpotQA row ({error!r})") from None
    return questions, sorted(documents)
