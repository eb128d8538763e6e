"""Extends a LLaMA's context: stretch its positions, repair it by self-distillation, train a little.

    python train.py --teacher DIR --scale 8       both stages, then an export that loads everywhere
    python train.py                               the same on the teacher and text at hand offline
    torchrun --nproc_per_node 8 train.py --batch1 8 --batch2 8 ...     the same on eight GPUs

Stage 1.  Teacher and student read the same block, the teacher with its native RoPE, the student
with the stretched one, and advance in lock-step, one layer at a time. In every layer the loss of
relation_kl.py compares their q, k and v:

    L = mean over layers of (KL_Q/Q + KL_K/K + KL_V/V) + weight * KL of the next-token distributions

each relation a mean over its own rows and heads: `relation_loss`. Where keys have biases, K/K would
compare bias with bias and is left out (--relations). Only the q, k and v projections learn; every
other tensor of the student IS the teacher's.

What the last term adds.  It is ours: the paper has the relations alone (--logit-weight 0). One
rotation of all keys of a head leaves its relations as they are (relation_kl.py). Turn the keys of
the last layer as if every token stood one further on: the relations of all layers are still
perfect, and every query looks one token beside what it means. The next-token distributions change,
and the gradient of their KL leads back:
        pytest tests/test_model.py::test_the_next_token_kl_sees_the_turn_that_no_relation_sees

Stage 2.  The student learns to predict the next token in long blocks: `next_token_loss`. Where the
teacher can read so long a block, half of each target is the teacher's distribution, and the student
takes less from text that is unlike the teacher's own (--teacher-share). With --native-blocks n,
stage 1's L is added, over n blocks of stage 1's length beside each long one.

Skips.  Between two tokens of a short block there are only short distances. With --skips2 n (in
stage 1: --skips1) the blocks of every other step are cut in n places and their parts moved on, for
the student alone, up to the whole context: the same losses then teach the long distances
(engine/skips.py).

How it is computed.  The two losses below are the specification, and what runs wherever nothing more
is needed. Where memory, time or a flag ask for more (layers computed again in the backward, logits
in chunks, skips, models cut over GPUs, CUDA graphs), engine/step.py computes the same loss and
gradients another way; tests/test_step.py holds it to these.

The numbers.  `defaults` has every number that a person tunes, by what it depends on; a flag wins.
The rate is 6 s / C, at most 2e-3, where s is the root mean square of a weight of q, k or v and C
the width. Adam moves every weight by about its rate per step. Small weights are changed more by the
same move, and in a wider layer more moves add up in each output. SmolLM2-135M
(s = 0.19, C = 576) was best at 2e-3, Qwen2.5-Coder-0.5B (0.016, 896) near 1e-4, and the paper
trains a 7B at 2e-5, where s = 0.02 would give 3e-5. Stage 1 wants many small steps on short
blocks, stage 2 steps more than length (LOG.md has the runs). All kinds of positions but linear
leave the fast pairs alone and lose less before training: they take gentler rates and fewer tokens.

Precision.  float32 masters of what learns; bfloat16 compute on a GPU and on CPUs with bfloat16
units, else float32.

--out DIR gets cache/ (tokenised text, unless --cache says where); when training begins, run.json
(arguments, versions, seed) and metrics.jsonl (a line per step); every --save-minutes, state/ (for
--resume) and curves.png; at the end, report.json, .md and .png (what was lost, what came back,
where the time went) and student/, the Hugging Face directory; with --lora-rank adapter/, with
--tensorboard tensorboard/, with --wandb PROJECT wandb/, whose figures go to Weights & Biases, or
stay there under WANDB_MODE=offline. .linear-ard.json lists these; a run holds .linear-ard.lock.

Exit codes: 0 done; 2 refused or cannot go on, and one sentence says why; 3 stopped by Ctrl-C,
SIGTERM or SIGHUP, a state saved if training had begun and there was time. torchrun's own is 1 for
all but 0.

Limits.  A block may hold parts of several documents, and attention sees across them. The authors
divide the K/K and V/V losses by the number of query heads even where keys are shared: --preset
authors does as they do. For models unlike the two that were measured the defaults are guesses: try
a few rates.

Source.  LinearARD, arXiv 2604.00004; the shape of this script, nanoGPT's train.py.
"""

from engine import exits  # first: from here on, a Ctrl-C ends in one line  # isort: skip

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from engine import flags, parallel
from engine.announce import announce
from engine.cost import Stage
from engine.export import export
from engine.models import make_models
from engine.plan import make_plan
from engine.run import Run
from engine.step import Step
from evals import report
from evals.held_out import HeldOut
from model import Llama, LlamaConfig, trainable
from model import next_token_loss as cross_entropy
from relation_kl import relation_kl

# ---- the two losses


def relation_loss(
    teacher: Llama, student: Llama, ids: Tensor, dtype: torch.dtype, kl_weight: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Stage 1 over ids [B, T]: (loss, its relations [L, 3], its next-token KL), in nats."""
    T, table = ids.shape[1], []
    # YaRN multiplies q and k by its attention factor. Left in, the student would learn to undo it
    qk = student.score_scale(T), teacher.score_scale(T)
    v = (teacher.config.head_dim**-0.5,) * 2
    lock_step = zip(teacher.walk(ids, dtype), student.walk(ids, dtype), strict=True)
    for (h_teacher, theirs), (h_student, ours) in lock_step:  # noqa: B007 - the last h are used
        kl = [
            relation_kl(x, y, scale=a, teacher_scale=b).mean()
            for x, y, (a, b) in zip(ours, theirs, (qk, qk, v), strict=True)  # Q/Q, K/K, V/V
        ]
        table.append(torch.stack(kl))
    table = torch.stack(table)
    next_token = next_token_kl(teacher, student, h_teacher, h_student)
    return table.mean(0).sum() + kl_weight * next_token, table, next_token


def next_token_kl(teacher: Llama, student: Llama, h_teacher: Tensor, h_student: Tensor) -> Tensor:
    """Mean KL(teacher || student) of the next token; h [B, T, C] after the last layer."""
    log_r = teacher.lm_head(teacher.model.norm(h_teacher)).float().log_softmax(-1)
    log_p = student.lm_head(student.model.norm(h_student)).float().log_softmax(-1)
    return F.kl_div(log_p, log_r, log_target=True, reduction="none").sum(-1).mean()


def next_token_loss(
    teacher: Llama, student: Llama, ids: Tensor, dtype: torch.dtype, share: float = 0.0
) -> tuple[Tensor]:
    """Stage 2 over ids [B, T + 1]: the cross-entropy of each token given those before it; `share`
    of it is the KL from the teacher's distribution instead.
    """
    h = student.after_layers(ids[:, :-1], dtype)
    loss = (1 - share) * cross_entropy(student, student.model.norm(h), ids[:, 1:])
    if share:
        with torch.no_grad():
            h_teacher = teacher.after_layers(ids[:, :-1], dtype)
        loss = loss + share * next_token_kl(teacher, student, h_teacher, h)
    return (loss,)


PLAIN = {"relation": relation_loss, "next token": next_token_loss}

# ---- the numbers that a person tunes


def defaults(teacher: LlamaConfig, student: LlamaConfig, s: float, gpu: bool) -> dict:
    """What the flags of these names are where they are left out; step1, step2: tokens of a step.

    s: the size of a weight of q, k or v.
    """
    C, native, linear = teacher.width, teacher.rope.length, student.rope.kind == "linear"
    narrow = C <= 1024
    rate = min(2e-3, 6 * s / C) * (1.0 if linear else 0.3)
    tokens1, tokens2 = {
        # gpu, linear
        (True, True): (2_097_152, 2_097_152),
        (True, False): (262_144, 524_288),
        (False, True): (262_144, 131_072),  # stage 1: 31 minutes on one Xeon core with AMX
        (False, False): (65_536, 65_536),  # stage 1: 169 s on eight Xeon cores with AMX
    }[gpu, linear]
    # Of stage 2: 16K, where blocks gave a lower loss at 64K than blocks of 64K at equal tokens; the
    # native length where that is more, as long as it leaves 32 steps
    length2 = max(16_384, min(native, 2 ** int(math.log2(tokens2 / 32))))
    return {
        "tokens1": tokens1,
        "length1": min(native, 512 if narrow else 2048),
        "step1": 1024 if narrow else 8192,
        "lr1": rate,
        "tokens2": tokens2,
        "length2": min(student.rope.length, length2),
        "step2": 16_384,
        "lr2": rate / (4 if linear else 2),  # whatever --lr1 is
        # Biases outweigh what tokens add to a key, and a small rate cannot move them: K/K would
        # compare bias with bias (LOG.md, 2026-11-28)
        "relations": "qv" if teacher.qkv_bias else "qkv",
        "teacher_share": 0.5,  # where length2 is no more than the native length, else 0
    }


# Whole recipes: --preset NAME; "demo" is taken where no --teacher is named, and the plan says so.
PRESETS = {
    # Another objective: KL x 3, text like the teacher's own, many small steps. Stage 2 has blocks
    # of stage 1's kind beside its own; linear's are short and skip. LOG.md has the search
    "demo": {
        "logit_weight": 3.0,
        "native_blocks": 4,
        "lookups": 0.25,
        "batch1": 1,
        "batch2": 1,
        "length2": 4096,
        "eval_blocks": 4,  # its steps are few, its blocks short
    },
    "demo linear": {
        "tokens1": 300_000,
        "lr1": 2e-3,
        "tokens2": 270_000,
        "lr2": 1.5e-3,
        "length2": 1024,
        "batch2": 2,
        "skips2": 4,
        "native_blocks": 0,
    },
    "demo yarn": {"tokens1": 115_000, "lr1": 1e-3, "tokens2": 65_600, "lr2": 4e-4},
    # The paper's own: adapters, 144 steps of 4 x 4096 tokens, relations alone
    "authors": {
        "lora_rank": 1024,
        "lora_alpha": 2048.0,
        "lora_dropout": 0.05,
        "lr1": 2e-5,
        "length1": 4096,
        "batch1": 4,
        "tokens1": 144 * 4 * 4096,
        "relations": "qkv",
        "logit_weight": 0.0,
        "teacher_share": 0.0,
        "authors_heads": True,
    },
    "default": {
        "logit_weight": 1.0,  # of the next-token KL
        "native_blocks": 0,  # SmolLM2 lost by them
        "lookups": 0.0,
        "skips1": 0,
        "skips2": 0,
        "authors_heads": False,
        "lora_dropout": 0.0,
    },
}
CLIP = 1.0  # the longest gradient


def learning_rate(stage: Stage, step: int) -> float:
    """The learning rate of a step, 0 the first: up over a twentieth of them, then straight down.

    It begins above 0 and ends at a fiftieth of the stage's.
    """
    warm = math.ceil(stage.steps / 20)
    down = (stage.steps - step) / max(1, stage.steps - warm)
    return stage.lr * min((step + 1) / (warm + 1), max(0.02, down))


# ---- the recipe


def main(argv: list[str] | None = None) -> None:
    """One run, from the command line to the exported directory; see the head of this file."""
    args = flags.parse(argv, __doc__, PRESETS)
    world = parallel.World(args.device)  # this process, or torchrun's many
    plan = make_plan(args, world, defaults)  # all that needs no text and no weights
    print(announce(plan))
    run = Run(plan, world)
    if args.dry_run:
        run.find()
        return world.exit(0)
    with run:  # the folder is this run's from here on
        teacher, student, units = make_models(plan, world)
        weights, corpus = trainable(student), run.read_text()
        native = plan.native.rope.length
        held_out = HeldOut(
            corpus, plan.tokenizer, native, args.scale, plan.blocks, documents=plan.documents
        )
        run.begin(weights, held_out)  # where the newest state says
        run.measure(report.TEACHER, teacher)
        run.measure(report.UNTRAINED, student)
        for stage in run.stages():
            optimiser = torch.optim.AdamW(
                weights.values(), lr=stage.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=plan.fused
            )
            step = Step(teacher, student, PLAIN, world=world, units=units, **plan.how(stage))
            with run.training(stage, optimiser, step):
                for n in run.steps(stage):
                    step.zero()
                    for part, ids, positions, share, last in run.micro_batches(stage, n):
                        losses = step.backward(part, ids, positions, share, last)
                        run.figures.add(part, losses, share)
                    norm = step.finish()  # gradients are averaged over all processes
                    run.agree(n, norm)  # that numbers are finite, whether to save, whether to stop
                    step.clip(norm, CLIP)
                    for group in optimiser.param_groups:
                        group["lr"] = learning_rate(stage, n)
                    optimiser.step()
                    run.log(n, norm, group["lr"])
                    run.save_if_due()
                    if run.stopping:
                        return run.stop()
            run.end_stage(stage, student)  # measured and saved
        export(run, student, report)
        run.done()


if __name__ == "__main__":
    exits.run(main, "train.py")
