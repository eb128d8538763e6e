"""When another process of this run is gone: the others end, with one sentence, and do not wait.

What.  Over gloo a process sees that a connection was closed, and torch raises (parallel.lost). NCCL
on one machine sees nothing: its kernels wait on the GPU until the process group gives up, which is
hours, as others wait for rank 0 to measure and write. torchrun does notice, and sends the others
SIGTERM; but a process that waits for its GPU runs no Python, so no handler of ours either, and 30
seconds later SIGKILL says nothing.

How.  From before the processes meet until each has ended, the signal's C handler writes a byte to a
pipe (signal.set_wakeup_fd), which a thread reads. A stop in good order has ended GRACE seconds
later, with or without its state (run.py). Who is still there AFTER that is ended by its thread. The
first rank says the sentence; the others, who wait a moment longer, only where it has not: the run's
store knows.

The clock.  Python runs a handler of ours when the main thread is back from what it does in C, such
as a backward; the thread hears the signal at once. So `left` counts from there.

Limits.  A stop that somebody asks for ends so too where a step, a measurement or the export takes
longer than torchrun waits. NCCL between machines may notice by itself, and then aborts in its own
words. A process that ends with a sentence of its own, as one whose memory ran out, does not keep
the others from saying theirs. Without torchrun nobody sends the signal: then a stop may take as
long as a step does, and nothing is watched.

Source.  torch.distributed.elastic: the agent's shutdown of its workers.
"""

import contextlib
import os
import signal
import threading
import time

import torch.distributed as dist

from engine import exits

AFTER = 1.5  # seconds; of processes that are not the first, twice that


class Watch:
    """Of one process until it ends; made by the main thread. It does nothing without torchrun.

    `kept`: how the sentence ends, on what there is to go on from.
    """

    def __init__(self, first: bool):
        self.first, self.kept = first, f"; {exits.again(exits.PROGRAM)}"
        self.heard = 0.0  # when the signal came
        self.active = "TORCHELASTIC_RUN_ID" in os.environ
        if self.active:
            reader, writer = os.pipe()
            os.set_blocking(writer, False)
            signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
            threading.Thread(target=self._watch, args=(reader,), daemon=True).start()

    def left(self) -> float | None:
        """Seconds until a stop must be over; None where nobody said how many there are."""
        if not self.active:
            return None
        return max(0.0, exits.GRACE - (time.monotonic() - self.heard if self.heard else 0.0))

    def _watch(self, reader: int) -> None:
        while os.read(reader, 1)[0] not in exits.SIGNALS:
            pass
        self.heard = time.monotonic()
        time.sleep(exits.GRACE + AFTER * (1 if self.first else 2))
        speaks = self._speaks()
        if speaks:
            exits.speak(
                f"{exits.PROGRAM}: another process of this run has ended, or a stop was asked for, "
                f"and what was at work did not end within {exits.GRACE:g} seconds{self.kept}"
            )
        os._exit(2 if speaks else 0)

    def _speaks(self) -> bool:
        """Is this the first process that gives up? Where the store does not say: is it rank 0?"""
        turns = []

        def ask() -> None:
            # It is not there before the processes have met. torchrun keeps it, whoever is gone
            with contextlib.suppress(RuntimeError, ValueError):
                turns.append(dist.distributed_c10d._get_default_store().add("gave up", 1))

        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(0.5)  # the main thread may hold it, waiting in it for the process that is gone
        return turns == [1] or (not turns and self.first)
