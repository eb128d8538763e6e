"""The folder of a result: owned by one run, used by one process at a time, and never anyone else's.

What.  A result's folder carries a mark, `.linear-ard.json`, that lists every file this program
wrote there. A folder is taken only if it is new, empty, or marked with nothing beside what the mark
lists; so whatever is replaced or removed later is on the list. A file is put on the list before it
appears: a kill between the two leaves a name without a file, never a file without a name.

One at a time.  `.linear-ard.lock` is held by an advisory lock (flock) for as long as the process
lives; the kernel drops it when the process ends, however it ends. The file says who holds it.

Refused means unchanged.  Until something worth keeping is written there is no mark, and leaving
removes the lock and the folders that taking it made.

Temporary files live in `.linear-ard.work/`, with unpredictable names, and are renamed into place
when they are whole and synced. These three names are nobody else's: a user's own `.lock` or `.work`
is a file like any other.

Limits.  flock and rename promise what the file system does: some network file systems have neither
between machines.

Source.  flock(2), rename(2).
"""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import tempfile
import threading
from pathlib import Path

from hub import files

MARK, LOCK, WORK = ".linear-ard.json", ".linear-ard.lock", ".linear-ard.work"
OURS = (MARK, LOCK, WORK)


def read_mark(path: Path) -> dict | None:
    """{"program", "files"} of a folder that this program made, or None.

    Raises ValueError for a list that is not one.
    """
    file = path / MARK
    if not file.is_file():
        return None
    mark = files.read_json(file)
    listed = mark.get("files")
    if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
        raise ValueError(f"{file} is not this program's list of files; name another folder")
    return mark


def strangers(path: Path, listed: set[str]):
    """Yields what stands in the folder and not on the list: files, links, and anything else but
    plain folders.

    A name on the list that ends in "/" owns all below it.
    """
    for entry in sorted(os.scandir(path), key=lambda e: e.name):
        if entry.name not in OURS or entry.is_symlink():
            yield from _strangers(entry, entry.name, listed)


def _strangers(entry: os.DirEntry, name: str, listed: set[str]):
    if name in listed or (f"{name}/" in listed and not entry.is_symlink()):
        return
    if entry.is_dir(follow_symlinks=False):
        for inner in sorted(os.scandir(entry.path), key=lambda e: e.name):
            yield from _strangers(inner, f"{name}/{inner.name}", listed)
    else:
        yield name


def check(
    path: Path, flag: str, program: str, *, resume: bool | None, apart: dict[str, Path]
) -> None:
    """Raises ValueError for a folder that is not this program's to write in. Reads only.

    resume: True, go on with the run that is there; False, there must be none; None, replace it.
    apart: {flag: path} of what must not lie in the folder: the teacher, the data.
    """
    try:
        str(path.absolute()).encode()
    except UnicodeEncodeError:  # safetensors writes to no such place
        raise ValueError(f"{flag} {path.absolute()} is not UTF-8; name a folder that is") from None
    place = next(p for p in (path, *path.absolute().parents) if p.exists() or p.is_symlink())
    if not place.is_dir():
        raise ValueError(f"{flag} {path}: {place} is a file; name a folder")
    if place != path and not os.access(place, os.W_OK):
        raise ValueError(f"{flag} {path}: cannot make a folder in {place}: permission denied")
    for other, where in apart.items():
        if where.exists() and path.resolve() in (where.resolve(), *where.resolve().parents):
            raise ValueError(f"{flag} {path} holds {other} {where}; name a folder apart from it")
    if not path.is_dir():
        if resume:
            raise ValueError(f"{flag} {path} does not exist: there is no run to go on with; "
                             "check the name, or leave --resume out")  # fmt: skip
        return
    _refuse_if_held(path / LOCK)
    mark = read_mark(path)
    if first := next(strangers(path, set(mark["files"]) if mark else set()), None):
        raise ValueError(f"{flag} {path} holds {first}, which this program did not write; name a "
                         "new folder")  # fmt: skip
    if mark and mark.get("program") != program:
        raise ValueError(f"{flag} {path} holds the result of {mark.get('program')}; name another")
    if mark and resume is False:
        raise ValueError(f"{flag} {path} holds another run; add --resume to go on with it, or name "
                         "another folder")  # fmt: skip
    if resume and not mark:
        raise ValueError(f"{flag} {path} holds no run to go on with; check the name, or leave "
                         "--resume out")  # fmt: skip


def refuse_strangers(path: Path, listed: set[str]) -> None:
    """Raises ValueError naming the first thing in the folder that is not on the list."""
    if first := next(strangers(path, listed), None):
        raise ValueError(
            f"{path} holds {first}, which this program did not write; move it elsewhere"
        )


def clear(path: Path) -> None:
    """Takes away an earlier result of this program's.

    Raises ValueError where anything else stands in it, or where a run is at work in it.
    """
    if not path.is_dir():
        return
    mark = read_mark(path)
    refuse_strangers(path, set(mark["files"]) if mark else set())
    lock = _take(path / LOCK)
    shutil.rmtree(path)
    os.close(lock)


class Folder:
    """The lock and the mark of a result's folder; `active` False: a rank that does not write."""

    def __init__(self, path: Path, program: str, active: bool = True):
        self.path, self.program, self.active = path, program, active
        self.listed: set[str] = set()
        self.made: list[Path] = []  # folders that did not exist, deepest first
        self.lock = None

    def __enter__(self) -> "Folder":
        """Takes the lock. Raises ValueError saying who holds it."""
        if not self.active:
            return self
        self.made = [p for p in (self.path, *self.path.absolute().parents) if not p.exists()]
        try:
            with files.disk_sentences(self.path):
                self.path.mkdir(parents=True, exist_ok=True)
                self.lock = _take(self.path / LOCK)
        except ValueError:
            with contextlib.suppress(OSError):
                for folder in self.made:
                    folder.rmdir()  # only where it is empty
            raise
        mark = read_mark(self.path)
        self.listed = set(mark["files"]) if mark else set()
        if self.listed and (self.path / WORK).is_dir():
            shutil.rmtree(self.path / WORK)  # what a kill left half-written
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.close()
        if isinstance(error, OSError):  # a write that nobody else put in a sentence
            with files.disk_sentences(self.path):
                raise error

    def close(self) -> None:
        """Lets go of the folder; where nothing on the list was written, it is as it was."""
        if not self.active or self.lock is None:
            return
        shutil.rmtree(self.path / WORK, ignore_errors=True)
        with contextlib.suppress(OSError):
            if not any((self.path / name).exists() for name in self.listed):
                (self.path / MARK).unlink(missing_ok=True)
                (self.path / LOCK).unlink()
                for folder in self.made:
                    folder.rmdir()  # only where it is empty
        os.close(self.lock)
        self.lock = None

    def add(self, *names: str) -> None:
        """Puts names on the list, on disk, before the files appear."""
        new = set(names) - self.listed
        if new and self.active:
            self.listed |= new
            self._write_mark()

    def owned(self, path: Path) -> list[str]:
        """The name that puts all of `path` on the list, where it lies in this folder."""
        try:
            return [f"{path.absolute().relative_to(self.path.absolute())}/"]
        except ValueError:
            return []

    def _write_mark(self) -> None:
        body = {"program": self.program, "files": sorted(self.listed)}
        self._replace(MARK, json.dumps(body, indent=1) + "\n")

    def write(self, name: str, data: str | bytes) -> None:
        """One file, whole or not at all."""
        self.add(name)
        self._replace(name, data)

    def _replace(self, name: str, data: str | bytes) -> None:
        (self.path / name).parent.mkdir(parents=True, exist_ok=True)
        with files.replacing(self.path / name, self.work()) as f:
            f.write(data.encode() if isinstance(data, str) else data)

    def work(self) -> Path:
        """The place of temporary files."""
        (self.path / WORK).mkdir(exist_ok=True)
        return self.path / WORK

    def room(self) -> Path:
        """An empty folder to fill, which `publish` gives a name."""
        return Path(tempfile.mkdtemp(dir=self.work()))

    @contextlib.contextmanager
    def directory(self, name: str):
        """Yields an empty folder to fill; on success it becomes `name`, which it replaces."""
        work = self.room()
        yield work
        self.publish(work, name)

    def publish(self, work: Path, name: str) -> None:
        """A folder that `room` made is synced and becomes `name`, which it replaces.

        Raises ValueError where `name` holds a file that is not on the list.
        """
        target = self.path / name
        if target.exists():
            refuse_strangers(target, self._inside(name))
        self.add(*(f"{name}/{f.relative_to(work)}" for f in work.rglob("*") if f.is_file()))
        files.put_directory(work, target, replaced := self.room())
        self._drop(replaced)

    def _inside(self, name: str) -> set[str]:
        """What the list has below `name`."""
        return {n.removeprefix(f"{name}/") for n in self.listed if n.startswith(f"{name}/")}

    def remove(self, name: str) -> None:
        """Takes a folder away that holds nothing but what is on the list."""
        target = self.path / name
        inside = self._inside(name)
        if next(strangers(target, inside), None) is None:
            target.rename((removed := self.room()) / "old")
            self._drop(removed)
            self.listed -= {f"{name}/{n}" for n in inside}
            self._write_mark()

    @staticmethod
    def _drop(room: Path) -> None:
        """Deletes a folder that `room` made while the process goes on: a disk may take a second for
        many gigabytes.
        """
        threading.Thread(target=shutil.rmtree, args=(room, True), daemon=True).start()


def _take(file: Path) -> int:
    """An open descriptor of `file` that holds its lock."""
    while True:
        new = not file.exists()
        fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sentence = _in_use(file, fd)
            os.close(fd)
            raise ValueError(sentence) from None
        except OSError as e:
            os.close(fd)
            if new:
                file.unlink(missing_ok=True)
            raise _no_locks(file, e) from None
        if file.exists() and os.path.samestat(os.fstat(fd), file.stat()):
            os.ftruncate(fd, 0)
            os.write(fd, f"{_this_process()}\n".encode())
            return fd
        os.close(fd)  # its last owner removed it between the two calls


def _no_locks(file: Path, e: OSError) -> Exception:
    """What to raise where flock fails: a sentence where the file system has none."""
    if e.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
        return e
    return ValueError(
        f"{file.parent} is on a file system without locks ({os.strerror(e.errno).lower()}), so two "
        "runs could not be told apart; name a folder on a local disk"
    )


def _this_process() -> str:
    return f"process {os.getpid()} on {os.uname().nodename}"


def _in_use(file: Path, fd: int) -> str:
    holder = os.read(fd, 200).decode(errors="replace").strip() or "another process"
    return f"{file.parent} is in use by {holder}; wait for it, or name another folder"


def _refuse_if_held(file: Path) -> None:
    """Raises ValueError where another process holds the lock. Leaves no trace."""
    try:
        fd = os.open(file, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return  # there is none, or taking it will say why not
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        sentence = _in_use(file, fd)
        if _this_process() not in sentence:
            raise ValueError(sentence) from None
    except OSError as e:
        raise _no_locks(file, e) from None
    finally:
        os.close(fd)
