"""Text to tokens to blocks, in an order that depends on the seed and the step alone.

    files and folders -> documents -> ids, an end token after each -> one stream -> blocks of T

Sources.  Any mix of files and folders of .txt, .md, .py (a document each), .jsonl (a document per
line, its field `text`), .txt.gz and .jsonl.gz, .csv and .parquet (a document per row, its column
`text`; Parquet where pyarrow is there) and .npy (one stream of ids, already tokenised). Without
any: what default_text.py names, 15 MB of Python that are the same on every machine.

Tokenised once.  The stream is written as a numpy file under a name that is a hash of the tokenizer
and of every file's name and contents, and is mapped, not read, from then on; a checksum tells
whether it is still what was written. A text that is refused, or that the disk has no room for,
leaves nothing behind.

Held out.  One document in 20, by a hash of its name, never trains, whatever else is read with it.
Where that gives less than 1 % of the tokens (few, long documents) the last 5 % of the stream are
held out instead.

Order.  The training stream has n = (tokens - 1) // T blocks. Epoch e visits them in a permutation
drawn from (seed, e); the k-th block of a run is thus a function of (seed, k), whatever the number
of processes, and a resumed run needs only k.

Limits.  Documents run on across block borders, and attention sees across them, as in most
pre-training.
"""

import csv
import functools
import gzip
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
from hub import files
from hub.tokenizer import Tokenizer

LINES = (".jsonl", ".jsonl.gz")
KINDS = (".txt", ".txt.gz", ".md", ".py", *LINES, ".csv", ".parquet", ".npy")
HELD_OUT_ONE_IN = 20
_BATCH = 256  # documents tokenised at a time


def seed_of(seed: int, stage: int, beside: bool = False) -> int:
    """What the order of a stage's blocks, and of those beside them, is drawn with."""
    return seed + 7919 * stage + 104729 * beside


@functools.lru_cache(maxsize=4)
def _order(seed: int, epoch: int, n: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(n)


@dataclass(frozen=True)
class Corpus:
    """Two streams of ids: `train` and `held_out`, 1-D, mapped from disk.

    name says what they are made of; digest is of the contents of the files and of the tokenizer.
    """

    train: np.ndarray
    held_out: np.ndarray
    name: str
    digest: str = ""

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
        picks = sorted(
            {there[int(i)] for i in np.linspace(0, len(there) - 1, min(most, len(there)))}
        )
        return torch.from_numpy(
            np.stack([self.held_out[i * T : (i + 1) * T + 1].astype(np.int64) for i in picks])
        )


def load_corpus(
    paths: list[Path],
    tokenizer: Tokenizer,
    cache: Path,
    *,
    quiet: bool = False,
    without: Path | None = None,
    check: Callable[[Corpus], None] = lambda corpus: None,
) -> Corpus:
    """The corpus of `paths` (empty: default_text.py's), tokenised into `cache` unless it is
    there already.

    without: a folder to leave out of the scan, such as the run's own; the cache is left out too.
    check: called before anything is written, to refuse a text that is too short. Raises ValueError
    naming the file (and line) that is missing, empty, undecodable or malformed.
    """
    if os.path.realpath(cache) in [os.path.realpath(path) for path in paths]:
        raise ValueError(f"--cache {cache} is a folder of --data; name another")
    found = find_files(paths, [cache, *([without] if without else [])])
    key = hashlib.sha256(f"5 {tokenizer.digest} {tokenizer.bos_id} {tokenizer.eos_id}".encode())
    for name, file in found:
        key.update(os.fsencode(f"{name}\0{files.digest(file)}\n"))
    digest = key.hexdigest()[:20]
    what = ", ".join(map(str, paths)) if paths else default_text.NAME
    parts = token_cache.read(cache / digest)
    fresh = None if parts else _tokenise(found, tokenizer, quiet)
    corpus = Corpus(*(parts or fresh), what, digest)
    check(corpus)
    if fresh:
        token_cache.write(cache / digest, *fresh)
        parts = token_cache.read(cache / digest)
        assert parts, "a cache that was just written reads back"
        corpus = Corpus(*parts, what, digest)
    return corpus


def find_files(paths: list[Path], without: list[Path] = ()) -> list[tuple[str, Path]]:
    """(name, file) of every source, sorted by name, which is relative to the folder that was given.

    Raises ValueError for a path that does not exist or whose kind is not read, and where there is
    no text.
    """
    if not paths:
        return default_text.find_files()
    found: dict[str, Path] = {}
    for path in paths:
        files.refuse_lost_link(path)
        if not path.exists():
            raise ValueError(f"--data {path} does not exist")
        if path.is_dir():
            for file in _below(path, without):
                name = str(file.relative_to(path))
                found[name if name not in found else str(file)] = file
        elif not path.is_file():
            raise ValueError(
                f"--data {path} is no file or folder (a pipe cannot be read twice); save the text "
                "first"
            )
        elif not path.name.lower().endswith(KINDS):
            raise ValueError(f"--data {path}: unknown kind of file; use {', '.join(KINDS)}")
        else:
            found[path.name if path.name not in found else str(path)] = path
    if not found:
        raise ValueError(
            f"no text in {', '.join(map(str, paths))}: no file ends in {', '.join(KINDS)}"
        )
    return sorted(found.items())


def _below(path: Path, without: list[Path]) -> Iterator[Path]:
    """Every file of these kinds under a folder. Raises ValueError where a folder cannot be read."""

    def refuse(e: OSError) -> None:
        raise ValueError(f"cannot read {e.filename}: {e.strerror.lower()}")

    own = [os.path.realpath(folder) for folder in without]
    for here, folders, names in os.walk(path, onerror=refuse):
        folders[:] = sorted(f for f in folders if os.path.realpath(Path(here) / f) not in own)
        for name in sorted(names):
            file = Path(here) / name
            if name.lower().endswith(KINDS):
                files.refuse_lost_link(file)
                if file.is_file():
                    yield file


def documents(found: list[tuple[str, Path]]) -> Iterator[tuple[str, str | np.ndarray]]:
    """(name, text) of every document, or (name, ids [tokens], any integers) of a .npy stream.

    Raises ValueError naming a file that is damaged, not UTF-8 or not one row of ids.
    """
    for name, file in found:
        kind = file.name.lower()
        try:
            if kind.endswith(".npy"):
                ids = token_cache.load_ids(file)
                if ids.ndim != 1 or ids.dtype.kind not in "iu":
                    raise ValueError(
                        f"{file} must be one row of integer ids; it is {ids.dtype} "
                        f"{list(ids.shape)}"
                    )
                yield name, ids
            elif kind.endswith(".parquet"):
                yield from _table(name, file)
            elif kind.endswith(".csv"):
                yield from _csv(name, file)
            elif kind.endswith(LINES):
                yield from _lines(name, file)
            else:
                with _text(file) as f:
                    yield name, f.read()
        except UnicodeDecodeError as e:
            raise ValueError(
                f"{file} is not UTF-8 text ({e.reason} at byte {e.start}); convert or leave it out"
            ) from None
        except (gzip.BadGzipFile, EOFError, zlib.error) as e:
            raise ValueError(f"{file} is damaged: {e}") from None


def _text(file: Path):
    with files.reading(file):
        file.open("rb").close()  # permission, in a sentence
    return (
        gzip.open(file, "rt", encoding="utf-8")
        if file.suffix.lower() == ".gz"
        else file.open(encoding="utf-8")
    )


def _lines(name: str, file: Path) -> Iterator[tuple[str, str]]:
    for number, row in files.json_lines(file):
        text = row.get("text")
        if not isinstance(text, str):
            raise ValueError(f"{file}, line {number}: no string field `text`")
        if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
            raise ValueError(
                f"{file}, line {number}: half of a surrogate pair (half an emoji); mend the line"
            )
        yield f"{name}:{number}", text


def _csv(name: str, file: Path) -> Iterator[tuple[str, str]]:
    """The column `text` of a table whose first line names its columns."""
    csv.field_size_limit(1 << 30)  # characters: the module's own limit, 2^17, is shorter than books
    with files.reading(file), file.open(encoding="utf-8-sig", newline="") as f:
        rows = csv.DictReader(f, strict=True)
        try:
            for number, row in enumerate(rows, 1):
                if row.get("text") is None:
                    raise ValueError(f"{file}, line {rows.line_num}: no column `text`")
                yield f"{name}:{number}", row["text"]
        except csv.Error as e:
            raise ValueError(f"{file}, after line {rows.line_num}: {e}") from None


def _table(name: str, file: Path) -> Iterator[tuple[str, str]]:
    """The column `text` of a Parquet file, with pyarrow, row group by row group."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ValueError(
            f"{file} needs the package pyarrow: pip install pyarrow, or save it as .jsonl"
        ) from None
    try:
        table = parquet.ParquetFile(file)
        if "text" not in table.schema_arrow.names:
            raise ValueError(
                f"{file} has no column `text`; it has {', '.join(table.schema_arrow.names[:8])}"
            )
        row = 0
        for batch in table.iter_batches(columns=["text"], batch_size=_BATCH):
            for text in batch.column(0).to_pylist():
                row += 1
                if not isinstance(text, str):
                    raise ValueError(
                        f"{file}, row {row}: the column `text` holds {type(text).__name__}"
                    )
                yield f"{name}:{row}", text
    except pyarrow.ArrowException as e:
        raise ValueError(f"{file} is not readable Parquet: {e}") from None


def _tokenise(
    found: list[tuple[str, Path]], tokenizer: Tokenizer, quiet: bool
) -> tuple[np.ndarray, np.ndarray]:
    """(train, held out)."""
    kept: list[tuple[str, np.ndarray]] = []
    waiting: list[tuple[str, str]] = []
    dtype = np.uint16 if tokenizer.size <= 1 << 16 else np.uint32

    def flush() -> None:
        each = tokenizer.encode_documents([text for _, text in waiting])
        for (name, _), ids in zip(waiting, each, strict=True):
            kept.append((name, np.asarray(ids, dtype=dtype)))
        waiting.clear()

    bar = tqdm(documents(found), desc="tokenising", unit=" documents", disable=quiet or None)
    for name, text in bar:
        if isinstance(text, np.ndarray):
            low, high = (int(text.min()), int(text.max())) if text.size else (0, 0)
            if low < 0 or high >= tokenizer.size:
                bad = low if low < 0 else high
                raise ValueError(f"{name} holds the id {bad}; the vocabulary has {tokenizer.size}")
            kept.append((name, text.astype(dtype)))
        elif text.strip():
            waiting.append((name, text))
            if len(waiting) == _BATCH:
                flush()
    flush()
    if not kept:
        raise ValueError(f"{', '.join(str(f) for _, f in found[:3])}: the text is empty")
    return split(kept)


def split(kept: list[tuple[str, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """(training ids [tokens], held-out ids [tokens]) of (name, ids [tokens]) documents.

    One document in HELD_OUT_ONE_IN is held out, by its name alone; where that comes to less than a
    hundredth of the text or to half of it, the last part of the stream instead.
    """
    out = [zlib.crc32(os.fsencode(name)) % HELD_OUT_ONE_IN == 0 for name, _ in kept]
    whole = sum(len(ids) for _, ids in kept)
    held = sum(len(ids) for (_, ids), o in zip(kept, out, strict=True) if o)
    if max(1, whole // 100) <= held < whole // 2:
        pick = lambda want: [ids for (_, ids), o in zip(kept, out, strict=True) if o == want]  # noqa: E731
        return np.concatenate(pick(False)), np.concatenate(pick(True))
    stream = np.concatenate([ids for _, ids in kept])
    cut = len(stream) - max(1, len(stream) // HELD_OUT_ONE_IN)
    return stream[:cut], stream[cut:]
