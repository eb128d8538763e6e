"""What a model holds for the next token: its loss, and whether it is the likeliest.

Formula.  Of the token y that follows position t, with z the logits there

    loss = log sum_v exp z_v - z_y  (nats)        right = [y is argmax_v z_v]

How it is computed.  As many blocks as fill `batch_tokens` go through the model together; logits are
made for some rows at a time, once for both figures, in float32.

Every figure of whole blocks (held-out text, look-ups, sliding windows, loss by position) passes
through `block_scores`, and through nothing else. Long blocks go through the layers in tiles, over
one process or several (engine/tiles.py).
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.tiles import hidden
from model import Llama


def batch_tokens(model: Llama) -> int:
    """Tokens to read at a time: enough to fill a GPU, of a wide model some 3 GiB; few enough for a
    CPU's caches.
    """
    return min(65536, 2**26 // model.config.width) if model.device.type == "cuda" else 2048


def token_scores(model: Llama, h: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(loss [N] in nats, float32; right [N]) of targets [N] after h [N, C].

    On a CPU 8 MB of logits exist at a time, which its caches hold (twice as fast as 4096 rows at
    V = 4096), on a GPU 4096 rows.
    """
    V = model.config.vocab_size
    rows = 4096 if h.is_cuda else max(128, (1 << 21) // V)
    losses, right = [], []
    for x, y in zip(h.split(rows), targets.split(rows), strict=True):
        logits = model.lm_head(x).float()  # [rows, V]
        losses.append(F.cross_entropy(logits, y, reduction="none"))
        right.append(logits.max(-1).indices == y)
    return torch.cat(losses), torch.cat(right)


@torch.no_grad()
def block_scores(
    model: Llama, blocks: Tensor, at: Tensor | None = None, P: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """(loss in nats, right), each float64 [n, m], of blocks [n, T + 1].

    at: the positions [n, m] whose next tokens are scored (None: all T). Tokens behind a position do
    not change its scores. P: over how many processes each block is spread; all must ask.
    """
    n, T = len(blocks), blocks.shape[1] - 1
    at = torch.arange(T).expand(n, T) if at is None else at
    losses, right, rows = [], [], max(1, batch_tokens(model) // T)
    for ids, where in zip(blocks.split(rows), at.split(rows), strict=True):
        ids, where = ids.to(model.device), where.to(model.device)
        h = hidden(model, ids[:, :-1], P)  # [rows, T, C]
        h = h[torch.arange(len(h), device=h.device)[:, None], where]  # [rows, m, C]
        loss, hit = token_scores(model, h.flatten(0, 1), ids.gather(1, where + 1).flatten())
        losses.append(loss.view(where.shape))
        right.append(hit.view(where.shape))
    return torch.cat(losses).double().cpu().numpy(), torch.cat(right).double().cpu().numpy()
