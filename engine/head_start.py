"""A head start for the export: what stays the teacher's is written beside the last stage's steps.

What.  An export is the teacher's frozen tensors and the trained q, k and v: of LLaMA-2 7B's 13.5
GB, 10.3 are frozen. They are known before training begins, and an export waits for the disk (0.9
GB/s). So a thread writes them, from the teacher's files, to their places in the files of the export
(hub/shards.py). At the end the export writes what is not there yet. Then all is read back and
compared, whoever wrote it: with the model, and with the teacher's files where the model holds what
they store in another dtype.

Who goes first.  The thread computes nothing and leaves the GPU alone. It writes PIECE bytes, has
them synced, looks whether it is to stop, and goes on: so a stop waits for one piece, and a state
finds few bytes before its own. All is taken back where less is free on the disk than a whole export
takes. It is taken back, too, where a state finds no room, as under a quota, which the disk does not
tell; the state is then written once more (states.py).

Whole or not there.  The files lie in the place of temporary files, and get their name with the
export. What a kill leaves there, the next run in the folder removes.

Limits.  Errors here are not said: the export writes all, and says what it meets. Where the host has
no memory for the pages, reading back reads the disk.
"""

import shutil
import threading
from pathlib import Path

import torch

from engine.folder import Folder
from engine.states import Job
from hub import checkpoint
from hub.shards import Shards, bytes_of
from model import TRAINED, Llama, LlamaConfig

PIECE = 1 << 26  # bytes


class HeadStart:
    """Of one run's export, on the process that writes it; on the others it never begins."""

    def __init__(self, out: Folder):
        self.out, self.job, self.asked = out, None, threading.Event()
        self.work: Path | None = None  # the folder that is being filled
        self.written: set[str] = set()  # tensors that are there, whole

    def begin(self, teacher: Path, config: LlamaConfig) -> None:
        """config: the student's."""
        with torch.device("meta"):  # here, as torch keeps this device for all threads
            student = Llama(config)
        self.job = Job(self._write, teacher, student)

    def _write(self, teacher: Path, student: Llama) -> None:
        try:
            self.work = self.out.room()
            like, stored = checkpoint.laid_out(student, **how(teacher))
            with Shards(self.work, like) as shards:
                self._write_all(shards, stored)
        except (OSError, ValueError):
            self._take_back()

    def _write_all(self, shards: Shards, stored: dict[str, torch.Tensor]) -> None:
        since = 0  # bytes since the last sync
        for file, names in shards.names.items():
            for name in (n for n in names if n in stored):
                data = bytes_of(stored[name])
                for at in range(0, len(data), PIECE):
                    if self.asked.is_set():
                        return
                    if shutil.disk_usage(self.work).free < shards.nbytes:
                        return self._take_back()
                    piece = data[at : at + PIECE]
                    shards.write(name, piece, at)
                    since += len(piece)
                    if since >= PIECE:
                        shards.sync(file)
                        since = 0
                self.written.add(name)

    def _take_back(self) -> None:
        work, self.work = self.work, None
        self.written = set()
        if work:
            shutil.rmtree(work, ignore_errors=True)

    def stop(self) -> None:
        """No more is written when this returns."""
        self.asked.set()
        if self.job:
            self.job.over.wait()

    def give_up(self) -> bool:
        """Takes everything back for somebody who found no room; whether it had begun."""
        begun = self.job is not None
        self.stop()
        self._take_back()
        self.job = None
        return begun

    def take(self) -> tuple[Path, set[str]]:
        """(the folder in which to complete the export, the tensors that are there)."""
        self.stop()
        if self.job:
            self.job.result()  # an error that is this program's own
        return self.work or self.out.room(), self.written


def how(teacher: Path) -> dict:
    """The arguments of checkpoint.write_pretrained and laid_out that say what is exported."""
    dtype = checkpoint.stored_dtype(teacher)
    return {"dtype": dtype, "frozen_from": teacher, "trained": TRAINED}
