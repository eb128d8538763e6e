"""Which dtype this machine computes in: bfloat16 where it multiplies that faster than float32.

What.  A bfloat16 number has float32's range and 8 of its 24 bits of precision, so that a network
trained in it needs no loss scaling. Every GPU here multiplies it faster than float32; of CPUs only
those that have instructions for it:

    AMX            tiles of matrices (from Sapphire Rapids on): linear layers and attention gain
    AVX512-BF16    dot products (Zen 4, Cooper Lake): linear layers gain, attention does not
    neither        float32 is the faster

`choose_dtype` says which one activations are kept in. `attention_dtype` says what the attention of
one layer (model.py) is computed in, its result being cast back. Weights that learn are float32 in
any case, and so are the sums in norms, softmax and losses.

Limits.  What counts is what the CPU says it has, not a measurement. Only x86 CPUs are known.

Source.  oneDNN's list of instruction sets, which torch asks; the times stand at `attention_dtype`.
"""

import functools

import torch


def choose_dtype(device: torch.device, asked: str = "auto") -> tuple[torch.dtype, str]:
    """(the dtype that activations are computed in, why).

    asked: "auto", "bfloat16" or "float32"; ValueError for anything else.
    """
    if asked != "auto":
        if asked not in ("bfloat16", "float32"):
            raise ValueError(f"--dtype is {asked!r}; it must be auto, bfloat16 or float32")
        return getattr(torch, asked), "--dtype says so"
    if device.type == "cuda":
        return torch.bfloat16, "GPUs multiply it fastest"
    if device.type == "cpu" and cpu_bfloat16():
        return torch.bfloat16, f"this CPU multiplies it faster than float32 ({cpu_bfloat16()})"
    return torch.float32, f"this {device.type} has no fast bfloat16"


def attention_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What attention over activations of `dtype` is computed in: float32 where that is the faster.

    Forward and backward of 4 heads over 4,096 tokens on one core, in ms: float32 234, bfloat16 with
    AMX 149, with AVX512-BF16 alone 274 (torch 2.13).
    """
    slow = device.type == "cpu" and dtype == torch.bfloat16 and cpu_bfloat16() != "AMX"
    return torch.float32 if slow else dtype


@functools.cache
def cpu_bfloat16() -> str | None:
    """The instructions with which this CPU multiplies bfloat16 matrices, or None."""
    if not torch.backends.mkldnn.is_available():
        return None
    if hasattr(torch.cpu, "get_capabilities"):
        has = torch.cpu.get_capabilities()
        amx, avx512 = has.get("amx_bf16", False), has.get("avx512_bf16", False)
    else:  # torch 2.11
        amx, avx512 = torch.cpu._is_amx_tile_supported(), torch.cpu._is_avx512_bf16_supported()
    return "AMX" if amx else "AVX512-BF16" if avx512 else None
