"""When another process of a run is gone: the others end, with one sentence, and do not wait.

What.  Over gloo a process sees that a connection was closed, and torch raises (parallel.lost). NCCL
on one machine sees nothing: its kernels wait on the GPU until the process group gives up, which is
hours, as others wait for rank 0 to measure and write. torchrun does notice, and sends the others
SIGTERM; but a process that waits for its GPU runs no Python, so no handler of ours either, and 30
seconds later SIGKILL says nothing.

How.  While steps run, the signal's C handler writes a byte to a pipe (signal.set_wakeup_fd), which
a thread reads. If no step has ended GRACE seconds later, the thread ends the process. The first
rank says the sentence; the others, who wait a moment longer, only where it has not: the run's store
knows.

Limits.  A stop that somebody asks for ends so too where a step takes longer than torchrun waits.
NCCL between machines may notice by itself, and then aborts in its own words. Without torchrun
nobody sends the signal: then a stop may take as long as a step does, and nothing is watched.

Source.  torch.distributed.elastic: the agent's shutdown of its workers.
"""

import os
import signal
import threading

import torch.distributed as dist

from engine import exits
from engine.parallel import World

AFTER = 2.0  # seconds more, of those that are not the first


class Watch:
    """While steps run, until `end`; both of the main thread. It does nothing without torchrun."""

    def __init__(self, world: World):
        self.world, self.ended = world, threading.Event()
        self.active = world.size > 1 and "TORCHELASTIC_RUN_ID" in os.environ

    def __enter__(self) -> "Watch":
        if self.active:
            reader, self.writer = os.pipe()
            os.set_blocking(self.writer, False)
            self.before = signal.set_wakeup_fd(self.writer, warn_on_full_buffer=False)
            threading.Thread(target=self._watch, args=(reader,), daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self.end()

    def end(self) -> None:
        """A step has ended since the signal: what follows takes its own time."""
        if self.active and not self.ended.is_set():
            self.ended.set()
            signal.set_wakeup_fd(self.before)
            os.close(self.writer)  # the reader reads the end

    def _watch(self, reader: int) -> None:
        patience = exits.GRACE + AFTER * (not self.world.main)
        while number := os.read(reader, 1):
            if number[0] in exits.SIGNALS and not self.ended.wait(patience):
                self._give_up()
        os.close(reader)

    def _give_up(self) -> None:
        try:  # torchrun keeps the store, whoever is gone
            first = dist.distributed_c10d._get_default_store().add("gave up", 1) == 1
        except (RuntimeError, ValueError):
            first = True
        if first:
            exits.speak(
                f"{exits.PROGRAM}: another process of this run has ended, or a stop was asked for, "
                f"and this step did not end within {exits.GRACE:g} seconds; {exits.IF_SAVED}"
            )
        os._exit(2 if first else 0)
