"""What figures were measured with: versions, the device's name, threads.

A figure without these cannot be compared with another. report.json and run.json carry them.

Limits.  A CPU is named by what the operating system calls it, which may be no more than its family.
"""

import platform

import torch


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
