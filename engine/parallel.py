"""Many processes, one result: the global batch split over ranks, gradients averaged, or the layers
cut with FSDP2.

    torchrun --nproc_per_node 8 train.py --teacher DIR --batch1 8 --batch2 8 [--shard]

What.  torchrun starts the same script N times and sets RANK, LOCAL_RANK and WORLD_SIZE; without
them there is one process. Rank r of N takes the rows r B/N .. (r+1) B/N - 1 of each step's batch of
B blocks, so that the blocks, their order and their mean are those of one process, and so are the
losses, up to the rounding of sums in another order. NCCL on GPUs, gloo on CPUs. Rank 0 alone
prints, measures and writes, but for a state's files (states.py).

Data parallel (the default).  Every rank holds both models. Gradients are summed in buckets as soon
as the backward has made them, while the backward of the layers below goes on, or, after CUDA
graphs, at a step's end (`Reducer`).

Sharded (--shard).  For models that do not fit one GPU. Layer l of the teacher and layer l of the
student share their frozen tensors, so the two are one FSDP2 unit, a `Unit`, in which every tensor,
shared or not, is cut over the ranks once. A unit is gathered in the compute dtype when its layer is
at work and dropped after it, or, where memory has room for all (engine/fit.py), once a step, and
dropped by the backward of the step's last micro-batch (`gathered_once`): the weights change between
steps alone. Gradients are reduced in float32, onto float32 weights, after each micro-batch.
Embeddings, the last norm and the head are frozen and shared: each rank holds them whole.

With more ranks than blocks in a step, each block is cut along its tokens over the ranks that share
it (engine/sequence.py); ranks and blocks are multiples of each other.

Limits.  All ranks must see the same files. Stage 2 gathers the teacher's q, k and v with each layer
without using them.

Source.  PyTorch's FSDP2, torch.distributed.fsdp.fully_shard.
"""

import contextlib
import datetime
import itertools
import os
import re
import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn

from engine.peers import Watch
from hub.checkpoint import set_parameter
from model import Llama

# Ranks wait this long for each other: rank 0 measures and exports while the others do
_PATIENCE = datetime.timedelta(hours=2)
_REMEDY = "start several processes with torchrun, or unset it"


class World:
    """This process's place among all: rank, size, device; and what they do together."""

    def __init__(self, device: str):
        """Joins the process group that torchrun's variables describe; without them, one process.

        Raises ValueError where they are incomplete or contradict each other, as variables are that
        another program left behind.
        """
        self.rank, self.size = _variable("RANK", 0), _variable("WORLD_SIZE", 1)
        self.device, self.main = torch.device(device), self.rank == 0
        if self.rank >= self.size:
            raise ValueError(
                f"the environment's RANK is {self.rank} of {self.size} processes (WORLD_SIZE); "
                f"{_REMEDY}"
            )
        self.peers = Watch(first=self.main)  # from here on, a lost process leaves no other waiting
        if self.size == 1:
            if self.device.type == "cuda" and self.device.index is None:
                self.device = torch.device("cuda", torch.cuda.current_device())
            return
        needed = ["RANK", "MASTER_ADDR", "MASTER_PORT"]
        needed += ["LOCAL_RANK"] if self.device.type == "cuda" else []
        if missing := [name for name in needed if not os.environ.get(name)]:
            raise ValueError(
                f"the environment's WORLD_SIZE is {self.size}, and {', '.join(missing)} is not "
                f"set; {_REMEDY}"
            )
        if not 0 < _variable("MASTER_PORT", 0) < 1 << 16:
            raise ValueError(
                f"the environment's MASTER_PORT is {os.environ['MASTER_PORT']}, no port; {_REMEDY}"
            )
        if self.device.type == "cuda":
            local, there = _variable("LOCAL_RANK", 0), torch.cuda.device_count()
            if local >= there:
                raise ValueError(
                    f"LOCAL_RANK is {local} and this machine has {there} GPUs; lower "
                    "--nproc_per_node"
                )
            self.device = torch.device("cuda", local)
            torch.cuda.set_device(self.device)
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        try:
            dist.init_process_group(backend, timeout=_PATIENCE)
        except (dist.DistNetworkError, dist.DistStoreError) as e:
            place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            reason = str(e).splitlines()[0][:200]
            raise ValueError(
                f"the {self.size} processes cannot meet at {place} ({reason}); {_REMEDY}"
            ) from None
        if not self.main:
            sys.stdout = open(os.devnull, "w")  # rank 0 alone speaks

    def exit(self, code: int) -> None:
        """Ends the run with this exit code; returns where there is one process and the code is 0.

        All wait for all, as the first to go would cut the others' connections. Then the process
        ends without the interpreter's shutdown: on torch 2.13 with Python 3.11 a thread of the
        process group now and then aborts in it ("terminate called without an active exception"),
        although all its work is done.
        """
        if self.size > 1:
            dist.barrier()
            dist.destroy_process_group()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        if code:
            sys.exit(code)

    def on_main(self, f, *args):
        """f(*args) on rank 0 alone, its result on all; a ValueError there is raised on all, so that
        none waits.
        """
        if self.size == 1:
            return f(*args)
        answer = [None, None]
        if self.main:
            try:
                answer[0] = f(*args)
            except ValueError as e:
                answer[1] = str(e)
        dist.broadcast_object_list(answer, src=0, device=self.device)
        if answer[1] is not None:
            raise ValueError(answer[1])
        return answer[0]

    def on_all(self, f, *args) -> list:
        """[f(*args) of each rank], on all; a ValueError of any is raised on all."""
        if self.size == 1:
            return [f(*args)]
        answers = [None, None]
        try:
            answers[0] = f(*args)
        except ValueError as e:
            answers[1] = str(e)
        of_all = [None] * self.size
        dist.all_gather_object(of_all, answers)
        for _, error in of_all:
            if error is not None:
                raise ValueError(error)
        return [value for value, _ in of_all]

    def main_first(self, f, *args, **more):
        """f(...) of every rank, rank 0's before the others', who find on disk what it left there.

        A ValueError of rank 0's is raised on all.
        """
        made = []
        self.on_main(lambda: made.append(f(*args, **more)))
        return made[0] if made else f(*args, **more)

    def mean(self, values: Tensor) -> Tensor:
        """The mean over ranks of a tensor, any shape, on this rank's device; in place."""
        if self.size > 1:
            dist.all_reduce(values)
            values /= self.size
        return values

    def min(self, value: float) -> float:
        """The smallest of all ranks' numbers, so that all decide alike."""
        if self.size == 1:
            return value
        held = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(held, op=dist.ReduceOp.MIN)
        return held.item()


def _variable(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not re.fullmatch("[0-9]{1,9}", text):
        raise ValueError(f"the environment's {name} is {text[:40]!r}; {_REMEDY}")
    return int(text)


def lost(e: BaseException) -> bool:
    """Is this how torch says that another process has gone?"""
    gone = isinstance(e, dist.DistBackendError | dist.DistNetworkError)
    return gone or (isinstance(e, RuntimeError) and "/gloo/" in str(e))


class Reducer:
    """Sums gradients over ranks, in buckets: while the backward in which `last` is set makes them,
    or, with `inside` False, after it.

    A gradient of BUCKET bytes goes at once, as it is; smaller ones wait for each other and go as
    one copy. A mean is what comes out if each rank's loss is multiplied by `share` beforehand.
    """

    BUCKET = 2**26  # bytes: q_proj's of 7B. NVLink is near its rate from some 10 MB on

    def __init__(self, weights, world: World, inside: bool = True):
        sharded = any(hasattr(p, "device_mesh") for p in weights)  # FSDP reduces its own, to a mean
        self.weights = list(weights) if world.size > 1 and not sharded else []
        self.share = 1 / world.size if self.weights else 1.0
        self.inside, self.last = inside, False
        self.waiting, self.bytes = [], 0  # weights whose gradients wait for a bucket to be full
        self.sent: list[tuple] = []  # (handle, what is summed, the weights whose gradients it has)
        self.hooks = [
            p.register_post_accumulate_grad_hook(self._ready) for p in self.weights if inside
        ]

    def _ready(self, p: nn.Parameter) -> None:
        if not self.last:
            return
        if p.grad.nbytes >= self.BUCKET:
            return self._send(p.grad, [p])
        self.waiting.append(p)
        self.bytes += p.grad.nbytes
        if self.bytes >= self.BUCKET:
            self._send_waiting()

    def _send(self, numbers: Tensor, weights: list[nn.Parameter]) -> None:
        self.sent.append((dist.all_reduce(numbers, async_op=True), numbers, weights))

    def _send_waiting(self) -> None:
        if self.waiting:
            self._send(torch.cat([p.grad.flatten() for p in self.waiting]), self.waiting)
        self.waiting, self.bytes = [], 0

    def finish(self) -> None:
        """Gradients are whole after this."""
        if not self.inside:
            self.last = True
            for p in self.weights:
                self._ready(p)
        self._send_waiting()
        for handle, numbers, weights in self.sent:
            handle.wait()
            if numbers is weights[0].grad:
                continue
            parts = numbers.split([p.numel() for p in weights])
            grads = [p.grad for p in weights]
            torch._foreach_copy_(grads, [x.view_as(g) for x, g in zip(parts, grads, strict=True)])
        self.sent = []

    def close(self) -> None:
        """Takes the hooks off the weights."""
        for hook in self.hooks:
            hook.remove()


class Unit(nn.Module):
    """What FSDP gathers and drops together: one layer of each model. Called with the function that
    needs them.
    """

    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, f, *args):
        return f(*args)


class _Routed:
    """layer(...) by way of its unit, for whoever runs one model alone (stage 2, measuring)."""

    def __init__(self, unit: Unit, layer: nn.Module):
        # In a list: the unit must not become the layer's child
        self.unit, self.plain = [unit], layer.forward

    def __call__(self, *args):
        return self.unit[0](self.plain, *args)


def shard(teacher: Llama, student: Llama, world: World, dtype: torch.dtype) -> list[Unit]:
    """Cuts every layer of both over all ranks, in place; the rest goes to each rank whole."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    for model in (teacher, student):
        for name, p in model.named_parameters():
            if not name.startswith("model.layers."):
                p.data = p.data.to(world.device)
    mesh = init_device_mesh(world.device.type, (world.size,))
    low = dtype if dtype.itemsize < 4 else None
    policy = MixedPrecisionPolicy(
        param_dtype=low, reduce_dtype=low and torch.float32, cast_forward_inputs=False
    )
    units = [Unit(*pair) for pair in zip(teacher.model.layers, student.model.layers, strict=True)]
    for unit in units:
        fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        for layer in unit.layers:
            layer.forward = _Routed(unit, layer)
    root = fully_shard(Unit(*units), mesh=mesh, mp_policy=policy)
    # FSDP takes what runs first for the root; from here on units run on their own
    root(lambda: None)
    # A unit that runs on its own begins its gather when the GPU is done with the one before, which
    # therefore begins it instead, beside its own work
    for unit, after in itertools.pairwise(units):
        unit.set_modules_to_forward_prefetch([after])
    return units


def gathered(layer: nn.Module, f, *args):
    """f(*args), with the layer's weights whole while it runs, and again in its backward."""
    routed = vars(layer).get("forward")
    return routed.unit[0](f, *args) if isinstance(routed, _Routed) else f(*args)


@contextlib.contextmanager
def gathered_once(units: list[Unit], last: bool):
    """Around a step's micro-batch: it leaves units gathered for the next one. The step's last one
    leaves none, as the optimiser then changes what they were gathered from.
    """
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.set_reshard_after_backward(last, recurse=False)
    yield
    for unit in units:
        unit.set_reshard_after_forward(True, recurse=False)  # again, for whoever measures
        if last:
            unit.reshard()  # nothing is left to do where its backward has run


def unshard(student: Llama, world: World) -> None:
    """Puts the student's whole tensors back, on rank 0's CPU; the other ranks' student is unusable
    after.
    """
    for layer in student.model.layers:
        del layer.forward  # the class's own again
    for name, p in list(student.named_parameters()):
        full = whole(p)  # all ranks take part
        if world.main:
            full = nn.Parameter(full.cpu(), requires_grad=p.requires_grad)
            set_parameter(student, name, full)


def whole(p: Tensor) -> Tensor:
    """A tensor, any shape, of which a rank may hold a part, made whole. Every rank must ask."""
    return p.detach().full_tensor() if hasattr(p, "full_tensor") else p.detach()


def local(p: Tensor) -> Tensor:
    """The part that this rank holds of a tensor, any shape: all of it where nothing is sharded."""
    return p.detach().to_local() if hasattr(p, "to_local") else p.detach()


def rows(t: Tensor, world: World) -> Tensor:
    """The rows of a tensor [n, ...] that this rank saves: those that it holds or, where all ranks
    hold all, an equal share.
    """
    return local(t) if hasattr(t, "to_local") else t.detach().tensor_split(world.size)[world.rank]


def local_part(full: Tensor, like: Tensor) -> Tensor:
    """The part of `full`, any shape, that this rank holds of `like`, in its device and dtype."""
    full = full.to(like.device, like.dtype)
    if not hasattr(like, "device_mesh"):
        return full
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None)
