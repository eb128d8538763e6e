"""Text out: greedy generation with a key/value cache.

How it is computed.  The prompts are read once, in one batch, by the forward that training uses
(prefill), and their keys and values are cached. Then every step reads one token per sequence: its
query against the cached keys, each sequence at its position. The cache is
[B, Hkv, prompt + new, D] per layer; shorter prompts are padded on the right, where nothing looks.

Under "dynamic" and "longrope" positions the frequencies depend on the length at hand. A step then
takes those of the current length, while cached keys hold those of the length at which they were
made: so do transformers. Prompts of such a model are continued one by one.

Limits.  Greedy only. For every other kind of position, cache and no cache give the same tokens.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from engine.cost import free_memory
from hub.tokenizer import Tokenizer
from model import Llama
from rope import rotation

BY_LENGTH = ("dynamic", "longrope")  # kinds of position whose frequencies depend on the length


class LayerCache:
    """One layer's keys and values [B, Hkv, room, D]; `lengths` [B] says how many are valid.

    All layers share one tensor of lengths.
    """

    def __init__(self, k: Tensor, v: Tensor, room: int, lengths: Tensor, window: int | None):
        """k, v [B, Hkv, T, D]: the prompts', right-padded."""
        B, heads, T, D = k.shape
        self.k, self.v = k.new_zeros(B, heads, room, D), v.new_zeros(B, heads, room, D)
        self.k[:, :, :T], self.v[:, :, :T] = k, v
        self.lengths, self.window = lengths, window
        self.tokens = T  # of a sequence that is alone

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Adds one position per sequence, k and v [B, Hkv, 1, D].

        Returns all keys, all values and who is seen [B, 1, 1, room]. A sequence that is alone sees
        all that is returned, and needs no mask: fused attention takes none for shared keys.
        """
        if len(k) == 1:
            self.k[:, :, self.tokens], self.v[:, :, self.tokens] = k[:, :, 0], v[:, :, 0]
            self.tokens += 1
            seen = slice(max(0, self.tokens - (self.window or self.tokens)), self.tokens)
            return self.k[:, :, seen], self.v[:, :, seen], None
        rows = torch.arange(k.shape[0], device=k.device)
        self.k[rows, :, self.lengths], self.v[rows, :, self.lengths] = k[:, :, 0], v[:, :, 0]
        j = torch.arange(self.k.shape[2], device=k.device)
        seen = j <= self.lengths[:, None]  # [B, room]
        if self.window:
            seen &= self.lengths[:, None] - j < self.window
        return self.k, self.v, seen[:, None, None]


def cache_bytes(model: Llama, B: int, room: int) -> int:
    """Of the keys and values of B sequences of `room` tokens."""
    c = model.config
    return 2 * c.n_layer * B * c.n_kv_head * room * c.head_dim * model.dtype.itemsize


@torch.no_grad()
def steps(
    model: Llama, prompts: list[list[int]], new: int, vocabulary: int | None
) -> Iterator[Tensor]:
    """Yields the next token [B] of every prompt, `new` times. Prompts are ids of any lengths.

    vocabulary: ids from here on are never chosen: embeddings are often padded beyond the
    tokenizer's. Raises ValueError for an empty prompt, and where the cache would not fit the free
    memory.
    """
    if not prompts or not all(prompts):
        raise ValueError("a prompt is empty; give at least one token, such as the model's BOS")
    c, device, B = model.config, model.device, len(prompts)
    longest = max(map(len, prompts))
    need, free = cache_bytes(model, B, longest + new), free_memory(device)
    if need > free:
        raise ValueError(
            f"{new} new tokens need a cache of {need / 2**30:.1f} GiB and {free / 2**30:.1f} are "
            "free; ask for fewer"
        )
    ids = torch.zeros(B, longest, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    caches = []
    for h, (_, k, v) in model.walk(ids.to(device)):  # noqa: B007 - the last h is wanted
        caches.append(LayerCache(k, v, longest + new, lengths, c.window))
    h = h[torch.arange(B, device=device), lengths - 1]  # [B, C]
    for n in range(new):
        token = model.lm_head(model.model.norm(h))[:, :vocabulary].argmax(-1)
        yield token
        if n + 1 < new:
            h = model.embed(token[:, None])
            now = longest + n + 1  # tokens of the longest sequence
            cos, sin = rotation(c.rope, c.head_dim, lengths[:, None], now, h.dtype)  # [B, 1, D]
            for layer, cache in zip(model.model.layers, caches, strict=True):
                h, _ = layer(h, (cos[:, None], sin[:, None]), cache)
            h = h[:, 0]
            lengths += 1


def generate(
    model: Llama,
    prompts: list[list[int]],
    new: int,
    stop: frozenset[int] = frozenset(),
    vocabulary: int | None = None,
) -> list[list[int]]:
    """The greedy continuation of each prompt, of at most `new` tokens, cut before one of `stop`."""
    if model.config.rope.kind in BY_LENGTH and len(prompts) > 1:
        return [generate(model, [p], new, stop, vocabulary)[0] for p in prompts]
    out: list[list[int]] = [[] for _ in prompts]
    going = set(range(len(prompts)))
    for token in steps(model, prompts, new, vocabulary):
        ids = token.tolist()
        going = {b for b in going if ids[b] not in stop}
        for b in going:
            out[b].append(ids[b])
        if not going:
            break
    return out


def stream(
    model: Llama, tokenizer: Tokenizer, ids: list[int], new: int
) -> Iterator[tuple[str, int]]:
    """(a piece of text, tokens so far) of the continuation of one prompt, until a stop token.

    A character whose bytes are not all there yet waits for the next piece. A piece is what decoding
    adds to the piece before it, so that the time per token does not grow with the text.
    """
    out: list[int] = []
    start, end = 0, 0  # out[start:end] is the piece before
    for token in steps(model, [ids], new, tokenizer.size):
        if token.item() in tokenizer.stop_ids:
            break
        out.append(token.item())
        text = tokenizer.decode(out[start:])
        if not text.endswith("\ufffd"):
            yield text[len(tokenizer.decode(out[start:end])) :], len(out)
            start, end = end, len(out)
