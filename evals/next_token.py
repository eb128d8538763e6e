"""What a model holds for the next token: its loss, and whether it is the likeliest.

Formula.  Of the token y that follows position t, with z the logits there

    loss = log sum_v exp z_v - z_y  (nats)        right = [y is argmax_v z_v]

How it is computed.  As many blocks as fill `batch_tokens` go through the model together; logits are
made for some rows at a time, once for both figures, in float32. Where few positions of a block are
asked for, the last layer makes keys and values for all and the rest for those few (`hidden_at`).

Every figure of whole blocks (held-out text, look-ups, sliding windows, loss by position) passes
through `block_scores`, and through nothing else. Long blocks go through the layers in tiles, over
one process or several (engine/tiles.py).
"""

from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.parallel import gathered
from engine.tiles import TOKENS, hidden
from model import Llama

FEW = 32  # one in so many positions: the mask of their scores is as small a share of all scores


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
def hidden_at(model: Llama, ids: Tensor, at: Tensor) -> Tensor:
    """model.hidden(ids [B, T]) at the positions [B, m] alone: [B, m, C]."""
    T, last, h = ids.shape[1], model.model.layers[-1], model.embed(ids)
    for h, _ in islice(model.walk(ids), model.config.n_layer - 1):  # noqa: B007 - the last is wanted
        pass
    rows, turn = torch.arange(len(ids), device=ids.device)[:, None], model.cos_sin(T, h)
    distance = at[:, None, :, None] - torch.arange(T, device=ids.device)  # [B, 1, m, T]
    seen = (distance >= 0) & (distance < (model.config.window or T))

    def after(h: Tensor) -> Tensor:
        q, k, v = last.self_attn.qkv(last.input_layernorm(h), turn)
        q = q.transpose(1, 2)[rows, at].transpose(1, 2)  # [B, H, m, D]
        out = last.self_attn.attend(q, k, v, seen)
        return last.add_mlp(h[rows, at] + last.self_attn.project(out))

    return model.model.norm(gathered(last, after, h))


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
        if P == 1 and T <= TOKENS and FEW * where.shape[1] <= T:
            h = hidden_at(model, ids[:, :-1], where)  # [rows, m, C]
        else:
            h = hidden(model, ids[:, :-1], P)  # [rows, T, C]
            h = h[torch.arange(len(h), device=h.device)[:, None], where]
        loss, hit = token_scores(model, h.flatten(0, 1), ids.gather(1, where + 1).flatten())
        losses.append(loss.view(where.shape))
        right.append(hit.view(where.shape))
    return torch.cat(losses).double().cpu().numpy(), torch.cat(right).double().cpu().numpy()
