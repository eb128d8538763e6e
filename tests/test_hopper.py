"""kernel_hopper.py without a GPU: its source on a CPU with unkind asynchrony, its machine code from
the compiler.

gluon_emulator.py says what the emulation sees and what it does not. tests/test_gpu.py runs the
kernels themselves.
"""

import functools
import itertools
import math
from pathlib import Path
from types import SimpleNamespace

import gluon_emulator
import pytest
import torch
from test_kernel import SHARED, assert_runs_at_full_rate, compiled, nowhere, resources  # noqa: F401

triton = pytest.importorskip("triton")
gluon = pytest.importorskip("triton.experimental.gluon")

from triton.experimental.gluon import language as gl  # noqa: E402
from triton.experimental.gluon._runtime import GluonASTSource  # noqa: E402

import kernel_hopper  # noqa: E402
import kernel_host  # noqa: E402
import kernel_triton  # noqa: E402
from bench.marked import twice  # noqa: E402
from relation_kl import choose, relation_kl, workspace_bytes  # noqa: E402

SOURCE = Path(kernel_hopper.__file__)
LOG2E = math.log2(math.e)
bf16 = torch.bfloat16


def matrix(x):
    """What the copy engine is told of x, as a tensor; and whether heads are side by side."""
    shape, strides, side_by_side = kernel_hopper._matrix(x)
    return x.as_strided(shape, strides), side_by_side


def emulate(D, H, T, bthd, changes=(), together=1, bits=None, loud=None, **unkindness):
    """Errors of loss (the largest, relative to the loss above 1) and gradient (relative norm) of the
    emulated kernels against float64.

    together: heads that begin together in the backward; bits: a list that gets its gradient; loud:
    a token 40 times as long as the others.
    """
    g = torch.Generator().manual_seed(T)
    shape = (1, T, H, D) if bthd else (1, H, T, D)
    x = torch.randn(shape, generator=g).bfloat16()
    y = (x + 0.5 * torch.randn(shape, generator=g)).bfloat16()
    w = torch.randn(1, H, T, generator=g)
    if loud is not None:
        tokens = 1 if bthd else 2
        x.select(tokens, loud).mul_(40)
        y.select(tokens, loud).mul_(30)
    if bthd:
        x, y = x.transpose(1, 2), y.transpose(1, 2)
    wide = x.double().requires_grad_()
    kl = relation_kl(wide, y.double(), impl="dense")
    (dx,) = torch.autograd.grad(kl, wide, w.double())
    a = D**-0.5
    names = {"LN2": math.log(2), "NOTHING": -1e30, "FAR": 2.0**40}
    names |= {"BS": 64, "SLOTS": 2, "ADDERS": 3}
    space = gluon_emulator.kernels(SOURCE, tuple(changes), **names)
    matrices = [gluon_emulator.Descriptor(matrix(z)[0], [64, D]) for z in (x, y)]
    numbers = [torch.full((H * T,), float("nan")) for _ in range(3)]
    pointers = [gluon_emulator.Ptr(z) for z in (*numbers, w.view(-1))]

    def launch(name, table, *arguments, **more):
        workers, stages, registers = table[D]
        programs = -(-T // (64 * workers)) * H
        constants = {"D": D, "BTHD": bthd, "WORKERS": workers, "STAGES": stages, "num_warps": 4}
        constants |= dict.fromkeys(more, 0) | unkindness
        gluon_emulator.run(space[name], programs, *matrices, *arguments, **constants)

    scales = (a * LOG2E, a * LOG2E)
    heads = max(1, H - 1)  # a last group of fewer heads
    launch(
        "_forward_kernel", kernel_hopper.FORWARD, *pointers[:3], *scales, T, H, heads, REGISTERS=0
    )
    loss = ((numbers[0].view(1, H, T) - kl).abs() / kl.clamp(min=1)).max().item()
    rows = kernel_hopper._rows_of_sums(1, H, T, D)
    sums = torch.full((rows, D), float("nan"))
    turns = torch.zeros(1 + rows // 64, dtype=torch.int32)
    out = torch.full((H * T * D,), float("nan"), dtype=bf16)
    launch(
        "_backward_kernel",
        kernel_hopper.BACKWARD,
        gluon_emulator.Descriptor(sums, [64, D]),
        *(gluon_emulator.Ptr(z) for z in (sums.view(-1), turns)),
        *pointers[1:],
        gluon_emulator.Ptr(out),
        *scales,
        a,
        *((0, D, H * D) if bthd else (0, T * D, D)),
        *(T, H, H, together),
        ROW_REGISTERS=0,
        COLUMN_REGISTERS=0,
    )
    out = out.view(1, T, H, D).transpose(1, 2) if bthd else out.view(1, H, T, D)
    if bits is not None:
        bits.append(out)
    return loss, ((out.double() - dx).norm() / dx.norm()).item()


CASES = (
    (64, 2, 400, False),
    (64, 3, 256, True),
    (128, 1, 513, False),
    (64, 1, 63, False),
    (64, 2, 130, True),
)


@compiled
@pytest.mark.parametrize("late", ["", "copies", "products", "stores", "copies products stores"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_the_definition_however_late(case, late):
    for seed in range(2):
        loss, gradient = emulate(
            *case,
            late_copy="copies" in late,
            late_product="products" in late,
            late_store="stores" in late,
            seed=seed,
        )
        assert loss <= 1e-5 and gradient <= 4e-3


@functools.cache
def one_after_another(*case) -> torch.Tensor:
    """The gradient of programs that run in their order."""
    bits = []
    emulate(*case, bits=bits)
    return bits[0]


@compiled
@pytest.mark.parametrize("resident", [1, 3, 30])
@pytest.mark.parametrize("case", [(64, 3, 520, False), (128, 2, 400, True)], ids=str)
def test_same_bits_in_any_order_of_programs(case, resident):
    """Side by side, begun in any order, as few as one at a time: nothing hangs, nothing changes."""
    bits = [one_after_another(*case)]
    for seed in range(2):
        together = 1 + (case[1] - 1) * (seed % 2)  # one head or all
        unkind = {"late_copy": seed == 0, "late_product": seed == 1, "late_store": True}
        loss, gradient = emulate(
            *case, together=together, bits=bits, seed=seed, resident=resident, **unkind
        )
        assert loss <= 1e-5 and gradient <= 4e-3
    assert all(torch.equal(bits[0], other) for other in bits[1:])


# Where a group asks whether a row's sum has passed FAR
AGAIN = "_any_far(b_far, decided, WORKERS, ROW) > 0"
NEVER_AGAIN = (AGAIN, "_any_far(b_far, decided, WORKERS, ROW) > 1")
NEVER_FETCHED = (
    "BlockedLayout([2], [32], [1], [0])) > 0",
    "BlockedLayout([2], [32], [1], [0])) > 1",
)


@compiled
@pytest.mark.parametrize("bthd", [False, True])
def test_rows_far_above_their_pivots_are_computed_again(bthd):
    """A token 40 times as long as others: its scores pass 2^40 of a row's sum. As token 0, which
    pivots see, it needs no second pass.
    """
    case = (64, 1, 520, bthd)
    unkind = {"late_copy": True, "late_product": True}
    once = [NEVER_AGAIN, NEVER_FETCHED]
    for seed in range(2):
        for loud, changes, right in ((100, [], True), (100, once, False), (0, once, True)):
            loss, _ = emulate(*case, changes, loud=loud, seed=seed, **unkind)
            assert (loss <= 3e-5) == right
    # not all groups know, or not the fetching warp
    early = ("init(decided, count=WORKERS)", "init(decided, count=1)")
    for fault in (NEVER_AGAIN, NEVER_FETCHED, early):
        with pytest.raises(AssertionError):
            emulate(*case, [fault], loud=100, **unkind)


def test_rows_computed_again_are_counted_by_the_kernels_rule():
    """marked.py against the rule row by row, in float64."""
    g = torch.Generator().manual_seed(0)
    x, a = torch.randn(2, 600, 64, generator=g), 0.125
    x[0, 100] *= 40  # in head 1, token 0 is loud: pivots know it
    x[1, 0] *= 40
    rows = []
    for head in x.double():
        S = a * LOG2E * head @ head.mT
        for i in range(600):
            named = [j for j in range(i + 1) if j < 64 or j >= i // 256 * 256]
            pivot = S[i, named].max()
            rows.append((S[i, : i + 1] - pivot).exp2().sum() > 2.0**40)
    marked = torch.stack(rows).view(2, 600)
    assert marked[0].any() and not marked[1].any()
    again = sum(int(part.any()) for part in marked[0].split(256))
    assert twice(x, a) == (int(marked.sum()), again, 2 * 3)


@compiled
def test_tickets_name_every_piece_of_work_once_and_a_heads_in_order():
    names = {"BS": 64, "SLOTS": 2, "ADDERS": 3}
    ticket = gluon_emulator.kernels(SOURCE, (), **names)["_ticket"]
    for BH, HEADS, NB in itertools.product((1, 2, 6, 12), (1, 2, 3, 6), (1, 2, 3, 4, 7)):
        if BH % HEADS:
            continue
        turns = torch.zeros(1, dtype=torch.int32)
        told = [ticket(gluon_emulator.Ptr(turns), BH, HEADS, NB) for _ in range(BH * NB)]
        told = [(int(head), int(n)) for head, n in told]
        assert sorted(told) == list(itertools.product(range(BH), range(NB)))
        for head in range(BH):
            assert [n for h, n in told if h == head] == list(range(NB))


FAULTS = {
    "a tile freed before its product is done": (
        "    b_s, b_u = warpgroup_mma_wait(0, deps=(s, u))\n    _release(free, n, STAGES)\n",
        "    _release(free, n, STAGES)\n    b_s, b_u = warpgroup_mma_wait(0, deps=(s, u))\n",
    ),
    "a later tile freed before its product is done": (
        "        b_u = warpgroup_mma_wait(0, deps=(u,))\n        _release(free, n, STAGES)\n",
        "        _release(free, n, STAGES)\n        b_u = warpgroup_mma_wait(0, deps=(u,))\n",
    ),
    "a tile of others freed before it came": (
        "        mbarrier.wait(ready.index(n % STAGES), (n // STAGES) & 1)\n        _release",
        "        _release",
    ),
    "the other phase": ("mbarrier.wait(free.index(slot), ((n // STAGES) & 1) ^ 1)", "mbarrier.wait(free.index(slot), (n // STAGES) & 1)"),
    "a phase that never comes": ("mbarrier.wait(ready.index(slot), (n // STAGES) & 1)", "mbarrier.wait(ready.index(slot), 1)"),
    "own rows not waited for": ("    mbarrier.wait(ready.index(STAGES), 0)\n", ""),
    "S not waited for": ("b_p = gl.exp2(warpgroup_mma_wait(1, deps=(s,))", "b_p = gl.exp2(warpgroup_mma_wait(2, deps=(s,))"),
    "one byte count for two tiles": ("mbarrier.expect(ready.index(slot), 2 *", "mbarrier.expect(ready.index(slot), 1 *"),
    "a tile never freed": ("    _release(free, k, STAGES)\n    return b_dx", "    return b_dx"),
    "G not waited for": ("        mbarrier.wait(full.index(slot * WORKERS + g), (k // SLOTS) & 1)\n", ""),
    "G overwritten": ("    mbarrier.wait(gone.index(slot), ((k // SLOTS) & 1) ^ 1)\n", ""),
    "G's place given back before it is read": (
        "    b_part = warpgroup_mma_wait(0, deps=(part,))\n    _release(gone, k, SLOTS)\n",
        "    _release(gone, k, SLOTS)\n    b_part = warpgroup_mma_wait(0, deps=(part,))\n",
    ),
    "no fence behind G": ("    fence_async_shared()\n    barrier()\n    mbarrier.arrive(full", "    barrier()\n    mbarrier.arrive(full"),
    "no fence behind a partial sum": ("    fence_async_shared()\n    barrier()\n    mbarrier.arrive(staged", "    barrier()\n    mbarrier.arrive(staged"),
    "a partial sum overwritten": ("    mbarrier.wait(emptied, (k & 1) ^ 1)\n", ""),
    "its place given back before it is read": ("        tma.store_wait(0)\n", ""),
    "a partial sum not waited for": ("        mbarrier.wait(staged.index(a), (k // ADDERS) & 1)\n", ""),
    "out of turn": ("        _await(turns + k, turn)\n", ""),
    "no fence behind another's turn": ("        _fence_global()\n", ""),
    "the next told before it is in memory": ("        _written()\n", ""),
    "sums read before all is added": ("    mbarrier.wait(done, 0)", "    pass"),
    "done when one warp is": ("mbarrier.init(done, count=ADDERS)", "mbarrier.init(done, count=1)"),
    "the first adds to nothing": ("if turn == 0:", "if turn < 0:"),
    "work by number, not by ticket": ('gl.atomic_add(turns, 1, sem="relaxed")', "gl.program_id(0)"),
    "first rows first": ("i_0 = (NB - 1 - turn) * BS", "i_0 = turn * BS"),
}  # fmt: skip


@compiled
@pytest.mark.parametrize("fault", FAULTS)
def test_the_emulation_catches_planted_faults(fault):
    caught = False
    for seed in range(12):
        try:
            unkind = {"late_copy": seed // 2 % 2 == 0, "late_product": True, "late_store": True}
            unkind["resident"] = (0, 2, 4)[seed % 3]
            case = ((64, 2, 700, False), (128, 1, 700, True))[seed % 2]
            loss, gradient = emulate(*case, [FAULTS[fault]], seed=seed, **unkind)
            caught |= not (loss <= 1e-5 and gradient <= 4e-3)
        except AssertionError:
            caught = True
        if caught:
            break
    assert caught


@compiled
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_compiles_for_hopper(direction, D, tmp_path):
    kernel = getattr(kernel_hopper, f"_{direction}_kernel")
    workers, stages, registers = getattr(kernel_hopper, direction.upper())[D]
    named = ("REGISTERS",) if direction == "forward" else ("ROW_REGISTERS", "COLUMN_REGISTERS")
    constants = {
        "D": D,
        "BTHD": True,
        "WORKERS": workers,
        "STAGES": stages,
        **dict(zip(named, registers, strict=True)),
        "num_warps": 4,
    }
    layouts = {"bf16": kernel_hopper._layout(D), "fp32": kernel_hopper._layout(D, gl.float32)}
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in ("x", "y", "sums"):
            dtype = "fp32" if name == "sums" else "bf16"
            signature[name] = f"tensordesc<{dtype}[64, {D}],{layouts[dtype]!r}>"
        elif name in ("kl", "s_lse", "t_lse", "w", "dx", "p_sums", "turns"):
            signature[name] = {"dx": "*bf16", "turns": "*i32"}.get(name, "*fp32")
        else:
            signature[name] = "fp32" if name.endswith("scale") else "i32"
    aligned = [
        i for i, (name, type) in enumerate(signature.items()) if type[0] == "*" or "stride" in name
    ]
    source = GluonASTSource(
        kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned}
    )
    target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    made = triton.compile(source, target=target, options={"num_warps": 4})
    registers, stack = resources(made.asm["cubin"], tmp_path / "kernel.cubin")
    print(
        f"{direction:8} D {D:3} {stack:3} bytes spilled, {made.metadata.shared / 1024:5.1f} KiB shared"
    )
    assert made.metadata.shared <= SHARED[90]
    waits = 2 if direction == "forward" else 3  # for S, for U, for dL/dx
    for loop in assert_runs_at_full_rate(made, waits, tmp_path):
        if direction == "forward" and loop.count("WARPGROUP.DEPBAR.LE") == 2:
            # ptxas may put exponentials of S behind U: 17.3 ms for 15.3 at 32 x 32768 x 128
            s = loop.index("WARPGROUP.DEPBAR.LE")
            u = loop.index("WARPGROUP.DEPBAR.LE", s + 1)
            assert "MUFU" in loop[s:u], "S waits for U"


@compiled
def test_a_kept_kernel_is_launched_as_triton_would(nowhere):  # noqa: F811
    """Same machine code, same arguments, whatever was launched before: layouts, D, strides and
    pointers choose the code, numbers do not.
    """
    z = torch.randn(2, 40, 3, 64).to(bf16)
    cases = [z.transpose(1, 2), torch.randn(2, 3, 40, 64).to(bf16)]
    cases += [torch.randn(2, 3, 40, 128).to(bf16), torch.randn(1, 5, 90, 64).to(bf16)]

    def launches(x):
        nowhere.calls.clear()
        numbers = kernel_hopper.forward(x, x.clone(), 0.2, 0.3, True, None)
        off = torch.empty(numbers[0].numel() + 1)[1:].view_as(numbers[0])  # 4 bytes off
        for w in (numbers[0], off):
            kernel_hopper.backward(w, *numbers[1:], x, x.clone(), 0.2, 0.3, True, None)
        described = lambda a: (a.shape, a.strides, a.block_shape)  # noqa: E731
        return [
            [a.dtype if isinstance(a, torch.Tensor) else described(a) if hasattr(a, "block_shape") else a for a in call]
            for call in nowhere.calls
        ]  # fmt: skip

    kept = [launches(x) for _ in range(2) for x in cases][len(cases) :]
    for x, ours in zip(cases, kept, strict=True):
        kernel_host._compiled.clear()
        assert ours == launches(x) and len(ours) == 3


# ---- what it takes


def test_matrices_of_the_copy_engine():
    """[B, H, T, D] and a transpose of [B, T, H, D] are read in place, slices of a fused projection
    are not.
    """
    x = torch.randn(2, 3, 40, 64, dtype=bf16)
    m, side_by_side = matrix(x)
    assert torch.equal(m.view_as(x), x) and not side_by_side
    z = torch.randn(2, 40, 3, 64, dtype=bf16)
    m, side_by_side = matrix(z.transpose(1, 2))
    assert torch.equal(m.view_as(z), z) and side_by_side
    assert (
        kernel_hopper._matrix(torch.zeros(2, 40, 3, 2, 64, dtype=bf16)[:, :, :, 0].transpose(1, 2))
        is None
    )
    assert kernel_hopper._matrix(torch.zeros(1, 1, 40, 65, dtype=bf16)[..., 1:]) is None
    y = torch.randn(2, 40, 3, 64, dtype=bf16).transpose(1, 2)
    same = kernel_hopper._laid_out(x, y)
    assert same[0] is x and torch.equal(same[1], y) and same[1].stride() == x.stride()
    off = torch.randn(x.numel() + 1).to(bf16)[1:].view_as(x)  # contiguous, but 2 bytes off
    for moved in (kernel_hopper._laid_out(off, x)[0], kernel_hopper._laid_out(x, off)[1]):
        assert torch.equal(moved, off) and matrix(moved)


def test_refuses_in_a_sentence():
    x = torch.zeros(1, 1, 4, 64, dtype=bf16)
    with pytest.raises(
        ValueError, match=r"needs compute capability 9\.0, and the tensors are on cpu"
    ):
        relation_kl(x, x, impl="hopper")
    assert choose(x)[0] == "tiled"


def test_says_what_it_does_not_take(monkeypatch):
    monkeypatch.setattr(kernel_hopper, "_chip_reason", lambda device: None)
    x = torch.zeros(1, 1, 4, 64, dtype=bf16)
    assert kernel_hopper.unsupported(x, True, None, (1.0, 1.0)) is None
    assert "not torch.float16" in kernel_hopper.unsupported(x.half(), True, None, (1.0, 1.0))
    assert "and 80" in kernel_hopper.unsupported(
        torch.zeros(1, 1, 4, 80, dtype=bf16), True, None, (1.0, 1.0)
    )
    assert "causal" in kernel_hopper.unsupported(x, False, None, (1.0, 1.0))
    assert "lengths" in kernel_hopper.unsupported(x, True, torch.tensor([4]), (1.0, 1.0))
    assert "positive" in kernel_hopper.unsupported(x, True, None, (1.0, -1.0))


def test_the_plan_counts_what_the_backward_allocates(nowhere, monkeypatch):  # noqa: F811
    monkeypatch.setattr(kernel_hopper, "_launch", lambda *_: None)
    seen = []
    for name in ("new_empty", "new_zeros"):
        make = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda *a, make=make, **k: seen.append(make(*a, **k)) or seen[-1]
        )
    for B, H, T, D in ((1, 1, 1, 64), (2, 3, 1000, 128), (1, 9, 500, 64)):
        seen.clear()
        x, w = torch.zeros(B, H, T, D, dtype=bf16), torch.zeros(B, H, T)
        kernel_hopper.backward(w, w, w, x, x, 0.1, 0.1, True, None)
        assert sum(z.nbytes for z in seen) == workspace_bytes(B, H, T, D)
    assert workspace_bytes(1, 1, 1000, 80) == 0


@pytest.mark.parametrize(
    "B, H, T, D, chosen",
    [
        (2, 9, 512, 64, "triton"),
        (1, 18, 1024, 64, "triton"),  # 108 programs of 192 rows
        (1, 22, 1024, 64, "hopper"),  # 132
        (1, 9, 2816, 64, "hopper"),
        (1, 9, 2048, 128, "hopper"),  # 144 of 128 rows
        (1, 4, 4096, 128, "triton"),  # 128
        (2, 36, 300, 64, "triton"),  # timed: 46 us, and 63 by the chip's own
        (8, 9, 385, 64, "triton"),  # 57 and 71
        (8, 36, 512, 64, "triton"),
        (8, 36, 513, 64, "hopper"),
        (8, 9, 1024, 64, "hopper"),  # 168 and 153
        (8, 9, 512, 128, "hopper"),  # 115 and 97
        (8, 32, 256, 128, "triton"),  # beginning takes as long as the rows
        (8, 32, 257, 128, "hopper"),
    ],
)
def test_auto_takes_the_plain_kernel_where_rows_are_few(monkeypatch, B, H, T, D, chosen):
    monkeypatch.setattr(kernel_hopper, "_chip_reason", lambda device: None)
    monkeypatch.setattr(kernel_triton, "unsupported", lambda x: None)
    x = SimpleNamespace(is_cuda=True, device="cuda", dtype=bf16, shape=(B, H, T, D))
    assert choose(x)[0] == chosen
    assert choose(x, causal=False)[0] == "triton"
