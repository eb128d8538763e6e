"""Diagnosis: where the stretched positions hurt, and what training mended: the relation KL by layer, relation and head.

What.  Teacher and student read the same block, each with its own positions and its own hidden states. In every layer
the self-relations of q, k and v of the two are compared head by head, by the loss that stage 1 minimises:

    D[l, r, h] = mean over rows i and blocks of KL_i        r in Q/Q, K/K, V/V; h a head (of H for Q, of Hkv for K, V)

"before" is the teacher's weights under the student's positions, "after" is the student: what is left of D there is
what training did not mend.

How it is computed.  Both models advance a layer at a time, so that q, k and v of one layer of each are alive; the KL is
relation_kl with impl="auto": the Triton kernel on a GPU, strips of rows on a CPU. As in training, YaRN's temperature is
divided out of the scores of Q and K.

Limits.  D is an average over rows: a few lost tokens and a slight blur of all can give one number.

Source.  LinearARD, arXiv 2604.00004, for the divergence.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from model import Llama
from relation_kl import RELATIONS, relation_kl
from rope import frequencies


@torch.no_grad()
def divergence(teacher: Llama, student: Llama, blocks: Tensor, dtype: torch.dtype) -> np.ndarray:
    """D [L, 3, H] in nats of blocks [n, T] of ids, one block at a time; NaN where K and V have fewer heads than Q."""
    device = teacher.model.embed_tokens.weight.device
    c, T = teacher.config, blocks.shape[1]
    scales = [
        m.config.head_dim**-0.5 / frequencies(m.config.rope, m.config.head_dim, T)[1] ** 2
        for m in (teacher, student)
    ]
    total = np.full((c.n_layer, 3, c.n_head), np.nan)
    total[:, 0], total[:, 1:, : c.n_kv_head] = 0.0, 0.0
    for block in blocks:
        ids = block[None].to(device)
        states = [m.embed(ids, dtype) for m in (teacher, student)]
        turns = [m.cos_sin(T, h) for m, h in zip((teacher, student), states, strict=True)]
        for l in range(c.n_layer):
            taps = []
            for i, m in enumerate((teacher, student)):
                states[i], qkv = m.model.layers[l](states[i], turns[i])
                taps.append(qkv)
            for r, (y, x) in enumerate(zip(*taps, strict=True)):
                a_teacher, a = scales if r < 2 else (x.shape[-1] ** -0.5,) * 2
                kl = relation_kl(x, y, scale=a, teacher_scale=a_teacher, impl="auto")  # [1, H, T]
                total[l, r, : x.shape[1]] += kl[0].double().mean(-1).cpu().numpy()
    return total / len(blocks)


def table(found: dict[str, np.ndarray]) -> str:
    """Markdown: a row a layer, for each relation the mean over heads and, in brackets, the worst head."""
    names = list(found)
    lines = ["| layer | " + " | ".join(f"{r} {name}" for r in RELATIONS for name in names) + " |"]
    lines.append("|" + "---:|" * (1 + 3 * len(names)))
    for l in range(len(next(iter(found.values())))):
        cells = []
        for r in range(3):
            for name in names:
                heads = found[name][l, r]
                cells.append(
                    f"{np.nanmean(heads):.4f} ({np.nanmax(heads):.4f}, head {int(np.nanargmax(heads))})"
                )
        lines.append(f"| {l} | " + " | ".join(cells) + " |")
    means = [f"{np.nanmean(found[name][:, r]):.4f}" for r in range(3) for name in names]
    return "\n".join([*lines, "| all | " + " | ".join(means) + " |"])


def draw(file: Path, found: dict[str, np.ndarray]) -> None:
    """Heat maps on one logarithmic scale: a row a model, a column a relation, layers down, heads to the right."""
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    everything = np.concatenate(
        [x[np.isfinite(x) & (x > 0)] for x in found.values()] or [np.ones(1)]
    )
    top = float(everything.max()) if everything.size else 1.0
    norm = LogNorm(
        vmin=max(float(everything.min()) if everything.size else 1e-6, top * 1e-6) * 0.999,
        vmax=top * 1.001,
    )
    figure = Figure(figsize=(10, 1 + 2.6 * len(found)), layout="constrained")
    axes = figure.subplots(len(found), 3, squeeze=False)
    for i, (name, x) in enumerate(found.items()):
        for r, relation in enumerate(RELATIONS):
            heads = x[:, r, np.isfinite(x[0, r])]
            image = axes[i, r].imshow(
                np.clip(heads, norm.vmin, None), norm=norm, cmap="magma", aspect="auto"
            )
            axes[i, r].set_title(
                f"{relation} {name}: mean {np.nanmean(heads):.4f} nats", fontsize=9
            )
            axes[i, r].set_xlabel("head", fontsize=8)
            axes[i, r].set_ylabel("layer", fontsize=8)
            axes[i, r].xaxis.get_major_locator().set_params(integer=True)
            axes[i, r].yaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(image, ax=axes, label="relation KL (nats a row)")
    figure.savefig(file, dpi=130)
