"""Text to tokens to blocks, in an order that depends on the seed and the step alone.

    files and folders -> documents -> ids, an end token after each -> one stream -> blocks of T

Sources.  Any mix of files and folders of what text_readers.py reads: texts, rows with a text or a
chat, streams of ids. In a folder, hidden files and folders and those of other kinds are left out,
and that is said (`Corpus.notes`), as is every row that has no text. Without any: what
default_text.py names, 15 MB of Python that are the same on every machine.

Tokenised once.  The stream is written as a numpy file under a name that is a hash of the tokenizer
and of every file's name and contents, and is mapped, not read, from then on (token_cache.py).
A text that is refused leaves nothing behind.

Held out.  One document in 20, by a hash of its name, never trains, whatever else is read with it,
nor do its copies: a document equal to an earlier one goes where that went. Where that gives less
than 1 % of the tokens (few, long documents) the last 5 % of the stream are held out instead, copies
left out.

Memory.  Text is tokenised by a few million characters at a time, long documents in pieces.

Order.  The training stream has n = (tokens - 1) // T blocks. Epoch e visits them in a permutation
drawn from (seed, e); the k-th block of a run is thus a function of (seed, k), whatever the number
of processes, and a resumed run needs only k.

Limits.  A block may hold parts of several documents, and attention sees across them, as in most
pre-training.
"""

import dataclasses
import functools
import hashlib
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from engine import default_text, token_cache
from engine.text_readers import KINDS, ROWS, Notes, documents, kind_of
from hub import files
from hub.chats import Chats
from hub.tokenizer import PIECE, Tokenizer

HELD_OUT_ONE_IN = 20
_CHARACTERS = 1 << 21  # tokenised at a time: some 100 MB where each token is an object of its own


def seed_of(seed: int, stage: int, auxiliary: bool = False) -> int:
    """What the order of a stage's blocks, and of its auxiliary ones, is drawn with."""
    return seed + 7919 * stage + 104729 * auxiliary


@functools.lru_cache(maxsize=4)
def _order(seed: int, epoch: int, n: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(n)


@dataclass(frozen=True)
class Corpus:
    """Two streams of ids: `train` and `held_out`, 1-D, mapped from disk.

    name says what they are made of; digest is of the contents of the files and of the tokenizer;
    notes say what was left out of them.
    """

    train: np.ndarray
    held_out: np.ndarray
    name: str
    digest: str = ""
    notes: tuple[str, ...] = ()

    def batch(self, seed: int, first: int, count: int, T: int) -> Tensor:
        """The blocks number first .. first+count-1 of a run: [count, T + 1] int64, the last column
        the last target.
        """
        n = self.blocks(T)
        rows = []
        for k in range(first, first + count):
            start = int(_order(seed, k // n, n)[k % n]) * T
            rows.append(np.asarray(self.train[start : start + T + 1], dtype=np.int64))
        return torch.from_numpy(np.stack(rows))

    def blocks(self, T: int) -> int:
        """How many blocks of T tokens the training text holds; ValueError where it holds none."""
        n = (len(self.train) - 1) // T
        if n < 1:
            raise ValueError(
                f"a block of {T} tokens is longer than all the text ({len(self.train)} tokens); "
                "add --data"
            )
        return n

    def held_out_blocks(self, T: int, most: int) -> Tensor:
        """Up to `most` blocks [n, T + 1] spread evenly over the held-out stream.

        Where there is enough text they are the odd-numbered ones: the even ones are for choosing
        recipes on. Raises ValueError where there is not one.
        """
        n = (len(self.held_out) - 1) // T
        if n < 1:
            raise ValueError(
                f"the held-out text has {len(self.held_out)} tokens, less than one block of {T}; "
                "add --data"
            )
        there = range(1, n, 2) if n // 2 >= most else range(n)
        evenly = np.linspace(0, len(there) - 1, min(most, len(there))).astype(int)
        blocks = [self.held_out[there[i] * T :][: T + 1] for i in sorted(set(evenly.tolist()))]
        return torch.from_numpy(np.stack(blocks).astype(np.int64))


def load_corpus(
    paths: list[Path],
    tokenizer: Tokenizer,
    cache: Path,
    *,
    quiet: bool = False,
    without: Path | None = None,
    check: Callable[[Corpus], None] = lambda corpus: None,
    field: str | None = None,
) -> Corpus:
    """The corpus of `paths` (empty: default_text.py's), tokenised into `cache` unless it is
    there already.

    without: a folder to leave out of the scan, such as the run's own; the cache is left out too.
    check: called before anything is written, to refuse a text that is too short. field: that holds
    the text of rows, None: to be found. Raises ValueError naming the file (and line) that is
    missing, empty, undecodable or malformed.
    """
    if os.path.realpath(cache) in [os.path.realpath(path) for path in paths]:
        raise ValueError(f"--cache {cache} is a folder of --data; name another")
    scanned, read = Notes(), Notes()
    found = find_files(paths, [cache, *([without] if without else [])], scanned)
    chats = Chats(tokenizer) if any(kind_of(file.name) in ROWS for _, file in found) else None
    decides = [tokenizer.digest, tokenizer.bos_id, tokenizer.eos_id, field, chats and chats.digest]
    key = hashlib.sha256(f"6 {decides}".encode())
    for name, file in found:
        key.update(os.fsencode(f"{name}\0{files.digest(file)}\n"))
    digest = key.hexdigest()[:20]
    what = ", ".join(map(str, paths)) if paths else default_text.NAME
    cached = token_cache.read(cache / digest)
    if cached:
        *streams, notes = cached
    else:
        streams = _tokenise(found, tokenizer, quiet, field, chats, read)
        notes = read.lines()
    corpus = Corpus(*streams, what, digest, (*scanned.lines(), *notes))
    check(corpus)
    if not cached:
        token_cache.write(cache / digest, *streams, notes)
        cached = token_cache.read(cache / digest)
        assert cached, "a cache that was just written reads back"
        corpus = dataclasses.replace(corpus, train=cached[0], held_out=cached[1])
    return corpus


def find_files(
    paths: list[Path],
    without: list[Path] = (),
    notes: Notes | None = None,
    flag: str = "--data",
) -> list[tuple[str, Path]]:
    """(name, file) of every source, sorted by name, which is relative to the folder that was given.

    without: folders that are not entered. notes: where to say what is left out. flag: that names
    the paths. Raises ValueError for a path that does not exist or whose kind is not read, and where
    there is no text.
    """
    if not paths:
        return default_text.find_files()
    found: dict[str, Path] = {}
    for path in paths:
        files.refuse_lost_link(path)
        if not path.exists():
            raise ValueError(f"{flag} {path} does not exist")
        if not path.is_file() and not path.is_dir():
            raise ValueError(
                f"{flag} {path} is no file or folder (a pipe cannot be read twice); save the text "
                "first"
            )
        if path.is_file() and kind_of(path.name) is None:
            raise ValueError(f"{flag} {path}: unknown kind of file; use {KINDS}")
        root, below = path.parent, [path]
        if path.is_dir():
            root, below = path, _below(path, without, notes or Notes())
        for file in below:
            name = str(file.relative_to(root))
            found[name if name not in found else str(file)] = file
    if not found:
        raise ValueError(f"no text in {', '.join(map(str, paths))}: no file ends in {KINDS}")
    return sorted(found.items())


def _below(path: Path, without: list[Path], notes: Notes) -> Iterator[Path]:
    """Every file under a folder that is read. Raises ValueError where a folder cannot be."""

    def refuse(e: OSError) -> None:
        raise ValueError(f"cannot read {e.filename}: {e.strerror.lower()}")

    skipped = [os.path.realpath(folder) for folder in without]
    for here, folders, names in os.walk(path, onerror=refuse):
        here = Path(here)
        folders[:] = [n for n in sorted(folders) if os.path.realpath(here / n) not in skipped]
        for name in (n for n in (*folders, *sorted(names)) if n.startswith(".")):
            notes.leave_out("hidden files and folders", str(here / name))
        folders[:] = [n for n in folders if not n.startswith(".")]
        for file in (here / n for n in sorted(names) if not n.startswith(".")):
            if kind_of(file.name) is None:
                notes.leave_out("files of kinds that are not read", str(file))
                continue
            files.refuse_lost_link(file)
            if file.is_file():
                yield file


def _tokenise(
    found: list[tuple[str, Path]],
    tokenizer: Tokenizer,
    quiet: bool,
    field: str | None,
    chats: Chats | None,
    notes: Notes,
) -> tuple[np.ndarray, np.ndarray]:
    """(train, held out)."""
    encoded: list[tuple[str, np.ndarray]] = []
    waiting: list[tuple[str, str]] = []
    characters = 0  # of those that wait
    dtype = np.uint16 if tokenizer.size <= 1 << 16 else np.uint32

    def flush() -> None:
        each = tokenizer.encode_documents([text for _, text in waiting])
        for (name, _), ids in zip(waiting, each, strict=True):
            encoded.append((name, np.asarray(ids, dtype=dtype)))
        waiting.clear()

    each = documents(found, field, chats, notes)
    for name, text in tqdm(each, desc="tokenising", unit=" documents", disable=quiet or None):
        if isinstance(text, np.ndarray):
            low, high = (int(text.min()), int(text.max())) if text.size else (0, 0)
            if low < 0 or high >= tokenizer.size:
                bad = low if low < 0 else high
                raise ValueError(f"{name} holds the id {bad}; the vocabulary has {tokenizer.size}")
            flush()
            encoded.append((name, text.astype(dtype)))
        elif len(text) > PIECE:
            flush()
            pieces = [np.asarray(ids, dtype=dtype) for ids in tokenizer.encode_long(text)]
            encoded.append((name, np.concatenate(pieces)))
        elif text.strip():
            waiting.append((name, text))
            characters += len(text)
            if characters >= _CHARACTERS:
                flush()
                characters = 0
    flush()
    if not encoded:
        why = "; ".join(notes.lines())
        raise ValueError(
            f"{', '.join(str(f) for _, f in found[:3])}: the text is empty{f' ({why})' * bool(why)}"
        )
    return split(encoded)


def split(named: list[tuple[str, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """(training ids [tokens], held-out ids [tokens]) of (name, ids [tokens]) documents.

    One document in HELD_OUT_ONE_IN is held out, by its name alone, or that of the first document
    that is equal to it. Where that comes to less than a hundredth of the text or to half of it, the
    last part of the stream instead, of which copies are left out.
    """
    first: dict[bytes, tuple[bool, np.ndarray]] = {}  # by contents: is it held out, the ids
    train, held_out = [], []
    for name, ids in named:
        same = hashlib.sha256(np.ascontiguousarray(ids)).digest()
        by_name = zlib.crc32(os.fsencode(name)) % HELD_OUT_ONE_IN == 0
        is_held_out, _ = first.setdefault(same, (by_name, ids))
        (held_out if is_held_out else train).append(ids)
    whole, held = sum(len(ids) for _, ids in named), sum(map(len, held_out))
    if max(1, whole // 100) <= held < whole // 2:
        return np.concatenate(train), np.concatenate(held_out)
    stream = np.concatenate([ids for _, ids in first.values()])
    cut = len(stream) - max(1, len(stream) // HELD_OUT_ONE_IN)
    return stream[:cut], stream[cut:]
