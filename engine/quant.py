"""Frozen weights in 4 bits: a layer's matrices are kept in NF4, and unpacked where they multiply.

    w = c_i s       i: 4 bits of each weight;  s: the largest |w| of its block of 64, float32

What.  With --bits 4 the matrices of the layers take 4.5 bits per number instead of 16: those of
LLaMA-2 7B 3.4 GiB instead of 12.1. c are 16 numbers from -1 to 1, the quantiles of a normal
distribution, as weights are nearly normal within a block. What learns are adapters in float32
(engine/lora.py). Norms, biases, embedding and head stay as they are.

How.  `pack` puts one `Packed` in the place of a matrix, the same one in teacher and student. Each
product unpacks its matrix anew, the backward's too, so that one at a time exists in full:

    y = x W^T + b           dx = dy W

The export.  Adapters learn beside the packed weights, and the table of a run is measured with them;
they are added to the original ones, from the teacher's files (`lora.merge`).

Limits.  Every process holds all of it: --shard cannot cut what is packed. Unpacking costs time, the
more the shorter the blocks. The package that packs, bitsandbytes, is optional.

Source.  NF4 and adapters beside it: QLoRA, arXiv 2305.14314. The format is bitsandbytes'.
"""

import logging

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import Linear, Llama

BLOCK = 64  # weights that share a scale
BYTES = 0.5 + 4 / BLOCK  # of a packed weight and its share of the scale


def _library():
    """bitsandbytes, which not everybody has; its advice on products that are not used here is not
    passed on.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from bitsandbytes import functional

    return functional


class Packed(nn.Module):
    """A frozen Linear whose weight is kept in NF4, on `device`."""

    def __init__(self, linear: nn.Linear, device: torch.device):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight, self.bias = linear.weight.detach().to(device), linear.bias
        if weight.dtype == torch.float64:
            weight = weight.float()
        packed, self.format = _library().quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4")
        self.register_buffer("packed", packed, persistent=False)

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """The weight [outputs, inputs], unpacked."""
        return _library().dequantize_4bit(self.packed, self.format).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., inputs] -> [..., outputs] in x's dtype."""
        return _Product.apply(x, self)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, linear: Packed) -> Tensor:
        ctx.linear = linear
        bias = None if linear.bias is None else linear.bias.to(x.dtype)
        return F.linear(x, linear.matrix(x.dtype), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy: Tensor):
        return dy @ ctx.linear.matrix(dy.dtype), None


def pack(teacher: Llama, student: Llama, device: torch.device) -> None:
    """Packs the layers' matrices of both models, in place, and puts all else on `device` too.

    The student's tensors are the teacher's, and stay so.
    """
    for theirs, ours in zip(teacher.model.layers, student.model.layers, strict=True):
        for name, linear in list(theirs.named_modules()):
            if isinstance(linear, Linear):
                owner, _, leaf = name.rpartition(".")
                assert ours.get_submodule(name).weight is linear.weight, "nothing learns yet"
                packed = Packed(linear, device)
                for layer in (theirs, ours):
                    setattr(layer.get_submodule(owner), leaf, packed)
    for p in teacher.parameters():
        p.data = p.data.to(device)


def is_packed(model: Llama) -> bool:
    """Are the matrices of its layers in 4 bits?"""
    return any(isinstance(module, Packed) for module in model.modules())


def check(device: torch.device) -> None:
    """Packs and unpacks one matrix. Raises ValueError where bitsandbytes cannot do that here."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        linear = Linear(2 * BLOCK, BLOCK, bias=False)
    try:
        found = Packed(linear, device).matrix(torch.float32).cpu()
    except (ImportError, OSError, RuntimeError, AttributeError) as e:
        reason = (str(e).splitlines() or [type(e).__name__])[0][:200]
        raise ValueError(
            f"--bits 4: bitsandbytes does not work on {device} ({reason}); install another version "
            "of it, or leave the flag out"
        ) from None
    assert (found - linear.weight).norm() < 0.2 * linear.weight.norm()
