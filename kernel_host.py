"""What GPU kernels share on the host: which GPUs they take, how one is launched, and how the loss's
become a differentiable function.

Why.  On a small model what Python does before a launch takes longer than the GPU.

    refusal   which dtypes and GPUs are not for Triton's kernels
    launch    Triton's own call looks at every argument each time; here once for each kind
    Loss      called eagerly the loss is an autograd.Function. Under torch.compile or a dispatch mode
              (selective checkpointing is one) it is a registered operator: visible to them, three
              times as slow to call.

What each part takes: LOG.md, and `pytest tests/test_kernel.py -k hosts_time -rP`.
"""

import functools
import math

import torch
import triton
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret
LOG2E = math.log2(math.e)
# Heads are taken in groups whose x and y fit in this many bytes of L2. Reasoned (an H100 or H200
# has 50 MB), not timed.
GROUP_BYTES = 32 * 2**20
# Bytes of shared memory a block can have, on every NVIDIA GPU from compute capability 8.0 on
SHARED_MEMORY = 99 * 2**10


def constant(function):
    """Marks a function whose result torch.compile may take for a constant.

    As torch.compiler.assume_constant_result, which imports the compiler for it: seconds of every
    start.
    """
    function._dynamo_marked_constant = True
    return function


@functools.cache
def _properties(device: torch.device) -> tuple[tuple[int, int], int]:
    shared = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    return torch.cuda.get_device_capability(device), shared


@constant
def chip(device: torch.device) -> tuple[tuple[int, int], int]:
    """Compute capability and bytes of shared memory a block can have; the interpreter plays an
    H200.
    """
    return _properties(device) if device.type == "cuda" else ((9, 0), 232448)


def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why Triton's kernels cannot take `dtype` on `device`, in a sentence; None if they can."""
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"the Triton kernel takes float16, bfloat16 or float32, not {dtype}"
    cuda = device.type == "cuda"
    if not cuda and not INTERPRETED:
        return f"the Triton kernel needs a GPU, and the tensors are on {device} (TRITON_INTERPRET=1 emulates one)"
    if cuda and torch.version.hip:
        return "the Triton kernel is proven on NVIDIA GPUs only, and this one is AMD's"
    capability, shared = chip(device)
    if capability < (8, 0) or shared < SHARED_MEMORY:
        return f"the Triton kernel needs compute capability 8.0 and 99 KiB of shared memory; {device} has {capability}"
    return None


_compiled: dict = {}  # compiled kernels by all that they were compiled for, see launch


def launch(kernel, device, grid: tuple, arguments: tuple, tensors: tuple, known: tuple, **options):
    """kernel[grid](*arguments, **options); nothing waits for it.

    Triton's own call looks at every argument to find the code compiled for its like: at types,
    strides, constants, and which pointers are multiples of 16. That costs more than all else here;
    so where all of `tensors` begin at multiples of 16, it is done once for each combination of the
    rest, `known`.
    """
    pointers = 0
    for t in tensors:
        pointers |= t.data_ptr()
    key = (id(kernel), device, *known) if pointers % 16 == 0 else None
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return launch(kernel, device, grid, arguments, tensors, known, **options)
    if key in _compiled:
        _compiled[key][grid](*arguments)
    else:
        code = kernel[grid](*arguments, **options)
        if key and code:  # the interpreter makes none
            _compiled[key] = code


def row_numbers(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Three [B, H, T] float32 (torch.empty takes Python three times as long)."""
    kl = x.new_empty(x.shape[:3], dtype=torch.float32)
    return kl, torch.empty_like(kl), torch.empty_like(kl)


class Loss:
    """A forward and a backward such as the two above as one differentiable loss, called two ways.

    forward(x, y, s_scale, t_scale, causal, lengths) -> kl, lse(S), lse(U); backward(w, lse(S),
    lse(U), *the same) -> dL/dx. loss(...) -> kl; `kept`, as in relation_kl.relation_kl, spares the
    function a second forward. An operator needs a checkpointing policy for that, which knows it by
    its name, linear_ard::{name}, or linear_ard::{name}_backward.
    """

    SCHEMA = "Tensor x, Tensor y, float s_scale, float t_scale, bool causal, Tensor? lengths"

    def __init__(self, name: str, forward, backward):
        define = functools.partial(torch.library.custom_op, mutates_args=())
        self.operator = define(
            f"linear_ard::{name}", schema=f"({self.SCHEMA}) -> (Tensor, Tensor, Tensor)"
        )(forward)
        self.operator_backward = define(
            f"linear_ard::{name}_backward",
            schema=f"(Tensor w, Tensor s_lse, Tensor t_lse, {self.SCHEMA}) -> Tensor",
        )(backward)
        self.operator.register_fake(lambda x, *_: row_numbers(x))
        self.operator_backward.register_fake(lambda w, s_lse, t_lse, x, *_: torch.empty_like(x))
        self.operator.register_autograd(self._operator_gradient, setup_context=self._operator_save)
        self.function = _function(forward, backward)

    def __call__(self, x, y, s_scale, t_scale, causal, lengths, kept=None) -> Tensor:
        plain = type(x) in (Tensor, torch.nn.Parameter) and type(y) in (Tensor, torch.nn.Parameter)
        if torch.compiler.is_compiling() or not plain or _watched():
            return self.operator(x, y, s_scale, t_scale, causal, lengths)[0]
        return self.function(x, y, s_scale, t_scale, causal, lengths, kept)

    @staticmethod
    def _operator_save(ctx, inputs, output):
        x, y, *ctx.scalars, lengths = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(x, y, *output[1:], lengths)

    def _operator_gradient(self, ctx, w, *_):
        x, y, s_lse, t_lse, lengths = ctx.saved_tensors
        dx = self.operator_backward(w, s_lse, t_lse, x, y, *ctx.scalars, lengths)
        return dx, None, None, None, None, None


def _watched() -> bool:
    """Whether a dispatch mode, which sees operators, is on."""
    return torch.utils._python_dispatch._get_current_dispatch_mode() is not None


def _function(forward, backward):
    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, y, s_scale, t_scale, causal, lengths, kept):
            kl, s_lse, t_lse = kept or forward(x, y, s_scale, t_scale, causal, lengths)
            if kept is not None:
                kept[:] = kl, s_lse, t_lse
                kl = kl.clone()  # the caller may change it in place
            ctx.save_for_backward(x, y, s_lse, t_lse, lengths)
            ctx.scalars = s_scale, t_scale, causal
            return kl

        @staticmethod
        def backward(ctx, w):
            # the guard against second derivatives takes time: only where they could follow
            return (once if torch.is_grad_enabled() else gradient)(ctx, w)

    def gradient(ctx, w):
        x, y, s_lse, t_lse, lengths = ctx.saved_tensors
        dx = backward(w, s_lse, t_lse, x, y, *ctx.scalars, lengths)
        return dx, None, None, None, None, None, None

    once = torch.autograd.function.once_differentiable(gradient)
    return Function.apply
