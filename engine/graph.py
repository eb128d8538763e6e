"""A step's forward and backward as one CUDA graph: what the host launches once, the GPU repeats by
itself.

What.  A small model on a GPU is bound by launches: Python needs longer to ask for a step's kernels
than the GPU to do them. A CUDA graph records them once; a replay is one launch.

How.  For every shape of ids: three ordinary calls to warm up (Triton compiles then), a recording,
and from then on copies of ids, and of positions where they skip, into the recorded inputs and
replays. Gradients are zeroed, not dropped, so that the recorded backward adds to the same memory
each time. All shapes share one pool of memory, as they run one after another.

When.  On a GPU, where launches would be waited for: warming up and recording take four calls, which
was 6 s of a 7B run whose kernels take several times as long as their launches. With no layer
recomputed in the backward and no dropout, which draw random numbers on the host's word, no weights
in 4 bits (engine/quant.py), and nothing exchanged with other processes in between: several
processes sum their gradients after the last replay, which is worth it while these are small.
Otherwise the function is called as it is; `wanted` says which, and why.

Limits.  The pool holds a step's activations for as long as the stage lasts.

Source.  CUDA graphs as torch.cuda.CUDAGraph offers them.
"""

import torch
from torch import Tensor

from engine.cost import Stage

# Bytes of gradients that several processes may sum after a step's backward instead of inside it:
# a millisecond or two over NVLink, where a step's launches take a hundred
REDUCED = 2**28
# Seconds that Python takes to ask for one layer's kernels, of both models, forward and backward:
# SmolLM2-135M's 30 layers take 0.11 s so, and 0.015 as a graph (bench/README.md)
LAUNCHES = 4e-3


def wanted(
    device: torch.device,
    reduced: int,
    sharded: bool,
    recomputed: bool,
    dropout: float,
    packed: bool = False,
    seconds: float = 0.0,
) -> tuple[bool, str]:
    """(record steps as CUDA graphs?, why). reduced: bytes of gradients summed over processes;
    packed: are frozen weights in 4 bits? seconds: that a layer's products take at least, in a
    micro-batch.
    """
    if device.type != "cuda":
        return False, "there is no GPU"
    if sharded:
        return False, "processes exchange weights inside a step"
    if reduced > REDUCED:
        return False, "processes exchange gradients inside the backward"
    if recomputed:
        return False, "layers are computed again in the backward"
    if packed:
        return False, "bitsandbytes unpacks the weights inside a step"
    if dropout:
        return False, "dropout draws its noise anew in each step"
    if seconds > LAUNCHES:
        return False, "its kernels take longer than their launches"
    return True, "one launch per step instead of thousands"


class Recorded:
    """losses(stage, ids, positions) -> tuple of tensors, the first of them the loss, with its
    backward; recorded per shape.
    """

    def __init__(self, losses, weights: list[Tensor], record: bool):
        self.losses, self.weights, self.record = losses, weights, record
        self.graphs: dict = {}  # (objective, shape, share) -> (graph, its inputs, its outputs)
        self.pool = torch.cuda.graph_pool_handle() if record else None

    def __call__(
        self,
        stage: Stage,
        ids: Tensor,
        positions: Tensor | None,
        share: float,
        alone: bool = True,
    ) -> tuple[Tensor, ...]:
        """The values of losses(stage, ids, positions), after share * the gradient of the first is
        added to the weights'. alone: other processes take no part in it.
        """
        if not (self.record and alone):
            return self._run(stage, ids, positions, share)
        key = stage.objective, tuple(ids.shape), share
        if key not in self.graphs:
            self.graphs[key] = self._capture(stage, ids, positions, share)
        graph, (held, at), out = self.graphs[key]
        held.copy_(ids)
        if positions is not None:
            at.copy_(positions)
        graph.replay()
        return out

    def zero(self) -> None:
        """Gradients are 0 after this."""
        for w in self.weights:
            if not self.record:
                w.grad = None
            elif w.grad is not None:
                w.grad.zero_()

    def _run(
        self, stage: Stage, ids: Tensor, positions: Tensor | None, share: float
    ) -> tuple[Tensor, ...]:
        out = self.losses(stage, ids, positions)
        (out[0] * share).backward()
        return tuple(value.detach() for value in out)

    def _capture(self, stage: Stage, ids: Tensor, positions: Tensor | None, share: float):
        for w in self.weights:
            if w.grad is None:
                w.grad = torch.zeros_like(w)
        before = [w.grad.clone() for w in self.weights]
        held, at = ids.clone(), None if positions is None else positions.clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._run(stage, held, at, share)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # what NCCL's own threads ask of the GPU meanwhile is no part of this
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            out = self._run(stage, held, at, share)
        for w, grad in zip(self.weights, before, strict=True):
            w.grad.copy_(grad)  # what the warming up added goes
        return graph, (held, at), out
