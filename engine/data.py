"""Text to tokens to blocks, in an order that depends on the seed and the step alone.

    files and folders -> documents -> ids, end token after each -> one long stream on disk -> blocks of T

Sources.  Any mix of files and folders of .txt, .md, .py (a document each), .jsonl and .jsonl.gz (a document a line, its
field `text`) and .npy (one stream of ids, already tokenised). Without any: the sources of the Python standard library
on this machine (tests and site-packages left out), about 10 MB of real text that needs no network.

Tokenised once.  The stream is written as a numpy file under a name that is a hash of the tokenizer and of every file's
path, size and time, and is mapped, not read, from then on.

Held out.  One document in 20, by a hash of its name, never trains; so the same standard-library module is held out
under every Python version. Where that gives less than 1 % of the tokens (few, long documents) the last 5 % of the
stream are held out instead.

Order.  The training stream has n = (tokens - 1) // T blocks. Epoch e visits them in a permutation drawn from (seed, e);
the k-th block of a run is thus a function of (seed, k), whatever the number of processes, and a resumed run needs only
k.

Limits.  Documents run on across block borders, and attention sees across them, as in most pre-training.
"""

import gzip
import hashlib
import json
import os
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from hub.tokenizer import Tokenizer

TEXT, LINES = (".txt", ".md", ".py"), (".jsonl", ".jsonl.gz")
HELD_OUT_ONE_IN = 20
_BATCH = 256  # documents tokenised at a time


@dataclass(frozen=True)
class Corpus:
    """Two streams of ids: `train` and `held_out`, 1-D, mapped from disk; `name` says what they are made of."""

    train: np.ndarray
    held_out: np.ndarray
    name: str

    def batch(self, seed: int, first: int, count: int, T: int) -> Tensor:
        """The blocks number first .. first+count-1 of a run: [count, T + 1] int64, the last column the last target."""
        n = self.blocks(T)
        rows = []
        for k in range(first, first + count):
            order = np.random.Generator(np.random.Philox(key=[seed, k // n])).permutation(n)
            start = int(order[k % n]) * T
            rows.append(np.asarray(self.train[start : start + T + 1], dtype=np.int64))
        return torch.from_numpy(np.stack(rows))

    def blocks(self, T: int) -> int:
        n = (len(self.train) - 1) // T
        if n < 1:
            raise ValueError(
                f"a block of {T} tokens is longer than all the text ({len(self.train)} tokens); add --data"
            )
        return n

    def held_out_blocks(self, T: int, most: int) -> Tensor:
        """Up to `most` blocks [n, T + 1] spread evenly over the held-out stream."""
        n = (len(self.held_out) - 1) // T
        if n < 1:
            raise ValueError(
                f"the held-out text has {len(self.held_out)} tokens, less than one block of {T}; add --data"
            )
        picks = sorted({int(i) for i in np.linspace(0, n - 1, min(most, n))})
        return torch.from_numpy(
            np.stack([self.held_out[i * T : (i + 1) * T + 1].astype(np.int64) for i in picks])
        )


def standard_library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def load_corpus(
    paths: list[Path], tokenizer: Tokenizer, cache: Path, quiet: bool = False
) -> Corpus:
    """The corpus of `paths` (empty: the standard library), tokenised into `cache` unless it is there already.

    Raises ValueError naming the file (and line) that is missing, empty, undecodable or malformed.
    """
    files = find_files(paths)
    key = hashlib.sha256(f"4 {tokenizer.digest} {tokenizer.bos_id} {tokenizer.eos_id}".encode())
    for name, file in files:
        stat = file.stat()
        key.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    folder = cache / key.hexdigest()[:20]
    if not (folder / "held_out.npy").is_file():
        _tokenise(files, tokenizer, folder, quiet)
    train, held_out = (
        np.load(folder / f"{part}.npy", mmap_mode="r") for part in ("train", "held_out")
    )
    what = (
        ", ".join(str(p) for p in paths)
        if paths
        else f"the standard library in {standard_library()}"
    )
    return Corpus(train, held_out, what)


def find_files(paths: list[Path]) -> list[tuple[str, Path]]:
    """(name, file) of every source, sorted by name; names are relative to the folder that was given."""
    found: dict[str, Path] = {}
    for path in paths or [standard_library()]:
        if path.is_file():
            if not path.name.endswith((*TEXT, *LINES, ".npy")):
                raise ValueError(
                    f"--data {path}: unknown kind of file; use {', '.join((*TEXT, *LINES))} or .npy"
                )
            found[path.name if path.name not in found else str(path)] = path
        elif path.is_dir():
            kinds = (".py",) if not paths else (*TEXT, *LINES, ".npy")
            for file in sorted(path.rglob("*")):
                name = file.relative_to(path)
                if not paths and {
                    "site-packages",
                    "dist-packages",
                    "test",
                    "tests",
                    "__pycache__",
                } & set(name.parts):
                    continue
                if file.name.endswith(kinds) and file.is_file():
                    found[str(name) if str(name) not in found else str(file)] = file
        else:
            raise ValueError(f"--data {path} does not exist")
    if not found:
        raise ValueError(
            f"no text in {', '.join(map(str, paths))}: no file ends in {', '.join((*TEXT, *LINES))} or .npy"
        )
    return sorted(found.items())


def documents(files: list[tuple[str, Path]]) -> Iterator[tuple[str, str | np.ndarray]]:
    """(name, text) of every document, or (name, ids) for a .npy stream."""
    for name, file in files:
        try:
            if file.suffix == ".npy":
                ids = _load_ids(file)
                if ids.ndim != 1 or ids.dtype.kind not in "iu":
                    raise ValueError(
                        f"{file} must be one row of integer ids; it is {ids.dtype} {list(ids.shape)}"
                    )
                yield name, ids
            elif file.name.endswith(LINES):
                yield from _lines(name, file)
            else:
                yield name, file.read_text(encoding="utf-8")
        except UnicodeDecodeError as e:
            raise ValueError(
                f"{file} is not UTF-8 text ({e.reason} at byte {e.start}); convert or leave it out"
            ) from None


def _load_ids(file: Path) -> np.ndarray:
    try:
        return np.load(file, mmap_mode="r", allow_pickle=False)
    except (EOFError, ValueError) as e:
        raise ValueError(f"{file} is not a plain numpy array: {e}") from None


def _lines(name: str, file: Path) -> Iterator[tuple[str, str]]:
    opened = (
        gzip.open(file, "rt", encoding="utf-8")
        if file.suffix == ".gz"
        else file.open(encoding="utf-8")
    )
    with opened as f:
        try:
            for number, line in enumerate(f, 1):
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                    raise ValueError(f"{file}, line {number}: no string field `text`")
                yield f"{name}:{number}", row["text"]
        except json.JSONDecodeError as e:
            raise ValueError(f"{file}, line {number}: not JSON ({e.msg})") from None
        except (gzip.BadGzipFile, EOFError, zlib.error) as e:
            raise ValueError(f"{file} is damaged: {e}") from None


def _tokenise(
    files: list[tuple[str, Path]], tokenizer: Tokenizer, folder: Path, quiet: bool
) -> None:
    kept: list[tuple[str, np.ndarray]] = []
    waiting: list[tuple[str, str]] = []
    dtype = np.uint16 if tokenizer.size <= 1 << 16 else np.uint32

    def flush() -> None:
        for (name, _), ids in zip(
            waiting, tokenizer.encode_documents([t for _, t in waiting]), strict=True
        ):
            kept.append((name, np.asarray(ids, dtype=dtype)))
        waiting.clear()

    for name, text in tqdm(
        documents(files), desc="tokenising", unit=" documents", disable=quiet or None
    ):
        if isinstance(text, np.ndarray):
            if text.size and (int(text.min()) < 0 or int(text.max()) >= tokenizer.size):
                bad = int(text.min()) if int(text.min()) < 0 else int(text.max())
                raise ValueError(f"{name} holds the id {bad}; the vocabulary has {tokenizer.size}")
            kept.append((name, text.astype(dtype)))
        elif text.strip():
            waiting.append((name, text))
            if len(waiting) == _BATCH:
                flush()
    flush()
    if not kept:
        raise ValueError(f"{', '.join(str(f) for _, f in files[:3])}: the text is empty")
    train, held_out = split(kept)
    folder.mkdir(parents=True, exist_ok=True)
    for part, ids in (
        ("train", train),
        ("held_out", held_out),
    ):  # held_out last: its presence says "complete"
        work = folder / f".{part}.{os.getpid()}.npy"
        np.save(work, ids)
        work.replace(folder / f"{part}.npy")


def split(kept: list[tuple[str, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    out = [zlib.crc32(name.encode()) % HELD_OUT_ONE_IN == 0 for name, _ in kept]
    whole = sum(len(ids) for _, ids in kept)
    held = sum(len(ids) for (_, ids), o in zip(kept, out, strict=True) if o)
    if max(1, whole // 100) <= held < whole // 2:
        pick = lambda want: [ids for (_, ids), o in zip(kept, out, strict=True) if o == want]  # noqa: E731
        return np.concatenate(pick(False)), np.concatenate(pick(True))
    stream = np.concatenate([ids for _, ids in kept])
    cut = len(stream) - max(1, len(stream) // HELD_OUT_ONE_IN)
    return stream[:cut], stream[cut:]
