"""The machine: what figures were measured with, its arithmetic in a fixed order, its memory kept.

A figure without versions, device and threads cannot be compared with another: report.json and
run.json carry them.

Bits.  On a CPU a run has the same bits every time. On a GPU torch's attention adds dq in whatever
order its blocks finish (cuDNN's and flash's alike; o, dk and dv repeat), so that two equal runs
part at their first update. `fix_order` makes flash add in a fixed order; the loss's own kernels
always do.

Memory.  On a CPU torch asks the C library for every tensor. glibc returns large blocks to the
system at once, and gets each page of the next one anew, cleared: 170,000 page faults in a step of
the demo's stage 2, a tenth of its time. `keep_memory` has it keep them for the next tensor; the
bits are the same.

Limits.  A CPU is named by what the operating system calls it, which may be no more than its family.
"""

import ctypes
import os
import platform
import subprocess
from pathlib import Path

import torch

# mallopt's numbers of two limits, in bytes
_TRIM, _MMAP = -1, -3


def fix_order() -> None:
    """From here on a GPU gives the same bits every run; before anything is computed on it."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS adds by its workspace
    # As use_deterministic_algorithms(True), which imports torch's compiler to tell it, too
    torch.set_deterministic_debug_mode("error")
    torch.utils.deterministic.fill_uninitialized_memory = False  # of use for debugging alone
    torch.backends.cuda.enable_mem_efficient_sdp(False)  # has no fixed order, nor has cuDNN's;
    torch.backends.cuda.enable_cudnn_sdp(False)  # what flash does not take is left to products


def keep_memory() -> None:
    """From here on glibc keeps what tensors on the CPU leave: blocks of up to 128 MiB, and at most
    1 GiB that nothing uses. Where the C library is another, nothing changes.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_MMAP, 2**27) or mallopt(_MMAP, 2**25)  # 0: refused, as old ones do above 32 MiB
        mallopt(_TRIM, 2**30)


def versions(device: torch.device) -> dict:
    """{torch, python, device, threads} of this process."""
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": name,
        "threads": torch.get_num_threads(),
    }


def commit() -> str:
    """This tree's, as git says it; "none" where there is no git or no clone."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head, changed = (
            subprocess.run([*git, *words], capture_output=True, text=True, check=False).stdout
            for words in (("rev-parse", "HEAD"), ("status", "--porcelain"))
        )
    except FileNotFoundError:
        return "none"
    return (head.strip() or "none") + ("+changes" if changed.strip() else "")
