"""Runs a Gluon kernel's own source on a CPU, with asynchrony made as unkind as it may be.

Gluon has no interpreter. Here the functions marked `@gluon.jit` run as Python on torch tensors, their `gl`, `tma`,
`mbarrier` and `warpgroup_mma` replaced by the classes below:

    copies of the copy engine   land at once, or only when their barrier is waited for: the buffer holds NaN till then
    its stores and additions    read shared memory at once, or only when that is waited for; reach memory at once, or only
                                when that is waited for
    products                    read their operands when issued, or only when they are waited for
    fences                      what a thread stored in shared memory is for products and the copy engine only after one,
                                and so is what another program's counter announced for what the copy engine does next
    warp_specialize             every partition is a thread, one of which runs at a time; they change places at each
                                barrier operation, in an order drawn from a seed
    programs                    one after another, or `resident` side by side, begun in an order drawn from the seed: a
                                program begins when one of those before it has ended

So a read before its data, a buffer refilled too early, a wrong phase or count (which would hang: here an error), a wrong
byte count or a missing fence shows as an error or a wrong result, for any of the seeds; and so do programs that wait for
each other, or for one that cannot begin. Not seen: barriers between the warps of one partition, the copy engine's real
encoding, layouts, the launch.
"""

import ast
import functools
import random
import threading
import types
from pathlib import Path

import torch


class World:
    """What the running program shares: set anew by `run`."""

    pid, programs = 0, 1
    late_copy = late_product = late_store = False
    chance = random.Random(0)
    barriers = None
    dirty: dict = {}  # places in shared memory stored to without a fence, and by whom
    # .queue: products in flight; .stores: the copy engine's stores; .unfenced: whether another
    # program's counter was read and no fence followed; .turns: its scheduler
    partition = threading.local()


def _enter(turns=None):
    """A thread of the kernel's begins."""
    World.partition.queue, World.partition.stores = [], []
    World.partition.unfenced, World.partition.turns = False, turns


def _leave():
    """It ends. Its stores reach memory all the same; shared memory must have been read."""
    assert not World.partition.queue, "products left in flight"
    for store in World.partition.stores:
        assert store.value is not None, "the copy engine still reads shared memory at the end"
    written()


class Smem:
    def __init__(self, data, key):
        self.data, self.key, self.dtype, self.layout = data, key, data.dtype, None
        self.shape = list(data.shape)

    def index(self, i):
        assert 0 <= int(i) < self.data.shape[0]
        return Smem(self.data[int(i)], (*self.key, int(i)))

    def permute(self, order):
        return Smem(self.data.permute(order), self.key)

    def store(self, value):
        self.data.copy_(value)
        World.dirty[self.key] = threading.get_ident()

    def load(self, layout):
        return self.data.clone()


class Ptr:
    def __init__(self, storage, offset=0):
        self.storage, self.offset, self.dtype = (
            storage,
            offset,
            types.SimpleNamespace(element_ty=storage.dtype),
        )

    def __add__(self, o):
        return Ptr(self.storage, self.offset + o)

    def indices(self, mask):
        o = self.offset if mask is None else torch.where(mask, self.offset, 0)
        assert ((o >= 0) & (o < self.storage.numel())).all(), "out of bounds"
        return o


class Descriptor:
    """What the copy engine is told: a matrix, and the block it brings. Beyond the matrix it brings zeros."""

    def __init__(self, matrix, block):
        self.matrix, self.block, self.dtype, self.layout = matrix, block, matrix.dtype, None
        self.block_type = types.SimpleNamespace(
            nbytes=torch.Size(block).numel() * matrix.element_size()
        )

    def read(self, at):
        out = torch.zeros(self.block, dtype=self.dtype)
        source = self.matrix[
            tuple(slice(int(a), int(a) + b) for a, b in zip(at, self.block, strict=True))
        ]
        out[tuple(slice(0, s) for s in source.shape)] = source
        return out


# ---- products


class Product:
    def __init__(self, a, b, acc, use):
        self.a, self.b, self.acc, self.use, self.value = a, b, acc, use, None
        for z in (a, b):
            assert not isinstance(z, Smem) or z.key not in World.dirty, (
                "no fence between store and product"
            )

    def run(self):
        if self.value is None:
            a, b = (z.data.float() if isinstance(z, Smem) else z.float() for z in (self.a, self.b))
            acc = self.acc.run().value if isinstance(self.acc, Product) else self.acc
            self.value = a @ b + (acc if self.use else 0)
        return self


def warpgroup_mma(a, b, acc, use_acc=True, is_async=False):
    assert is_async
    product = Product(a, b, acc, use_acc)
    World.partition.queue.append(product)
    if not World.late_product:
        product.run()
    return product


def warpgroup_mma_wait(n, deps):
    queue = World.partition.queue
    while len(queue) > n:
        queue.pop(0).run()
    assert all(d not in queue for d in deps), "waited for too little"
    values = tuple(d.value for d in deps)
    return values[0] if len(values) == 1 else values


def fence_async_shared():
    here = threading.get_ident()
    World.dirty = {key: thread for key, thread in World.dirty.items() if thread != here}


# ---- what programs share in memory


class Store:
    """desc[at ...] = or += source, by the copy engine."""

    def __init__(self, desc, at, source, add):
        assert source.key not in World.dirty, "no fence between store and copy"
        assert not World.partition.unfenced, "no fence between another program's and this copy"
        self.desc, self.at, self.source, self.add = desc, at, source, add
        self.value = None
        World.partition.stores.append(self)
        if not World.late_store:
            written()

    def read(self):
        if self.value is None:
            self.value = self.source.data.clone()

    def write(self):
        self.read()
        place = self.desc.matrix[
            tuple(slice(int(a), int(a) + b) for a, b in zip(self.at, self.desc.block, strict=True))
        ]
        assert place.shape == self.value.shape, "out of bounds"
        place.copy_(place + self.value if self.add else self.value)


def written():
    for store in World.partition.stores:
        store.write()
    World.partition.stores.clear()


def reduce_add(desc, at, source):
    Store(desc, at, source, add=True)


def await_counter(p, count):
    count = int(count)
    turn(lambda: p.storage[int(p.offset)] >= count)
    World.partition.unfenced = True


def fence_global():
    World.partition.unfenced = False


# ---- barriers and copies


class mbarrier:
    @staticmethod
    def MBarrierLayout():
        return None

    @staticmethod
    def init(b, count):
        World.barriers[b.key] = types.SimpleNamespace(
            count=count, left=count, phase=0, bytes=0, pending=[]
        )

    @staticmethod
    def _arrive(s):
        assert s.left > 0, "one arrival more than the barrier counts"
        s.left -= 1
        mbarrier._complete(s)

    @staticmethod
    def _complete(s):
        assert s.left > 0 or s.bytes >= 0 or s.pending, "more bytes than were announced"
        if s.left == 0 and s.bytes == 0:
            s.left, s.phase = s.count, s.phase + 1

    @staticmethod
    def arrive(b, count=1):
        turn()
        mbarrier._arrive(World.barriers[b.key])
        turn()

    @staticmethod
    def expect(b, n, pred=True):
        if pred:
            s = World.barriers[b.key]
            s.bytes += int(n)
            mbarrier._arrive(s)

    @staticmethod
    def wait(b, parity):
        s = World.barriers[b.key]
        parity = int(parity)
        turn()
        turn(lambda: mbarrier._land(s) & 1 != parity)

    @staticmethod
    def _land(s):
        for destination, block, n in s.pending:
            destination.data.copy_(block)
            s.bytes -= n
        if s.pending:
            s.pending.clear()
            mbarrier._complete(s)
        return s.phase


class tma:
    @staticmethod
    def async_copy_global_to_shared(desc, at, b, destination, pred=True):
        if not pred:
            return
        s = World.barriers[b.key]
        block, n = desc.read(at), desc.block_type.nbytes
        assert list(block.shape) == destination.shape
        if World.late_copy:
            destination.data.fill_(float("nan"))
            s.pending.append((destination, block, n))
        else:
            destination.data.copy_(block)
            s.bytes -= n
            mbarrier._complete(s)

    @staticmethod
    def async_copy_shared_to_global(desc, at, source):
        Store(desc, at, source, add=False)

    @staticmethod
    def store_wait(n):
        stores = World.partition.stores
        for store in stores[: len(stores) - n]:
            store.read()


# ---- partitions


class Turns:
    """Threads of which one runs at a time."""

    def __init__(self, functions):
        self.waits, self.error = {}, None
        self.called = [threading.Semaphore(0) for _ in functions]
        self.threads = [
            threading.Thread(target=self._body, args=(n, f, a))
            for n, (f, a) in enumerate(functions)
        ]

    def _body(self, n, function, arguments):
        _enter((self, n))
        try:
            self.called[n].acquire()
            if not self.error:
                function(*arguments)
                _leave()
        except BaseException as e:
            self.error = self.error or e
        finally:
            del self.waits[n]
            self._next()

    def _next(self):
        """Calls one that need not wait; after an error all, to end."""
        if not self.error:
            ready = [n for n, holds in sorted(self.waits.items()) if holds is None or holds()]
            if ready:
                self.called[World.chance.choice(ready)].release()
            elif self.waits:
                self.error = AssertionError("every partition waits: it would hang")
        if self.error:
            for each in self.called:
                each.release()

    def pause(self, n, condition):
        self.waits[n] = condition
        self._next()
        self.called[n].acquire()
        if self.error:
            raise AssertionError("another partition failed")
        self.waits[n] = None

    def run(self):
        self.waits = dict.fromkeys(range(len(self.threads)))
        for t in self.threads:
            t.start()
        self._next()
        for t in self.threads:
            t.join()
        if self.error:
            raise self.error


def turn(condition=None):
    """Lets another partition run; returns when `condition` holds."""
    turns = getattr(World.partition, "turns", None)
    if turns is None:
        assert condition is None or condition(), "would hang"
    else:
        turns[0].pause(turns[1], condition)


# ---- the language


class _GL:
    float32, bfloat16, float16 = torch.float32, torch.bfloat16, torch.float16
    int32, int64 = torch.int32, torch.int64
    static_range = range

    def __getattr__(self, name):  # exp2, log2, abs
        return getattr(torch, name)

    def constexpr(self, x):
        return x

    def layout(self, *a, **k):
        return None

    NVMMADistributedLayout = SliceLayout = NVMMASharedLayout = DotOperandLayout = layout
    BlockedLayout = SwizzledSharedLayout = layout

    def barrier(self):
        pass

    thread_barrier = barrier

    def convert_layout(self, x, layout):
        return x

    def warp_specialize(self, functions, worker_num_warps, worker_num_regs):
        assert len(functions) - 1 == len(worker_num_warps) == len(worker_num_regs)
        World.begun.append(functions)

    def cdiv(self, a, b):
        return (a + b - 1) // b

    def program_id(self, _):
        return torch.tensor(World.pid)

    def num_programs(self, _):
        return World.programs

    def minimum(self, a, b):
        return torch.minimum(torch.as_tensor(a), torch.as_tensor(b))

    def maximum(self, a, b):
        return torch.maximum(torch.as_tensor(a), torch.as_tensor(b))

    def arange(self, a, b, layout=None):
        return torch.arange(a, b)

    def full(self, shape, v, dtype, layout=None):
        return torch.full(shape, v, dtype=dtype)

    def zeros(self, shape, dtype, layout=None):
        return torch.zeros(shape, dtype=dtype)

    def max(self, x, axis):
        return x.amax(axis)

    def sum(self, x, axis):
        return x.sum(axis)

    def where(self, m, a, b):
        return torch.where(m, a, b)

    def atomic_add(self, p, value, sem=None):
        before = p.storage[int(p.offset)].clone()
        p.storage[int(p.offset)] += value
        return before

    def atomic_xchg(self, p, value, sem=None, scope=None):
        turn()
        p.storage[int(p.offset)] = int(value)

    def load(self, p, mask=None, other=0.0, cache_modifier=None):
        return (
            p.storage[p.indices(None)]
            if mask is None
            else torch.where(mask, p.storage[p.indices(mask)], other)
        )

    def store(self, p, value, mask=None):
        mask = torch.tensor(True) if mask is None else mask
        o, value, mask = torch.broadcast_tensors(p.indices(mask), value, mask)
        p.storage[o[mask]] = value[mask]

    def allocate_shared_memory(self, dtype, shape, layout):
        unset = {torch.int64: 0, torch.int32: 2**31 - 1}.get(dtype, float("nan"))
        data = torch.full(shape, unset, dtype=dtype)
        return Smem(data, (next(self.names),))

    names = iter(range(10**9))


class _NotInPlace(ast.NodeTransformer):
    """a += b as a = a + b: in the language a value is never changed, and a tensor here may have two names."""

    def visit_AugAssign(self, node):
        read = ast.Name(node.target.id, ast.Load())
        return ast.Assign([node.target], ast.BinOp(read, node.op, node.value))


@functools.cache
def kernels(path: Path, changes: tuple[tuple[str, str], ...] = (), **names) -> dict:
    """The file's jitted functions as plain Python. `changes` are made in its text first: planted faults."""
    text = path.read_text()
    for old, new in changes:
        assert old in text, f"{path.name} holds no {old!r}"
        text = text.replace(old, new)
    tree = ast.parse(text)
    jitted = [
        f
        for f in tree.body
        if isinstance(f, ast.FunctionDef) and "gluon" in ast.dump(ast.List(f.decorator_list))
    ]
    for f in jitted:
        f.decorator_list = []
    tree = ast.fix_missing_locations(_NotInPlace().visit(ast.Module(jitted, [])))
    language = _GL()
    space = {
        "gl": language, "tma": tma, "mbarrier": mbarrier, "warpgroup_mma": warpgroup_mma, "barrier": language.barrier,
        "warpgroup_mma_wait": warpgroup_mma_wait, "fence_async_shared": fence_async_shared, **names,
    }  # fmt: skip
    exec(compile(tree, str(path), "exec"), space)
    # in the source: assembly, and a loop that polls
    space |= {"_reduce_add": reduce_add, "_written": written, "_await": await_counter}
    space |= {"_fence_global": fence_global}
    return space


def run(
    kernel,
    programs: int,
    *arguments,
    late_copy=False,
    late_product=False,
    late_store=False,
    seed=0,
    resident=0,
    **constants,
):
    """All programs; resident: how many are side by side, in any order (0: one by one, in theirs)."""
    World.late_copy, World.late_product, World.late_store = late_copy, late_product, late_store
    World.programs, World.chance = programs, random.Random(seed)
    World.barriers, World.dirty = {}, {}
    order = list(range(programs))
    if resident:
        World.chance.shuffle(order)
    ended = []

    def begin(pid) -> list:
        """What the program does before its partitions, and these."""
        World.pid, World.begun = pid, []
        _enter()
        kernel(*arguments, **constants)
        _leave()
        (functions,) = World.begun
        return functions

    def partition(position, left, function):
        def body(*arguments):
            turn(lambda: len(ended) > position - resident)
            function(*arguments)
            left.pop()
            if not left:
                ended.append(position)

        return body

    jobs = []
    for position, pid in enumerate(order):
        functions = begin(pid)
        if resident:
            left = [None] * len(functions)
            jobs += [(partition(position, left, f), a) for f, a in functions]
        else:
            Turns(functions).run()
    if jobs:
        Turns(jobs).run()
    assert not any(s.pending or s.bytes for s in World.barriers.values()), "copies left in flight"
