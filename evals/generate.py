"""Text out: greedy generation with a key/value cache.

How it is computed.  The prompts are read once, in one batch, by the forward that training uses
(prefill), CHUNK tokens of each at a time, and their keys and values are cached: so beside the cache
a long prompt takes the memory of a short one. Then every step reads one token per sequence: its
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
from torch.nn.attention.bias import causal_lower_right

from engine.cost import free_memory
from hub.tokenizer import Tokenizer
from model import Llama
from rope import rotation

CHUNK = 4096  # tokens of a prompt that go through the layers together
BY_LENGTH = ("dynamic", "longrope")  # kinds of position whose frequencies depend on the length


class LayerCache:
    """One layer's keys and values [B, Hkv, room, D]; `lengths` [B] says how many are valid.

    All layers share one tensor of lengths.
    """

    def __init__(self, model: Llama, lengths: Tensor, longest: int, room: int):
        c, shape = model.config, (len(lengths), model.config.n_kv_head, room, model.config.head_dim)
        self.k, self.v = (torch.zeros(shape, dtype=model.dtype, device=model.device) for _ in "kv")
        self.lengths, self.window = lengths, c.window
        self.read, self.longest = 0, longest  # tokens of the prompts, right-padded

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Adds k and v [B, Hkv, t, D]: the next t of the prompts, then one position per sequence.

        Returns keys and values [B, Hkv, S, D], and who is seen, as Attention.attend takes it.
        """
        return self._prompts(k, v) if self.read < self.longest else self._one(k, v)

    def _prompts(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        a, b = self.read, self.read + k.shape[2]
        self.k[:, :, a:b], self.v[:, :, a:b], self.read = k, v, b
        if a == 0:
            return k, v, None
        first = max(0, a + 1 - (self.window or b))  # that anybody here sees
        seen = causal_lower_right(b - a, b - first)
        if self.window and self.window < b:
            i, j = (torch.arange(x, b, device=k.device) for x in (a, first))
            seen = (i[:, None] >= j) & (i[:, None] - j < self.window)
        return self.k[:, :, first:b], self.v[:, :, first:b], seen

    def _one(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        if len(k) == 1:  # alone it sees all; fused attention takes no mask for shared keys
            self.k[:, :, self.read], self.v[:, :, self.read] = k[:, :, 0], v[:, :, 0]
            self.read += 1
            seen = slice(max(0, self.read - (self.window or self.read)), self.read)
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


def prefill(model: Llama, ids: Tensor, lengths: Tensor, caches: list[LayerCache]) -> Tensor:
    """Reads prompts, ids [B, T] of lengths [B], into empty caches; h [B, C] of each one's last
    token, before the last norm.
    """
    (B, T), ends = ids.shape, lengths - 1
    out = torch.empty(B, model.config.width, dtype=model.dtype, device=ids.device)
    cos, sin = model.cos_sin(T, out)
    for a in range(0, T, CHUNK):
        h, turn = model.embed(ids[:, a : a + CHUNK]), (cos[a : a + CHUNK], sin[a : a + CHUNK])
        for layer, cache in zip(model.model.layers, caches, strict=True):
            h, _ = layer(h, turn, cache)
        (here,) = torch.where((a <= ends) & (ends < a + CHUNK))
        out[here] = h[here, ends[here] - a]
    return out


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
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what was freed before counts as free
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
    caches = [LayerCache(model, lengths, longest, longest + new) for _ in range(c.n_layer)]
    h = prefill(model, ids.to(device), lengths, caches)
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
