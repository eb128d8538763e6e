"""Files as this program reads and writes them: JSON distrusted, writes atomic, disk errors in a sentence.

What.  `read_json` takes one JSON object and refuses what is huge, deep, doubled or not JSON. `write_atomic` and
`atomic_directory` write beside the name, sync and rename: a kill at any moment leaves the old state or the new.
`disk_sentences` turns a full, read-only or failing disk into one sentence that says what is still intact.

Limits.  Renames are atomic within one file system; a network file system may promise less.

Source.  POSIX rename(2) and fsync(2).
"""

import contextlib
import errno
import json
import os
import re
import shutil
from pathlib import Path

from safetensors import SafetensorError

MAX_JSON = 128 << 20  # bytes; the longest real header seen, of a 405B model, is under 1 MiB
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES)


def read_json(path: Path) -> dict:
    """A JSON object from a file. Raises ValueError in one sentence for everything that can be wrong with it."""
    if not path.is_file():
        raise ValueError(
            f"{path} does not exist; a model directory holds config.json, safetensors and a tokenizer"
        )
    if path.stat().st_size > MAX_JSON:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes; no {path.name} is that large")
    return parse_json(path.read_bytes(), str(path))


def parse_json(data: bytes, name: str) -> dict:
    def once(pairs: list) -> dict:  # json would silently keep the last of two equal keys
        out = dict(pairs)
        if len(out) != len(pairs):
            raise ValueError("a key stands twice in one object")
        return out

    try:
        value = json.loads(data, object_pairs_hook=once)
    except RecursionError:
        raise ValueError(f"{name} is nested too deeply to be real") from None
    except ValueError as e:  # includes JSONDecodeError and UnicodeDecodeError
        raise ValueError(f"{name} is not valid JSON: {e}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{name} must hold a JSON object, not {type(value).__name__}")
    return value


@contextlib.contextmanager
def atomic_directory(path: Path):
    """Yields a temporary neighbour of `path` to write into; on success it is synced and takes the name `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    work, old = path.with_name(f".{path.name}.writing"), path.with_name(f".{path.name}.old")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        yield work
        sync_tree(work)
        shutil.rmtree(old, ignore_errors=True)
        if path.exists():
            path.rename(old)
        work.rename(path)
        sync_directory(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def resolve(name: str) -> Path:
    """The directory that --teacher or --model names."""
    return Path(name)


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def readable() -> int:
    """The mode of an ordinary new file: safetensors and tempfile write for their owner alone."""
    return 0o666 & ~umask()


def sync_tree(folder: Path) -> None:
    """Every file below, readable and on disk."""
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            file.chmod(readable())
            with file.open("rb") as f:
                os.fsync(f.fileno())


def sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def write_atomic(path: Path, data: str | bytes) -> None:
    """One file, written beside its name, synced and renamed."""
    work = path.with_name(f".{path.name}.writing")
    work.write_bytes(data.encode() if isinstance(data, str) else data)
    with work.open("rb") as f:
        os.fsync(f.fileno())
    work.replace(path)


@contextlib.contextmanager
def disk_sentences(folder: Path):
    """Turns a full, read-only or failing disk into a ValueError of one sentence."""
    try:
        yield
    except SafetensorError as e:
        code = re.search(r"os error (\d+)", str(e))  # how safetensors' writer says it
        if not code:
            raise
        raise ValueError(disk_sentence(OSError(int(code[1]), str(e)), folder)) from None
    except OSError as e:
        if e.errno not in _DISK:
            raise
        raise ValueError(disk_sentence(e, folder)) from None


def disk_sentence(e: OSError, folder: Path) -> str:
    there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(there).free / 2**20
    return (
        f"cannot write to {folder}: {os.strerror(e.errno or errno.EIO)} ({free:.0f} MiB free); earlier states are "
        "intact, --resume goes on from the last one"
    )
