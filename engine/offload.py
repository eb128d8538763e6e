"""What a backward needs and the GPU has no room for waits in the host's memory.

What.  `Store.put` takes a tensor that the backward will ask for once more, and keeps it where it is
or in pinned host memory; `get` gives it back on the device. A layer's input of 8 KiB per token is
2.7 GiB at 350,000 tokens, and 32 layers have one each.

How.  Copies run on a stream of their own while the next layer computes: 55 GB/s each way on an
H100, beside which products lose 2 % (LOG.md). `fetch` begins the copy back; whoever knows what is
asked for next calls it early. What is put last is got first, so the host's memory is a stack of
chunks of CHUNK bytes, each a power of two, which is what torch's pinned allocator rounds to; a
tensor may lie across their borders. The stack is kept from step to step, as pinning memory is slow
(8 GiB in 3.4 s).

Limits.  A tensor that is not dense in memory is copied first. On a CPU the stack is ordinary memory
and nothing is gained; it is there to be tested.

Source.  Activations on the host while the next layer computes: ZeRO-Offload, arXiv 2101.06840.
"""

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 2**28  # bytes
PINNING = 8  # threads, as a page is made when it is pinned
_ALIGNED = 256  # bytes, for vectorised copies


@dataclass
class Held:
    """One tensor that was put: on the device, or at `at` bytes of the stack."""

    tensor: Tensor | None
    at: int | None = None
    size: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    dtype: torch.dtype | None = None
    arrived: "torch.cuda.Event | None" = None


def dense(x: Tensor) -> bool:
    """Whether x, any shape, fills its part of memory, in whatever order of dimensions."""
    return x.numel() == 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))


class Store:
    def __init__(self, device: torch.device):
        self.device, self.chunks, self.used = device, [], 0
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def reserve(self, need: int) -> None:
        """Pins so many bytes now, and not in the middle of a step."""
        missing = -(-need // CHUNK) - len(self.chunks)
        if missing > 0:
            with ThreadPoolExecutor(PINNING) as pool:
                self.chunks += pool.map(self._chunk, range(missing))

    def _chunk(self, _) -> Tensor:
        if not self.stream:
            return torch.empty(CHUNK, dtype=torch.uint8)
        with torch.cuda.device(self.device):  # a thread begins on the first one
            return torch.empty(CHUNK, dtype=torch.uint8, pin_memory=True)

    def put(self, x: Tensor, host: bool) -> Held:
        """Keeps x, any shape, for one `get`."""
        if not host:
            return Held(x.detach())
        if not dense(x):
            x = x.contiguous()
        at = self.used
        self.used += -(-x.nbytes // _ALIGNED) * _ALIGNED
        self.reserve(self.used)
        flat = x.as_strided((x.numel(),), (1,)).view(torch.uint8)
        with self._aside():
            for part, piece in self._pieces(flat, at):
                part.copy_(piece, non_blocking=True)
        if self.stream:
            x.record_stream(self.stream)
        return Held(None, at, tuple(x.shape), x.stride(), x.dtype)

    def fetch(self, held: Held) -> None:
        """Begins to bring it back; `get` waits for it."""
        if held.tensor is not None:
            return
        flat = torch.empty(math.prod(held.size), dtype=held.dtype, device=self.device)
        with self._aside():
            for part, piece in self._pieces(flat.view(torch.uint8), held.at):
                piece.copy_(part, non_blocking=True)
            held.arrived = self.stream and self.stream.record_event()
        held.tensor = flat.as_strided(held.size, held.stride)

    def get(self, held: Held) -> Tensor:
        """The tensor, any shape. On the stack its place is free from now on, and all above it."""
        self.fetch(held)
        if held.arrived:
            torch.cuda.current_stream(self.device).wait_event(held.arrived)
        if held.at is not None:
            self.used = held.at
        x, held.tensor = held.tensor, None
        return x

    def _aside(self):
        """The side stream, after all that this one has been given so far."""
        if not self.stream:
            return torch.cuda.stream(None)
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        return torch.cuda.stream(self.stream)

    def _pieces(self, flat: Tensor, at: int):
        """(bytes of the stack from `at`, the same of `flat`), cut where a chunk ends."""
        done = 0
        while done < len(flat):
            chunk, offset = divmod(at + done, CHUNK)
            n = min(CHUNK - offset, len(flat) - done)
            yield self.chunks[chunk][offset : offset + n], flat[done : done + n]
            done += n
