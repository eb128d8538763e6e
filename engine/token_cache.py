"""Tokenised text on disk: two numpy files, mapped and not read, and a checksum of each.

What.  A folder, whose name data.py makes of the contents of text and tokenizer, holds train.npy,
held_out.npy and sums.json, which has their checksums and the notes about the text and is written
last: a folder without it is incomplete. One whose numbers do not agree is written anew, so that
damage never reaches a run.

Writing.  Each file is written under another name, synced and renamed. Where the disk is full, or
the run is stopped, what is not complete is taken away, with the folders that were made for it.

Limits.  The checksums are of accidents: whoever may write here may change the text.
"""

import contextlib
import errno
import json
import os
import shutil
import zipfile
import zlib
from pathlib import Path
from tokenize import TokenError

import numpy as np

from hub import files

STREAMS = ("train", "held_out")
# What numpy raises for a file that is not an array of its own
_NUMPY = (EOFError, ValueError, OverflowError, TokenError, SyntaxError, zipfile.BadZipFile)


def read(folder: Path) -> tuple[np.ndarray, np.ndarray, list[str]] | None:
    """The streams of a cache, each [tokens], mapped, and the notes about the text.

    None where it is not as it was written.
    """
    try:
        streams = [load_ids(folder / f"{name}.npy") for name in STREAMS]
        sums = files.parse_json((folder / "sums.json").read_bytes(), "sums.json")
        notes = sums["said"]
        whole = all(ids.ndim == 1 for ids in streams) and sums == _sums(streams, notes)
        return (*streams, notes) if whole else None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # made again


def _sums(streams: list[np.ndarray], notes: list[str]) -> dict:
    """sums.json: the notes and every checksum."""
    sums = {name: zlib.crc32(ids) for name, ids in zip(STREAMS, streams, strict=True)}
    return sums | {"words": zlib.crc32(json.dumps(notes).encode()), "said": notes}


def write(folder: Path, train: np.ndarray, held_out: np.ndarray, notes: list[str] = ()) -> None:
    """Writes the streams, each [tokens]; nothing is left behind unless both could be."""
    made = [p for p in (folder, *folder.absolute().parents) if not p.exists()]
    with contextlib.ExitStack() as undo:
        for path in reversed(made[1:]):
            undo.callback(_remove_if_empty, path)
        if made:
            undo.callback(shutil.rmtree, folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        for name, ids in zip(STREAMS, (train, held_out), strict=True):
            _write_ids(folder / f"{name}.npy", ids)
        with files.replacing(folder / "sums.json") as f:
            f.write(json.dumps(_sums([train, held_out], list(notes))).encode())
        undo.pop_all()


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def _write_ids(file: Path, ids: np.ndarray) -> None:
    try:
        with files.replacing(file) as f:
            np.save(f, ids)
    except OSError as e:  # of a full disk numpy says "93729 requested and 1984 written"
        if e.errno:
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from None


def load_ids(file: Path) -> np.ndarray:
    """An array of any shape, mapped. Raises ValueError naming a file that is not one."""
    try:
        ids = np.load(file, mmap_mode="r", allow_pickle=False)
    except (*_NUMPY, OSError) as e:
        raise ValueError(f"{file} is not a plain numpy array: {e}") from None
    if not isinstance(ids, np.ndarray):
        raise ValueError(f"{file} is not a plain numpy array: it is an archive of several")
    return ids
