"""Extends a LLaMA's context: stretch its positions, repair it by self-distillation, train a little.

    python train.py --teacher DIR --scale 8       both stages, then an export that loads everywhere
    python train.py                               the same on the teacher and text at hand offline
    torchrun --nproc_per_node 8 train.py --batch1 8 --batch2 8 ...     the same on eight GPUs

Stage 1.  Teacher and student read the same block, the teacher with its native RoPE, the student
with the stretched one, and advance in lock-step, one layer at a time. In every layer the loss of
relation_kl.py compares their q, k and v:

    L = mean over layers of (KL_Q/Q + KL_K/K + KL_V/V) + weight * KL of the next-token distributions

each relation a mean over its own rows and heads. Only the q, k and v projections learn; every other
tensor of the student IS the teacher's.

What the last term adds.  One rotation of all keys of a head leaves its relations as they are
(relation_kl.py). Turn the keys of the last layer as if every token stood one further on: the
relations of all layers are still perfect, and every query looks one token beside what it means. The
next-token distributions change, and the gradient of their KL leads back:
        pytest tests/test_model.py::test_the_next_token_kl_sees_the_turn_that_no_relation_sees

Stage 2.  The student alone learns to predict the next token: L2 = next-token loss. With
--native-blocks n, stage 1's L is added, over n blocks of stage 1's length beside each long one, so
that what stage 1 won is kept.

Lengths.  Stage 1 reads short blocks (512 or 2048 tokens), stage 2 long ones (up to 16K, or the
native length where that is more), the student under the stretched positions. engine/plan.py
chooses lengths, rates and tokens that no flag gives.

Precision.  float32 masters of what learns; bfloat16 compute on a GPU and on CPUs with bfloat16
units, else float32.

--out DIR gets cache/ (tokenised text, unless --cache says where); when training begins, run.json
(arguments, versions, seed) and metrics.jsonl (a line per step); every --save-minutes, state/ (for
--resume) and curves.png; at the end, report.json, .md and .png (what was lost, what came back) and
student/, the Hugging Face directory; with --lora-rank adapter/, with --tensorboard tensorboard/.
.linear-ard.json lists these; a run holds .linear-ard.lock.

Exit codes: 0 done; 2 refused or cannot go on, and one sentence says why; 3 stopped by Ctrl-C,
SIGTERM or SIGHUP, the state saved if training had begun. torchrun's own is 1 for all but 0.

Limits.  Documents run on across block borders. The authors divide the K/K and V/V losses by the
number of query heads even where keys are shared: --preset authors does as they do.

Source.  LinearARD, arXiv 2604.00004; the shape of this script, nanoGPT's train.py.
"""

from engine import exits  # first: from here on, a Ctrl-C ends in one line  # isort: skip

import dataclasses
import functools
import sys
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

import eval as evaluation
from engine import cost, data, flags, folder, graph, lora, parallel, plan, resume, watch
from engine.lookups import Lookups
from evals import report
from hub import checkpoint, download, files
from hub.card import licence_of, model_card
from hub.tokenizer import load_tokenizer
from model import (
    TRAINED,
    Llama,
    LlamaConfig,
    by_chunks,
    choose_dtype,
    make_student,
    next_token_loss,
    trainable,
)
from relation_kl import relation_kl

# ---- stage 1's loss


def relation_loss(
    teacher: Llama,
    student: Llama,
    ids: Tensor,
    dtype: torch.dtype,
    *,
    impl: str = "auto",
    checkpointing: bool = False,
    authors_heads: bool = False,
    logit_weight: float = 0.0,
    relations: str = "qkv",
    units: list | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, relations [L, 3], next-token KL) of both models over ids [B, T], in nats.

    The last two carry no gradient. Both models advance together, so that the q, k and v of only one
    layer of each are alive at a time. With `checkpointing` a layer keeps its two inputs [B, T, C]
    and the losses' numbers per row; the rest is computed again in the backward. Without the logit
    term the last layer ends at its q, k and v, as no loss depends on more. units: with --shard,
    what gathers layer l of both models while a function runs (engine/parallel.py).
    """
    B, T = ids.shape
    L, H, Hkv = (getattr(teacher.config, k) for k in ("n_layer", "n_head", "n_kv_head"))
    with torch.no_grad():
        h_teacher = teacher.embed(ids, dtype)
    h_student = student.embed(ids, dtype)
    turns = teacher.cos_sin(T, h_teacher), student.cos_sin(T, h_student)
    # YaRN multiplies q and k by its attention factor. Left in, the student would learn to undo it
    scales = teacher.score_scale(T), student.score_scale(T)

    def advance(l: int, h_teacher: Tensor, h_student: Tensor, kept=(None, None, None)):
        """Layer l of both: (teacher's h, student's h, mean KL [3]). kept: see relation_kl."""
        last = l + 1 == L and not logit_weight
        with torch.no_grad():
            h_teacher, theirs = _layer(teacher.model.layers[l], h_teacher, turns[0], last)
        h_student, ours = _layer(student.model.layers[l], h_student, turns[1], last)
        parts = []
        for r, (x, y, k) in enumerate(zip(ours, theirs, kept, strict=True)):  # Q/Q, K/K, V/V
            b, a = scales if r < 2 else (x.shape[-1] ** -0.5,) * 2
            parts.append(relation_kl(x, y, scale=a, teacher_scale=b, impl=impl, kept=k).mean())
        return h_teacher, h_student, torch.stack(parts)

    table = []
    for l in range(L):
        run = advance
        if checkpointing and torch.is_grad_enabled():
            run = functools.partial(advance, kept=([], [], []))
            run = functools.partial(recompute, run, use_reentrant=False)
        if units:
            run = functools.partial(units[l], run)
        h_teacher, h_student, parts = run(l, h_teacher, h_student)
        table.append(parts)
    table = torch.stack(table)  # [L, 3]
    shared = Hkv / H if authors_heads else 1.0
    weights = (float("q" in relations), shared * ("k" in relations), shared * ("v" in relations))
    loss = sum(w * table[:, r].mean() for r, w in enumerate(weights))
    if not logit_weight:
        return loss, table.detach(), torch.zeros_like(loss.detach())
    kl = logit_kl(teacher, student, h_teacher, h_student)
    return loss + logit_weight * kl, table.detach(), kl.detach()


def _layer(layer: nn.Module, h: Tensor, turn: tuple[Tensor, Tensor], last: bool):
    if last:
        return h, layer.self_attn.qkv(layer.input_layernorm(h), turn)
    # Not layer(...): a sharded layer's unit is gathered already
    return type(layer).forward(layer, h, turn)


def logit_kl(
    teacher: Llama, student: Llama, h_teacher: Tensor, h_student: Tensor, chunk: int = 4096
) -> Tensor:
    """Mean KL(teacher || student) of the next-token distributions, in nats.

    h_teacher, h_student: [B, T, C] before the last norm. At most [chunk, V] logits of each exist at
    once.
    """

    def part(x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            log_r = teacher.lm_head(teacher.model.norm(y)).float().log_softmax(-1)
        log_p = student.lm_head(student.model.norm(x)).float().log_softmax(-1)
        return F.kl_div(log_p, log_r, log_target=True, reduction="none").sum(-1)  # [<= chunk]

    return by_chunks(part, chunk, h_student.flatten(0, 1), h_teacher.flatten(0, 1)).mean()


# ---- both stages


def main(argv: list[str] | None = None) -> None:
    """One run, from the command line to the exported directory; see the head of this file."""
    args = flags.parse(argv, __doc__)  # nothing changes args after this line
    world = parallel.World(args.device)  # this process, or torchrun's many
    device, (dtype, why) = world.device, choose_dtype(world.device, args.dtype)

    # ---- plan: what can be refused without text and weights is refused here; nothing is written
    native = LlamaConfig.from_hf(files.read_json(args.teacher / "config.json"))
    longer = native.extended(args.rope or plan.rope_kind(native), args.scale)
    tokenizer = load_tokenizer(args.teacher)
    stages = plan.make_stages(args, native, longer)
    plan.check(args, native, longer, stages, world.size)
    apart = {"--teacher": args.teacher} | {f"--data {p}": p for p in args.data}
    check = functools.partial(folder.check, args.out, "--out", "train.py", resume=args.resume)
    if args.resume or not args.dry_run:
        world.on_main(lambda: check(apart=apart))
    free = int(world.min(cost.free_memory(device)))
    peak = (args.peak_tflops or 0) * 1e12 or world.on_main(cost.peak_flops, device, dtype)
    shards = world.size if args.shard else 1
    # of each stage: blocks at a time, recompute activations?, memory by part
    settle = functools.partial(plan.settle, native, dtype=dtype, device=device, free=free)
    settle = functools.partial(settle, micro=args.micro, rank=args.lora_rank, shards=shards)
    settled = [settle(s, own=s.batch // world.size) for s in stages]
    needs = [need for _, _, need in settled]
    print(plan.describe(native, longer, stages, needs, args.lora_rank))
    print(plan.describe_loss(args, stages))
    print(f"compute: {str(dtype)[6:]}, because {why}")
    impl, why = plan.relation_impl(args, native, dtype, device)
    print(f"relation loss: {impl}, because {why}")
    print(plan.describe_time(native, stages, args.lora_rank, peak, world.size, args.peak_tflops))
    for stage, need in zip(stages, needs, strict=True):
        plan.refuse_if_too_large(need, free, stage)
    if args.dry_run and not args.resume:
        return world.exit(0)
    depends = world.on_main(resume.matters, args, stages)
    if args.dry_run:
        world.on_main(resume.find, args, depends, stages)
        return world.exit(0)

    with folder.Folder(args.out, "train.py", active=world.main) as out:
        world.on_main(lambda: check(apart=apart))  # another run may have come and gone since

        # ---- where to begin: at zero, or where the newest good state says
        at = world.on_main(resume.find, args, depends, stages)

        # ---- models: the student's tensors ARE the teacher's, but for float32 copies of q, k and v
        place = "cpu" if args.shard else str(device)
        teacher = Llama.from_pretrained(args.teacher, dtype=dtype, device=place)
        student = make_student(teacher, longer, trained=() if args.lora_rank else TRAINED)
        if args.lora_rank:
            torch.manual_seed(args.seed)
            lora.adapt(student, TRAINED, args.lora_rank, args.lora_alpha, args.lora_dropout)
        else:  # the copies start from the stored numbers, not from their rounding to `dtype`
            stored = checkpoint.read_tensors(args.teacher, list(trainable(student)))
            for name, value in stored.items():
                student.get_parameter(name).data.copy_(value)
        units = parallel.shard(teacher, student, world, dtype) if args.shard else None
        weights = trainable(student)
        if at.state:
            resume.load(at.state, weights, None, 0)

        # ---- text: tokenised once, by the first process, when all else is known to be right
        def enough(corpus: data.Corpus) -> None:
            documents = Lookups(tokenizer, corpus.train) if args.lookups else None
            plan.check_text(corpus, stages, documents)
            resume.same_text(at, corpus.digest)
            out.add(*out.owned(args.cache))  # the text will be worth keeping

        with files.disk_sentences(args.cache):
            corpus = world.main_first(
                data.load_corpus, args.data, tokenizer, args.cache, without=args.out, check=enough,
                field=args.text_field,
            )  # fmt: skip
        depends["text"] = corpus.digest
        for note in corpus.notes:
            print(note)
        print(plan.describe_text(corpus, stages))
        lookups = Lookups(tokenizer, corpus.train) if args.lookups else None
        held_out = evaluation.HeldOut(
            corpus, tokenizer, native.rope.length, args.scale, args.eval_blocks
        )
        stop, saved = resume.StopRequest(), time.time()
        versions = evaluation.versions(device) | {"processes": world.size}
        about = {"arguments": depends, "versions": versions}
        about |= {"text": corpus.name, "command": sys.argv}
        if world.main:
            log = watch.Watch(out, stages, native, args, peak, world.size, about, at.total)

        def save() -> None:
            """All processes gather; the first one writes."""
            tensors = resume.gather(weights, optimiser, keep=world.main)
            with files.disk_sentences(args.out, resume.kept(at)):
                world.on_main(resume.write, out, tensors, at, depends)

        def measure(name: str, model: Llama) -> None:
            """A column of the table, filled by the first process, or by all of a sharded model."""
            if held_out.blocks and name not in at.columns:
                measured = held_out.measure
                at.columns[name] = measured(model) if args.shard else world.on_main(measured, model)

        measure(report.TEACHER, teacher)
        measure(report.UNTRAINED, student)

        # ---- the stages: one loop, two objectives
        for number in range(at.stage, len(stages)):
            stage, (micro, checkpointing, _) = stages[number], settled[number]
            optimiser = torch.optim.AdamW(
                weights.values(), lr=stage.lr, betas=(0.9, 0.95), weight_decay=0.0,
                fused=device.type == "cuda" and not args.shard,
            )  # fmt: skip
            if at.step:
                resume.load(at.state, weights, optimiser, at.step)
            reducer = parallel.Reducer(weights.values(), world)  # averages gradients over processes

            def losses(part: cost.Stage, piece: Tensor, again: bool = checkpointing) -> tuple:
                """The loss of a piece [n, T + 1] of a step's blocks, and what else is logged."""
                if part.objective == "relation":  # relate tokens as the teacher does
                    return relation_loss(
                        teacher, student, piece[:, :-1], dtype, impl=impl, checkpointing=again,
                        authors_heads=args.authors_heads, logit_weight=args.logit_weight,
                        relations=args.relations, units=units,
                    )  # fmt: skip
                h = student.hidden(piece[:, :-1], dtype, again)  # predict the next token
                return (next_token_loss(student, h, piece[:, 1:]),)

            record, why = graph.wanted(device, world.size, checkpointing, args.lora_dropout)
            gradients = graph.Recorded(losses, list(weights.values()), record)
            print(f"{stage.name}: CUDA graph {'on' if record else 'off'}, because {why}")
            if world.main:
                log.begin(number, at.step)
            for step in range(at.step, stage.steps):
                began = time.time()

                # this step's blocks, a function of seed and step alone, a few at a time
                figures = watch.Figures(native.n_layer, device)
                gradients.zero()
                try:
                    for part, few in ((stage, micro), (stage.beside, args.micro)):
                        if part is None:
                            continue
                        mine = part.batch // world.size
                        first = step * part.batch + world.rank * mine
                        seed = data.seed_of(args.seed, number, part is stage.beside)
                        ids = corpus.batch(seed, first, mine, part.T)  # [mine, T + 1]
                        ids = lookups.mix(ids, seed, first, args.lookups) if lookups else ids
                        ids = ids.to(device)
                        few = 1 if args.lora_dropout else few  # whose noise has a seed per block
                        few = cost.at_a_time(part, few, mine)
                        for begin in range(0, mine, few):
                            piece = ids[begin : begin + few]
                            resume.reseed(args.seed, at.total, first + begin)
                            reducer.last = part is (stage.beside or stage) and begin + few >= mine
                            share = len(piece) / mine
                            figures.add(part, gradients(part, piece, share), share)
                    reducer.finish()

                    # all processes agree: on the figures, whether to stop, whether to save
                    late = world.main and time.time() - saved > 60 * args.save_minutes
                    stopping, saving = figures.agree(world, bool(stop), late)
                    grads = [w.grad for w in weights.values()]
                    norm = parallel.whole(torch.nn.utils.get_total_norm(grads))
                    watch.refuse_non_finite(
                        world, stage, step, figures, float(norm), weights, student, ids, at
                    )

                    # update
                    torch.nn.utils.clip_grads_with_norm_(weights.values(), 1.0, norm)
                    for group in optimiser.param_groups:
                        group["lr"] = plan.learning_rate(stage, step)
                    optimiser.step()
                except (MemoryError, RuntimeError) as e:
                    if exits.ran_out(e):
                        raise plan.out_of_memory(stage, device, resume.kept(at)) from None
                    raise

                # log, save
                at.step, at.total = step + 1, at.total + 1
                if world.main:
                    lr, seconds = group["lr"], time.time() - began
                    log.step(at.total - 1, step, figures, float(norm), lr, seconds, device)
                if stopping or saving:
                    save()
                    saved = time.time()
                    if world.main:
                        log.draw(patience=60)
                if stopping:
                    print(f"\nstopped after step {step + 1} of {stage.name}; --resume goes on")
                    out.close()
                    return world.exit(exits.STOPPED)
            reducer.close()
            if world.main:
                log.end()
            measure(stage.name, student)
            at.stage, at.step = number + 1, 0
            save()

        # ---- report and export: a Hugging Face directory, read back before it counts
        if args.shard:
            parallel.unshard(student, world)
        world.on_main(export, out, args, student, native, longer, stages, at.columns, about)
        if tokenizer.note:
            print(f"note: {tokenizer.note}")
        stop.close()
        if world.main:
            log.close()
        out.close()
        world.exit(0)


def export(out, args, student, native, longer, stages, columns, about) -> None:
    """The table, the adapter, and the Hugging Face directory."""
    with files.disk_sentences(args.out, ". The last saved state is kept: --resume goes on from it"):
        shares = report.recovered(columns, "loss at 1x") if columns else {}
        text = report.write(out, columns, shares, about) if columns else ""
        if args.lora_rank:
            with out.directory("adapter") as work:
                lora.write_adapter(student, work, str(args.teacher), TRAINED)
        card = model_card(
            download.model_name(args.teacher),
            before=str(native.rope),
            after=str(longer.rope),
            kind=longer.rope.kind,
            length=longer.rope.length,
            stages=[dataclasses.asdict(stage) for stage in stages],
            scores=text,
            arguments=about["arguments"],
            base_model=download.repository_of(args.teacher),
            licence=licence_of(args.teacher),
        )
        with out.directory("student") as work:
            checkpoint.write_pretrained(
                lora.merge(student), work, tokenizer_from=args.teacher, card=card,
                dtype=checkpoint.stored_dtype(args.teacher), frozen_from=args.teacher,
                trained=TRAINED,
            )  # fmt: skip
    at = args.out / "student"
    print(f"\n{text}\n" if text else "")
    print(f"exported to {at} ({longer.rope.length:,} tokens of context); next:")
    text = " ".join(["", "--data", *map(str, args.data)]) if args.data else ""
    print(f"  python eval.py --model {at} --against {args.teacher}{text}")


if __name__ == "__main__":
    exits.run(main, "train.py")
