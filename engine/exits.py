"""How a program ends: a result, one sentence, or a stop on request; never a traceback for what a
user can mend.

    0    done
    2    refused, or cannot go on: one sentence on standard error names the value and the remedy
    3    stopped by Ctrl-C, SIGTERM or SIGHUP; in training the step is finished and saved first
         (StopRequest in resume.py)

This module is imported first and imports nothing heavy, so that a Ctrl-C while torch loads ends
like any other.

Under torchrun rank 0 speaks for all, and leaves its sentence in the error file from which torchrun
makes the last lines of its own report. A signal reaches every rank, as torchrun passes it on; when
one rank has ended, torchrun sends the others SIGTERM: so a rank that is not the first and is
stopped says nothing, and its code is 0, lest torchrun's report call it a failure of its own.

Limits.  A process that is killed says nothing. Mistakes of this program's own still end in a
traceback, with code 1. torchrun prints about thirty lines whenever a process's code is not 0.
"""

import contextlib
import importlib.util
import json
import os
import signal
import sys
import time

STOPPED = 3
GRACE = 25.0  # seconds for a stop under torchrun, which kills what is there after 30
IF_SAVED = "--resume goes on from a state that was saved before; where none was, start again"


def again(program: str) -> str:
    """What to do after an end in the middle, for who does not know what was saved."""
    return IF_SAVED if program == "train.py" else "start again"


class OutOfMemory(ValueError):
    """The memory of a device, or of the machine, ran out."""


# Not so in torchrun's second process and later ones. A RANK without a WORLD_SIZE above 1 is none of
# its: something else left it behind
_FIRST = os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # by nohup: a lost connection stops nothing
    SIGNALS = SIGNALS[:2]


def _leave(number, frame) -> None:
    """While modules are imported: nothing is open and nothing was written."""
    _end(PROGRAM, "stopped before it began", STOPPED)


def _stop(number, frame) -> None:
    """Afterwards: every `with` on the way out puts its things in order.

    Python drops what is raised while it clears an object away: so it is raised again until heard.
    """
    signal.signal(signal.SIGALRM, _stop)
    signal.setitimer(signal.ITIMER_REAL, 3.0)
    raise KeyboardInterrupt


def heard() -> None:
    """A stop was heard: it is not raised again."""
    signal.setitimer(signal.ITIMER_REAL, 0.0)


def _import_failed(kind, e, trace) -> None:
    """Memory may be short even for torch's own code."""
    if ran_out(e):
        _end(PROGRAM, _out_of_memory(e), 2, alone=True)
    sys.__excepthook__(kind, e, trace)


def ran_out(e: BaseException) -> bool:
    """Is this torch's, or Python's, way of saying that memory ran out?"""
    if isinstance(e, MemoryError) or type(e).__name__ == "OutOfMemoryError":
        return True
    # Of a tensor, of a file, of a library
    phrases = ("DefaultCPUAllocator", "Cannot allocate memory", "failed to map segment")
    return isinstance(e, RuntimeError | ImportError) and any(p in str(e) for p in phrases)


def _out_of_memory(e: BaseException) -> str:
    reason = (str(e).splitlines() or [type(e).__name__])[0][:200]
    return f"memory ran out ({reason}); use a smaller model, shorter blocks or a larger machine"


def run(main, program: str) -> None:
    """main(), and the exit code and sentence of how it ended."""
    sys.stdout.reconfigure(errors="backslashreplace")  # names need not be UTF-8; as stderr has it
    stopped = f"stopped; {again(program)}"
    try:
        for number in SIGNALS:
            signal.signal(number, _stop)
        main()
    except KeyboardInterrupt:
        heard()
        _end(program, stopped, STOPPED)
    except OutOfMemory as e:  # which one rank may meet alone
        _end(program, str(e), 2, alone=True)
    except OSError as e:  # "[Errno 13] Permission denied: 'x'" in a sentence
        name, why = e.filename2 or e.filename, os.strerror(e.errno).lower() if e.errno else str(e)
        _end(program, f"cannot use {name}: {why}" if name else why, 2)
    except ValueError as e:
        _end(program, str(e), 2)
    except (MemoryError, RuntimeError, ImportError) as e:
        if isinstance(e.__cause__, KeyboardInterrupt):  # until Python 3.12, of one in a class body
            _end(program, stopped, STOPPED)
        if not ran_out(e):
            raise
        _end(program, _out_of_memory(e), 2, alone=True)


def speak(sentence: str) -> None:
    """On standard error, and where torchrun looks for the last lines of its own report."""
    print(sentence, file=sys.stderr, flush=True)
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        entry = {"message": sentence, "extraInfo": {"timestamp": int(time.time())}}
        with contextlib.suppress(OSError), open(file, "w") as f:
            json.dump({"message": entry}, f)


def _end(program: str, sentence: str, code: int, alone: bool = False) -> None:
    """Says the sentence and ends the process; alone: no other rank meets the same."""
    waits = not _FIRST and not alone
    for number in SIGNALS:
        signal.signal(number, (lambda *_: os._exit(0)) if waits else signal.SIG_IGN)
    if waits and code == STOPPED:
        os._exit(0)
    if waits:  # torchrun ends all when rank 0 has ended; who is still here afterwards must speak
        time.sleep(5)
    speak(f"{program}: {' '.join(sentence.split())}")
    sys.stdout.flush()
    os._exit(code)  # not sys.exit, which would wait for ranks that are still at work


BEGAN = None  # time.perf_counter() where a program of ours began, before torch was imported
PROGRAM = os.path.basename(getattr(sys.modules["__main__"], "__file__", None) or "")
if PROGRAM in ("train.py", "eval.py"):
    BEGAN = time.perf_counter()
    for each in SIGNALS:
        signal.signal(each, _leave)
    sys.excepthook = _import_failed
    if importlib.util.find_spec("torch") is None:
        sys.exit(f"{PROGRAM}: this Python has no torch; `make demo` makes one that has, "
                 ".venv/bin/python, or install requirements.txt")  # fmt: skip
