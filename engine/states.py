"""A state: what a run needs to go on, written by all processes while steps go on, read by any
number of them.

On disk.  state/step-N/, or after a stage step-N-measured/, holds a file rank<r>.safetensors of
each of the processes that wrote it, and state.json: stage and step, the figures so far, what the
run depends on, the name of each file with its checksums. Of every tensor, process r holds the r-th
of as many slices of rows: those that it works on with --shard, an equal share of the copy that each
has without it. So a whole tensor is the slices one below the other, whatever number wrote them and
whatever number reads.

Beside the steps.  `Saver.start` copies this process's slices into the host's memory, and only that
is waited for: nothing changes a weight before it is over. From a GPU they come through two pinned
pieces of CHUNK bytes: one is filled by the GPU's copy engine (55 GB/s) while the other is emptied.
The copy itself is not pinned (8 GiB take 3.4 s), and its pages are touched by a thread beside the
first steps, as making them takes longer than filling them. Threads write the file, CHUNK by CHUNK,
each with its crc32, and sync it.

A full disk.  Where a file could not be written and something else can make room (head_start.py), it
does, and the file is written once more, while the run waits.

Whole or not there.  Once every process's file is synced, which they learn from the numbers that
they exchange in each step anyway, the first writes state.json with all checksums, syncs it, and
renames the folder: a name that exists was complete. Then the states before the last two go. A state
that does not read back as it was written is named, and passed over for the one before it.

Limits.  All processes must see the same --out. Where the host has no room for the copy, states are
written while the steps wait. A kill while a file is being written costs the steps since the state
before. Checksums find damage, not intent.

Source.  Asynchronous, sharded checkpoints: CheckFreq (FAST 2021) and torch.distributed.checkpoint,
whose format LOG.md says why not to use; the format of the files: safetensors.
"""

import contextlib
import functools
import json
import os
import re
import threading
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from engine import parallel
from engine.cost import Stage
from engine.folder import Folder
from engine.parallel import World
from hub import files, shards

GOES_ON = ". The last saved state is kept: --resume goes on from it"
CHUNK = 1 << 26  # bytes that are copied, written and summed at a time
KEEP = 2
MOMENTS = ("exp_avg", "exp_avg_sq")  # Adam's
_THREADS = 4  # that write, or read, at a time: one core's crc32 is slower than a disk
_NAME = re.compile(r"step-\d{8}(-measured)?")  # -measured: with its stage's column, at its end


@dataclass
class Progress:
    """How far a run is: the step to do next, and the columns of the table that are there."""

    stage: int = 0  # its number in the plan
    step: int = 0  # of that stage
    total: int = 0  # steps done, over all stages
    columns: dict[str, dict[str, float]] = field(default_factory=dict)
    state: Path | None = None  # where weights and moments are to be read from

    def where(self, stages: list[Stage]) -> str:
        return f"after step {self.step} of {stages[self.stage].name}" if self.step else (
            "between stages"
        )  # fmt: skip


class Job:
    """f(*args) in a thread, which ends with the process at the latest; its result, or its error."""

    def __init__(self, f, *args):
        self.over, self.value, self.error = threading.Event(), None, None
        threading.Thread(target=self._run, args=(f, args), daemon=True).start()

    def _run(self, f, args) -> None:
        try:
            self.value = f(*args)
        except Exception as e:  # raised in the thread that asks for the result
            self.error = e
        self.over.set()

    def result(self):
        self.over.wait()
        if self.error:
            raise self.error
        return self.value


# ---- what is saved


def slices(
    weights: dict[str, nn.Parameter], optimiser: torch.optim.Optimizer | None, world: World
) -> dict[str, Tensor]:
    """This process's rows of the weights and, of an optimiser, of its moments: no copies."""
    found = {}
    for name, p in weights.items():
        moments = optimiser.state.get(p, {}) if optimiser else {}
        held = {name: p} | {f"{k}.{name}": moments[k] for k in MOMENTS if k in moments}
        found |= {key: parallel.rows(t, world) for key, t in held.items()}
    return found


def refuse_non_finite(weights: dict[str, nn.Parameter], world: World) -> None:
    """Raises ValueError, on all processes, naming a weight that is not finite: a state with it
    could never go on.
    """
    held = [parallel.local(p) for p in weights.values()]
    # Two numbers of each, as NaN is passed on; a shard may be empty
    ends = [torch.stack(t.aminmax()) if t.numel() else t.new_zeros(2) for t in held]
    finite = torch.isfinite(torch.stack(ends)).all(1)
    bad = (~finite).nonzero().flatten().tolist()
    first = int(world.min(bad[0] if bad else len(finite)))
    if first < len(finite):
        raise ValueError(
            f"the update made {list(weights)[first]} NaN or infinite; start anew, in another "
            "--out, with a lower learning rate"
        )


def _header(tensors: dict[str, Tensor]) -> Tensor:
    """The head of a safetensors file, as bytes [n]: where each of the tensors after it lies."""
    return torch.frombuffer(bytearray(shards.header(tensors)), dtype=torch.uint8)


def _chunks(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """The bytes of all, one after another, as lists of views [n]: CHUNK bytes each, or the rest."""
    views, left = [], CHUNK
    for t in tensors:
        flat = t.contiguous().view(-1).view(torch.uint8)
        while len(flat):
            views.append(flat[:left])
            flat, left = flat[left:], left - len(views[-1])
            if not left:
                yield views
                views, left = [], CHUNK
    if views:
        yield views


def _fill(room: Tensor, views: list[Tensor]) -> Tensor:
    """Begins to copy the views into the head of room [CHUNK]; returns that head."""
    at = 0
    for view in views:
        room[at : at + len(view)].copy_(view, non_blocking=True)
        at += len(view)
    return room[:at]


# ---- writing


class Saver:
    """Writes a run's states. All processes call each method together.

    make_room: removes what a state is worth more than, and says whether there was any.
    """

    def __init__(
        self,
        out: Folder,
        world: World,
        depends: dict,
        at: Progress,
        overlap: bool,
        make_room: Callable[[], bool] = lambda: False,
    ):
        self.out, self.world, self.depends, self.overlap = out, world, depends, overlap
        self.make_room = make_room
        self._keep(replace(at) if at.state else None)
        self.job, self.next = None, None  # of the state that is being written, and what it knows
        self.room = torch.empty(0, dtype=torch.uint8)  # the copy
        self.touched = Job(bool)  # over once its pages are made; it has none yet
        self.gpu = world.device.type == "cuda"
        self.pinned: list[Tensor] = []

    def _keep(self, last: Progress | None) -> None:
        """last: what the newest whole state knows."""
        self.last = last
        self.world.peers.kept = self.promise() or "; no state was saved yet, so start again"

    def promise(self) -> str:
        """The end of a sentence that ends a run."""
        return GOES_ON if self.last else ""

    def reserve(self, weights: dict[str, nn.Parameter]) -> None:
        """Begins to make room for weights and moments, beside what the process does next."""
        if self.overlap:
            tensors, kinds = slices(weights, None, self.world), ("weight", *MOMENTS)
            # In the order of a state, and under longer names: no header of one is longer
            alike = {f"{k}.{name}": t for name, t in tensors.items() for k in kinds}
            self.touched.result()
            self._grow(sum(t.nbytes for t in (_header(alike), *alike.values())))

    def _grow(self, need: int) -> None:
        if len(self.room) < need:
            self.room = torch.empty(need, dtype=torch.uint8)
            # numpy's fill, as torch's would begin a second set of threads beside the first
            self.touched = Job(self.room.numpy().fill, 0)

    def start(self, tensors: dict[str, Tensor], at: Progress) -> None:
        """Copies this process's slices and begins to write them. Another may not be at work.

        Without overlap there is no copy: nothing may change a weight until `finish` is True.
        """
        assert self.job is None
        self.next = replace(at, state=None)  # and at's columns as they are when it is whole
        self.place = Path(self.world.on_main(self._place))
        file = self.place / f"rank{self.world.rank}.safetensors"
        parts = [_header(tensors), *tensors.values()]
        if self.gpu and not self.pinned:
            self.pinned = [torch.empty(CHUNK, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        if self.overlap:
            self.write = functools.partial(self._write, file, self._copy(parts))
        else:
            self.write = functools.partial(self._write_at_once, file, parts)
        self.job = Job(self.write)

    def _place(self) -> str:
        with files.disk_sentences(self.out.path, self.promise):
            return str(self.out.room())

    def _copy(self, parts: list[Tensor]) -> list[Tensor]:
        """The bytes of all in the host's memory, in chunks."""
        self._grow(need := sum(t.nbytes for t in parts))
        self.touched.result()
        chunks, before = list(self.room[:need].split(CHUNK)), None
        for i, (chunk, views) in enumerate(zip(chunks, _chunks(parts), strict=True)):
            if not self.gpu:
                _fill(chunk, views)
                continue
            piece = _fill(self.pinned[i % 2], views)
            arrived = torch.cuda.current_stream(self.world.device).record_event()
            if before:
                self._empty(*before)
            before = chunk, piece, arrived
        if before:
            self._empty(*before)
        return chunks

    @staticmethod
    def _empty(chunk: Tensor, piece: Tensor, arrived) -> None:
        arrived.synchronize()
        chunk.copy_(piece)

    def _write(self, file: Path, chunks: list[Tensor]) -> list[int]:
        """Writes and syncs a file; returns the crc32 of each chunk."""
        sums = [0] * len(chunks)

        def write(f, numbers: range) -> None:
            for i in numbers:
                data = memoryview(chunks[i].numpy())
                sums[i] = zlib.crc32(data)
                files.write_at(f.fileno(), data, i * CHUNK)

        with files.disk_sentences(self.out.path, self.promise), file.open("wb") as f:
            starts = range(min(_THREADS, len(chunks)))
            jobs = [Job(write, f, range(k, len(chunks), len(starts))) for k in starts]
            for job in jobs:
                job.over.wait()
            for job in jobs:
                job.result()
            os.fsync(f.fileno())
        return sums

    def _write_at_once(self, file: Path, tensors: list[Tensor]) -> list[int]:
        """The same from where the tensors are, through one piece of memory."""
        sums, room = [], (self.pinned or [torch.empty(CHUNK, dtype=torch.uint8)])[0]
        with files.disk_sentences(self.out.path, self.promise), file.open("wb") as f:
            for views in _chunks(tensors):
                piece = _fill(room, views)
                if self.gpu:
                    torch.cuda.current_stream(self.world.device).synchronize()
                sums.append(zlib.crc32(piece.numpy()))
                f.write(piece.numpy())
            f.flush()
            os.fsync(f.fileno())
        return sums

    def writing(self) -> bool:
        """Is this process's file not written yet?"""
        return self.job is not None and not self.job.over.is_set()

    def written(self) -> bool:
        """Is it written, and only its name missing?"""
        return self.job is not None and self.job.over.is_set() and not self.job.error

    def finish(self, seconds: float | None = None) -> bool:
        """Waits for the state at work, up to so many seconds; whether none is left.

        Raises ValueError, on all, for a disk that is full.
        """
        if self.job is None:
            return True
        done = self.job.over.wait(seconds)
        if not self.world.min(float(done)):
            return False
        job, self.job = self.job, None
        try:
            sums = self.world.on_all(job.result)
        except ValueError:
            if not self.world.on_main(self.make_room):
                raise
            sums = self.world.on_all(self.write)  # from the copy, which is as it was
        self.world.on_main(self._publish, sums)
        self._keep(replace(self.next, state=self.out.path / self._name()))
        return True

    def _name(self) -> str:
        """Another one than the last step's: to replace a state is to have none for a moment."""
        return f"state/step-{self.next.total:08d}{'' if self.next.step else '-measured'}"

    def _publish(self, sums: list[list[int]]) -> None:
        """The manifest, the name, and the end of all states but the last two."""
        at = self.next
        info = {"total": at.total, "stage": at.stage, "step": at.step, "columns": at.columns}
        info["files"] = {f"rank{r}.safetensors": each for r, each in enumerate(sums)}
        info |= {"chunk": CHUNK, "depends": self.depends}
        info["own checksum"] = info_checksum(info)
        with files.disk_sentences(self.out.path, self.promise):
            (self.place / "state.json").write_text(json.dumps(info) + "\n")
            self.out.publish(self.place, self._name())
            there = [f"state/{state.name}" for state in found(self.out.path / "state")]
            newest = there.index(self._name())
            # Later ones are damaged, or this run would have begun there
            for name in there[:newest] + there[newest + KEEP :]:
                self.out.remove(name)

    def abandon(self) -> None:
        """What is being written is not waited for."""
        self.job = None

    def release(self) -> None:
        """Frees the memory of the copy; nothing may be at work."""
        assert self.job is None
        self.room = torch.empty(0, dtype=torch.uint8)


# ---- reading


def info_checksum(info: dict) -> int:
    """Of all that state.json says but this number itself."""
    facts = {k: v for k, v in info.items() if k != "own checksum"}
    return zlib.crc32(json.dumps(facts, sort_keys=True).encode())


def checksums(file: Path, chunk: int) -> list[int]:
    """crc32 of each so many bytes of a file."""
    with file.open("rb") as f, ThreadPoolExecutor(_THREADS) as pool:
        starts = range(0, os.fstat(f.fileno()).st_size, chunk)
        return list(pool.map(lambda at: zlib.crc32(os.pread(f.fileno(), chunk, at)), starts))


def found(folder: Path) -> list[Path]:
    """What is named like a state, newest first."""
    entries = folder.iterdir() if folder.is_dir() else ()
    return sorted((p for p in entries if _NAME.fullmatch(p.name)), reverse=True)


def latest(folder: Path) -> Path | None:
    """The newest state that reads back as it was written, or None; a damaged one is named on the
    way.
    """
    for state in found(folder):
        try:
            info = load_info(state)
            for name, sums in info["files"].items():
                if checksums(state / name, info["chunk"]) != sums:
                    raise ValueError(f"{name} is not as it was written")
            return state
        except (ValueError, KeyError, TypeError, OSError) as e:
            print(f"{state} is damaged ({e}); looking for the one before it", flush=True)
    return None


def load_info(state: Path) -> dict:
    """state.json, with the keys of Progress, `files` and `depends`.

    Raises ValueError where it is not as it was written.
    """
    info = files.read_json(state / "state.json")
    kinds = {"total": int, "stage": int, "step": int, "columns": dict, "depends": dict}
    for key, kind in (kinds | {"files": dict, "chunk": int}).items():
        if not isinstance(info.get(key), kind):
            raise ValueError(f"state.json has no {key}, as this version of the program writes it")
    if info.get("own checksum") != info_checksum(info):
        raise ValueError("state.json is not as it was written")
    return info


def load(state: Path, weights: dict[str, nn.Parameter], optimiser, step: int) -> None:
    """Puts weights and, unless None, Adam's moments back; `step`: how many updates Adam had made.

    Raises ValueError for a file that cannot be read and for weights of another shape.
    """
    names = load_info(state)["files"]
    with contextlib.ExitStack() as opened:
        try:
            parts = [
                opened.enter_context(safe_open(state / name, framework="pt")) for name in names
            ]
        except SafetensorError as e:
            raise ValueError(f"{state} cannot be read: {e}") from None

        def read(name: str, like: nn.Parameter) -> Tensor:
            held = [part.get_tensor(name) for part in parts if name in part.keys()]  # noqa: SIM118
            full = torch.cat(held) if held else torch.empty(0)
            if full.shape != like.shape:
                raise ValueError(
                    f"{state} holds no {name} of shape {list(like.shape)}; it is another run's"
                )
            return parallel.local_part(full, like)

        for name, p in weights.items():
            p.data.copy_(read(name, p))
            if optimiser is not None and step:
                # Each kind of Adam counts its steps elsewhere
                place = p.device if optimiser.defaults["fused"] else "cpu"
                count = torch.tensor(float(step), device=place)
                optimiser.state[p] = {"step": count} | {k: read(f"{k}.{name}", p) for k in MOMENTS}
