"""Text out: greedy generation with a key/value cache, and a prompt to try a checkpoint with.

    python generate.py --model out/demo/student --prompt "def main("

How it is computed.  Each prompt is read once by the forward that training uses (prefill), and its keys and values are
kept. Then every step reads one token a sequence: its query against the kept keys, all sequences in one batch, each at
its own position. The cache is [B, Hkv, prompt + new, D] a layer.

Limits.  Greedy only. Under "dynamic" and "longrope" positions the frequencies depend on the length at hand, and kept
keys hold those of the prompt's length, as they do in transformers; for every other kind, cache and no cache give the
same tokens.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from engine.flags import check_device
from hub.tokenizer import load_tokenizer
from model import Llama
from rope import rotation


class LayerCache:
    """One layer's keys and values [B, Hkv, room, D]; `lengths` [B], shared by all layers, says how many are valid."""

    def __init__(
        self,
        B: int,
        heads: int,
        room: int,
        D: int,
        like: Tensor,
        lengths: Tensor,
        window: int | None,
    ):
        self.k, self.v = (
            torch.zeros(B, heads, room, D, dtype=like.dtype, device=like.device) for _ in range(2)
        )
        self.lengths, self.window = lengths, window

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Adds one position a sequence, k and v [B, Hkv, 1, D]; returns all keys, all values and who is seen."""
        B = k.shape[0]
        rows = torch.arange(B, device=k.device)
        self.k[rows, :, self.lengths], self.v[rows, :, self.lengths] = k[:, :, 0], v[:, :, 0]
        j = torch.arange(self.k.shape[2], device=k.device)
        seen = j <= self.lengths[:, None]  # [B, room]
        if self.window:
            seen &= self.lengths[:, None] - j < self.window
        return self.k, self.v, seen[:, None, None]


@torch.no_grad()
def steps(model: Llama, prompts: list[list[int]], new: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """Yields the next token [B] of every prompt, `new` times. Prompts are id lists of any, not equal, lengths."""
    if not prompts or not all(prompts):
        raise ValueError("a prompt is empty; give at least one token, such as the model's BOS")
    c, device = model.config, model.device
    room, B = max(map(len, prompts)) + new, len(prompts)
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    like = torch.empty(0, dtype=dtype, device=device)
    caches = [
        LayerCache(B, c.n_kv_head, room, c.head_dim, like, lengths, c.window)
        for _ in range(c.n_layer)
    ]
    last = []
    for b, prompt in enumerate(prompts):
        h = model.embed(torch.tensor([prompt], device=device), dtype)
        turn = model.cos_sin(len(prompt), h)
        for layer, cache in zip(model.model.layers, caches, strict=True):
            h, (_, k, v) = layer(h, turn)
            cache.k[b, :, : len(prompt)], cache.v[b, :, : len(prompt)] = k[0], v[0]
        last.append(h[:, -1:])
    h = torch.cat(last)  # [B, 1, C]
    for n in range(new):
        token = model.lm_head(model.model.norm(h[:, -1])).argmax(-1)
        yield token
        if n + 1 < new:
            h = model.embed(token[:, None], dtype)
            cos, sin = rotation(c.rope, c.head_dim, lengths[:, None], room, dtype)  # [B, 1, D]
            for layer, cache in zip(model.model.layers, caches, strict=True):
                h, _ = layer(h, (cos[:, None], sin[:, None]), cache)
            lengths += 1


def generate(
    model: Llama, prompts: list[list[int]], new: int, dtype: torch.dtype, eos: int | None = None
) -> list[list[int]]:
    """The greedy continuation of each prompt, at most `new` tokens, cut before the end token."""
    out: list[list[int]] = [[] for _ in prompts]
    done = [False] * len(prompts)
    for token in steps(model, prompts, new, dtype):
        for b, t in enumerate(token.tolist()):
            done[b] = done[b] or t == eos
            if not done[b]:
                out[b].append(t)
        if all(done):
            break
    return out


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--model", type=Path, required=True)
    p.add_argument("--prompt", help="the text to go on from (default: standard input)")
    p.add_argument("--tokens", type=int, default=100, help="at most this many new tokens")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = p.parse_args(argv)
    if args.tokens < 1:
        raise ValueError(f"--tokens is {args.tokens}; it must be at least 1")
    check_device(args.device)
    dtype = torch.bfloat16 if args.device.startswith("cuda") else torch.float32
    model = Llama.from_pretrained(args.model, dtype=dtype, device=args.device)
    tokenizer = load_tokenizer(args.model)
    ids = tokenizer.encode(args.prompt if args.prompt is not None else sys.stdin.read(), bos=True)
    began, out, said = time.time(), [], ""
    for token in steps(model, [ids], args.tokens, dtype):
        if token.item() == tokenizer.eos_id:
            break
        out.append(token.item())
        text = tokenizer.decode(out)
        if not text.endswith("\ufffd"):  # a character whose bytes are not all there yet
            print(text[len(said) :], end="", flush=True)
            said = text
    print(
        f"\n[{len(ids)} tokens in, {len(out)} out, {len(out) / (time.time() - began):.0f} tokens/s]",
        file=sys.stderr,
    )


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:
        print(f"generate.py: {e}", file=sys.stderr)
        sys.exit(2)
