"""Files as this program reads and writes them: JSON distrusted, writes atomic, disk errors in a
sentence.

What.  `read_json` takes one JSON object and refuses what is huge, deep, doubled or not JSON.
`file_of` names a file of a model's directory, and refuses links that lead out of it. `replacing`
and `atomic_directory` write under another name, sync and rename: a kill at any moment leaves the
old state or the new. `disk_sentences` turns a full, read-only or failing disk into one sentence
that says what is still intact.

Temporary names are unpredictable and made exclusively, so that no link that someone planted under
such a name is ever followed, and nothing is ever removed because its name looks like ours.

Limits.  Renames are atomic within one file system; a network file system may promise less. A kill
while a directory is written leaves a hidden neighbour of a name of its own, which nobody removes.

Source.  POSIX rename(2) and fsync(2).
"""

import contextlib
import errno
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import SafetensorError

MAX_JSON = 128 << 20  # bytes; the longest real header seen, of a 405B model, is under 1 MiB
DAMAGED = (gzip.BadGzipFile, EOFError, zlib.error)  # what reading a packed file may raise
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES)


@contextlib.contextmanager
def reading(path: Path):
    """Turns whatever the system says against reading `path` into a ValueError of one sentence."""
    try:
        yield
    except OSError as e:
        reason = os.strerror(e.errno).lower() if e.errno else str(e)
        raise ValueError(f"cannot read {path}: {reason}") from None


def digest(file: Path) -> str:
    """sha256 of a file's contents, in hexadecimal."""
    with reading(file), file.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def read_json(path: Path) -> dict:
    """A JSON object from a file. Raises ValueError in one sentence for all that can be wrong."""
    with reading(path):
        if not path.is_file():
            holds = "; a model directory holds config.json, safetensors and a tokenizer"
            raise ValueError(f"{path} does not exist{holds * (path.name == 'config.json')}")
        size = path.stat().st_size
        if size > MAX_JSON:
            raise ValueError(f"{path} has {size:,} bytes; no {path.name} is that large")
        refuse_pointer(path)
        return parse_json(path.read_bytes(), str(path))


def file_of(path: Path, name: str, inside: str = "") -> Path:
    """The file `name` of the directory `path`, or of its folder `inside`, links resolved.

    Raises ValueError where they lead out of it, to nothing or in a circle. A directory of the Hub's
    cache links snapshots/<revision>/x to blobs/<hash>: those are its own. A file that does not
    exist is returned as it would be.
    """
    if Path(name).name != name or "\0" in name:
        raise ValueError(f"{name!r} does not name a file of {path}")
    here, file = _end_of_links(path), _end_of_links(path / inside / name)
    allowed = [here / inside]
    if here.parent.name == "snapshots":
        allowed.append(here.parent.parent / "blobs")
    if file.parent not in allowed:
        raise ValueError(
            f"{path / inside / name} is a link to {file}, outside the model's directory; copy the "
            "file there"
        )
    return file


def _end_of_links(path: Path) -> Path:
    """`path`, links resolved. Raises ValueError where they lead to nothing or in a circle."""
    refuse_lost_link(path)
    return Path(os.path.realpath(path))  # Path.resolve raises for some circles until Python 3.12


def refuse_lost_link(path: Path) -> None:
    """Raises ValueError where `path` is a link to nothing or in a circle.

    is_file() says only that there is no file: the link would be taken as one that is absent.
    """
    if os.path.islink(path) and not os.path.exists(path):
        raise ValueError(f"{path} is a link that leads nowhere; copy the file there")


def json_of(path: Path, name: str) -> dict:
    """The JSON object in a file of the directory `path`; {} where it is not there."""
    file = file_of(path, name)
    return read_json(file) if file.is_file() else {}


def parse_json(data: bytes, name: str) -> dict:
    """A JSON object from bytes. Raises ValueError in one sentence that begins with `name`."""

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
    """Yields a temporary neighbour of `path` to write into; on success it is synced and takes the
    name `path`, and what had that name is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    replaced = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield work
        put_directory(work, path, replaced)
    finally:
        shutil.rmtree(work, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


def put_directory(work: Path, path: Path, replaced: Path) -> None:
    """The folder `work`, of the same file system, is synced and takes the name `path`; what had
    that name, if anything, goes into the folder `replaced`.
    """
    sync_tree(work)
    work.chmod(0o777 & ~umask())
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() or path.is_symlink():
        path.rename(replaced / "old")  # a link is moved, not what it leads to
    work.rename(path)
    sync_directory(path.parent)


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
            sync_file(file)


def sync_file(file: Path) -> None:
    with file.open("rb") as f:
        os.fsync(f.fileno())


def write_at(fd: int, data: memoryview, at: int) -> None:
    """All bytes of `data`, from byte `at` of the file on; threads may write side by side."""
    while data:
        n = os.pwrite(fd, data, at)
        data, at = data[n:], at + n


def sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


@contextlib.contextmanager
def replacing(path: Path, work: Path | None = None):
    """Yields a file to write bytes to, which then takes the name `path`, whole and synced.

    work: the folder that it is written in, on the same file system (None: the file's own).
    """
    fd, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=work or path.parent)
    try:
        with open(fd, "wb") as f:
            yield f
            f.flush()
            os.fchmod(f.fileno(), readable())
            os.fsync(f.fileno())
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def refuse_pointer(file: Path) -> None:
    """Raises ValueError where git-lfs left a pointer in the place of the file."""
    with reading(file), file.open("rb") as f:
        if f.read(40).startswith(b"version https://git-lfs.github.com/spec"):
            raise ValueError(
                f"{file} is a pointer of git-lfs, not the file itself: run `git lfs pull` where it "
                "was cloned, or download it"
            )


def _zstandard(file: Path):
    """The package that reads `file`. Raises ValueError where it is not installed."""
    try:
        import zstandard
    except ImportError:
        raise ValueError(
            f"{file} needs the package zstandard: pip install zstandard, or unpack it"
        ) from None
    return zstandard


class _Zstd(io.RawIOBase):
    """A .zst file unpacked, frame by frame. Reading it raises EOFError where it is damaged or cut.

    The package's own reader takes a frame that is cut short for a whole one.
    """

    def __init__(self, library, packed_file: io.BufferedReader):
        self.library, self.packed_file = library, packed_file
        self.packed, self.unpacked, self.frame = b"", b"", None

    def readable(self) -> bool:
        return True

    def readinto(self, room) -> int:
        while not self.unpacked:
            self.packed = self.packed or self.packed_file.read(1 << 16)
            if not self.packed and self.frame:
                raise EOFError("it ends in the middle of a frame")
            if not self.packed:
                return 0
            frame = self.frame or self.library.ZstdDecompressor().decompressobj()
            try:
                self.unpacked = frame.decompress(self.packed)
            except self.library.ZstdError as e:
                raise EOFError(str(e)) from None
            self.packed, self.frame = (frame.unused_data, None) if frame.eof else (b"", frame)
        n = min(len(room), len(self.unpacked))
        room[:n], self.unpacked = self.unpacked[:n], self.unpacked[n:]
        return n

    def close(self) -> None:
        self.packed_file.close()
        super().close()


def open_text(file: Path, newline: str | None = None) -> io.TextIOBase:
    """A UTF-8 text file, plain, .gz or .zst, open for reading, without a byte order mark.

    Reading it raises UnicodeDecodeError, or one of DAMAGED.
    """
    refuse_pointer(file)
    given = {"encoding": "utf-8-sig", "newline": newline}
    packed = file.suffix.lower()
    if packed == ".gz":
        return gzip.open(file, "rt", **given)
    if packed == ".zst":
        # Before the reader exists: Python 3.13 prints a traceback for one that was never opened
        library, packed_file = _zstandard(file), file.open("rb")
        return io.TextIOWrapper(io.BufferedReader(_Zstd(library, packed_file)), **given)
    return file.open(**given)


def json_lines(file: Path, row: str = "") -> Iterator[tuple[int, dict]]:
    """(line number, object) of every line that is not blank of a .jsonl file, plain or packed.

    row: what a line is called where it is refused, such as "task row". A byte order mark is
    skipped.
    Raises ValueError naming the line that is no JSON object, or what is wrong with the file.
    """
    wrong, it = (f"not a {row}, ", f"not a {row}, it is ") if row else ("", "")
    with open_text(file) as f:
        try:
            for number, line in enumerate(f, 1):
                if not line.strip():
                    continue
                where = f"{file}, line {number}"
                try:
                    value = json.loads(line)
                except RecursionError:
                    raise ValueError(f"{where}: {it}nested too deeply to be real") from None
                except json.JSONDecodeError as e:
                    no = f"{it}no" if row else "not"
                    raise ValueError(f"{where}: {no} JSON ({e.msg})") from None
                except ValueError as e:  # an integer of more digits than Python reads
                    raise ValueError(f"{where}: {wrong}{str(e).split(';')[0]}") from None
                if not isinstance(value, dict):
                    raise ValueError(f"{where}: {it or 'it is '}no JSON object")
                yield number, value
        except UnicodeDecodeError as e:
            raise ValueError(f"{file} is not UTF-8 text ({e.reason}); convert it") from None
        except DAMAGED as e:
            raise ValueError(f"{file} is damaged: {e}; get it again") from None


@contextlib.contextmanager
def disk_sentences(folder: Path, promise: Callable[[], str] = str):
    """A full, read-only or failing disk becomes a ValueError of one sentence and what `promise`,
    asked only then, returns.

    An error that names a file outside `folder` is of reading, and left as it is.
    """
    try:
        yield
    except SafetensorError as e:
        code = re.search(r"os error (\d+)", str(e))  # how safetensors' writer says it
        if not code:
            raise
        raise ValueError(disk_sentence(OSError(int(code[1]), str(e)), folder) + promise()) from None
    except OSError as e:
        name = e.filename2 or e.filename  # a copy names what it reads, then what it writes
        if e.errno not in _DISK or not _within(name, folder):
            raise
        raise ValueError(disk_sentence(e, folder) + promise()) from None


def _within(name, folder: Path) -> bool:
    """Whether an error's file lies in `folder`, or is not named; tempfile's names are absolute."""
    here = folder.absolute()
    return not isinstance(name, str) or Path(name).absolute().is_relative_to(here)


def disk_sentence(e: OSError, folder: Path) -> str:
    sentence = f"cannot write to {folder}: {os.strerror(e.errno or errno.EIO).lower()}"
    if e.errno in (errno.EACCES, errno.EROFS):
        return sentence
    there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    return f"{sentence} ({shutil.disk_usage(there).free / 2**20:.0f} MiB free)"
