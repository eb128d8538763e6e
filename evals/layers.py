"""Diagnosis: where the stretched positions hurt, and what training mended, layer by layer.

What.  Teacher and student read the same block, each with its own positions and hidden states. In
every layer the self-relations of q, k and v of the two are compared head by head, by the loss that
stage 1 minimises (relation_kl.py):

    KL[l, r, h] = mean over rows i and blocks of KL_i        r in Q/Q, K/K, V/V
                                                             h a head, of H for Q, of Hkv for K, V

"before" is the teacher's weights under the student's positions, "after" is the student: what is
left of it there is what training did not mend.

How it is computed.  Two walks through the layers in lock-step, so that q, k and v of one layer of
each model are alive. As in training, YaRN's attention factor is divided out of Q's and K's scores.

Limits.  An average over rows: a few lost tokens and a slight blur of all can give one number.

Source.  LinearARD, arXiv 2604.00004, for the divergence.
"""

import numpy as np
import torch
from torch import Tensor

from evals import pictures
from evals.report import Scores
from evals.retention import TEACHER, UNTRAINED
from evals.subject import Subject
from model import Llama
from relation_kl import RELATIONS, relation_kl


@torch.no_grad()
def divergence(teacher: Llama, student: Llama, blocks: Tensor) -> np.ndarray:
    """KL [L, 3, H] in nats of blocks [n, T] of ids; NaN where K and V have fewer heads than Q."""
    c, T = teacher.config, blocks.shape[1]
    total = np.full((c.n_layer, 3, c.n_head), np.nan)
    total[:, 0], total[:, 1:, : c.n_kv_head] = 0.0, 0.0
    turned, plain = (teacher.score_scale(T), student.score_scale(T)), (c.head_dim**-0.5,) * 2
    for block in blocks:
        ids = block[None].to(teacher.device)
        both = zip(teacher.walk(ids), student.walk(ids), strict=True)
        for l, ((_, theirs), (_, ours)) in enumerate(both):
            for r, (y, x) in enumerate(zip(theirs, ours, strict=True)):
                a_teacher, a = turned if r < 2 else plain
                kl = relation_kl(x, y, scale=a, teacher_scale=a_teacher)  # [1, H, T]
                total[l, r, : x.shape[1]] += kl[0].double().mean(-1).cpu().numpy()
    return total / len(blocks)


def relation_kl_by_layer(subject: Subject, scores: Scores) -> None:
    """A table of its own, and a picture: the untrained student before, the student after."""
    models = subject.models
    blocks = subject.corpus.held_out_blocks(subject.long, subject.n_blocks)[:, :-1]
    columns = {"before": models[UNTRAINED], "after": models["student"]}
    found = {name: divergence(models[TEACHER], m, blocks) for name, m in columns.items()}
    about = {"tokens": subject.long, "blocks": len(blocks)}
    about["version"] = f"relation KL, held-out text of {subject.corpus.name}"
    scores.more["layers"] = {name: _lists(x) for name, x in found.items()} | about
    head = f"Relation KL in nats, mean over heads (worst head), {subject.long} tokens"
    scores.notes.append(f"{head}:\n\n{table(found)}")
    scores.draw("layers", pictures.layers, found)


def _lists(kl: np.ndarray) -> list:
    """[layer][relation][head], without the heads that are not there."""
    return [[[h for h in heads if h == h] for heads in layer] for layer in kl.tolist()]


def table(found: dict[str, np.ndarray]) -> str:
    """Markdown: a row per layer, for each relation the mean over heads and the worst head."""
    names = list(found)
    lines = ["| layer | " + " | ".join(f"{r} {name}" for r in RELATIONS for name in names) + " |"]
    lines.append("|" + "---:|" * (1 + 3 * len(names)))
    for l in range(len(found[names[0]])):
        cells = []
        for r in range(3):
            for heads in (found[name][l, r] for name in names):
                worst = f"{np.nanmax(heads):.4f}, head {int(np.nanargmax(heads))}"
                cells.append(f"{np.nanmean(heads):.4f} ({worst})")
        lines.append(f"| {l} | " + " | ".join(cells) + " |")
    means = [f"{np.nanmean(found[name][:, r]):.4f}" for r in range(3) for name in names]
    return "\n".join([*lines, "| all | " + " | ".join(means) + " |"])
