"""How a program ends: a result, one sentence, or a stop on request; never a traceback for what a user can mend.

    0    done
    2    refused, or cannot go on: one sentence on standard error names the value and the remedy
    3    stopped by Ctrl-C, SIGTERM or SIGHUP: one line says whether a state was saved

This module is imported first and imports nothing heavy, so that a Ctrl-C while torch loads ends like any other.

Limits.  A process that is killed says nothing. Mistakes of this program's own still end in a traceback, with code 1.
"""

import os
import signal
import sys
import time

STOPPED = 3


class OutOfMemory(ValueError):
    """The memory of a device, or of the machine, ran out."""


def _stop(number, frame) -> None:
    raise KeyboardInterrupt(signal.Signals(number).name)


def _hook(kind, value, traceback) -> None:
    """Ctrl-C where no code of ours runs yet: while modules are imported."""
    if issubclass(kind, KeyboardInterrupt):
        print(f"{os.path.basename(sys.argv[0])}: stopped; nothing was written", file=sys.stderr)
        sys.stderr.flush()
        os._exit(STOPPED)
    sys.__excepthook__(kind, value, traceback)


def ran_out(e: BaseException) -> bool:
    """Is this torch's, or Python's, way of saying that memory ran out?"""
    return (
        isinstance(e, MemoryError)
        or type(e).__name__ == "OutOfMemoryError"
        or (isinstance(e, RuntimeError) and "DefaultCPUAllocator" in str(e))
    )


def run(main, program: str) -> None:
    """main(), and the end that it deserves."""
    sys.excepthook = _hook
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _stop)
    try:
        main()
    except KeyboardInterrupt:
        _end(program, "stopped before there was anything to save", STOPPED)
    except OutOfMemory as e:  # which one rank may meet alone
        _end(program, str(e), 2, alone=True)
    except (ValueError, OSError) as e:
        _end(program, str(e), 2)
    except (MemoryError, RuntimeError) as e:
        if not ran_out(e):
            raise
        _end(program, f"memory ran out ({str(e).splitlines()[0][:200]}); use a smaller model, shorter "
             "blocks or a larger machine", 2, alone=True)  # fmt: skip


def _end(program: str, sentence: str, code: int, alone: bool = False) -> None:
    if os.environ.get("RANK", "0") == "0" or alone:
        print(f"{program}: {' '.join(sentence.split())}", file=sys.stderr, flush=True)
    else:
        time.sleep(1)  # torchrun ends all when one has ended: rank 0 speaks first
    sys.stdout.flush()
    os._exit(code)  # not sys.exit, which would wait for ranks that are still at work
