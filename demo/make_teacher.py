"""Makes the demo's teacher: a tokenizer and a small LLaMA, trained from nothing on the standard
library's sources.

    python demo/make_teacher.py --out demo/teacher --minutes 60

A quarter of the blocks are look-up documents (engine/lookups.py), so that recall over a distance
can be measured later. The tokenizer is byte-level BPE, kept as a tiktoken rank file and, for other
programs, as tokenizer.json. The weights train with Muon (the matrices) and AdamW (the rest), in
bf16 with float32 masters, and are stored in bf16.

Limits.  It stops by the clock, so another machine ends elsewhere; the seed fixes the data's order
only.
"""

import argparse
import base64
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from engine import data
from engine.lookups import Lookups
from hub import checkpoint
from hub.tokenizer import LLAMA3_WORDS, load_tokenizer
from model import Llama, LlamaConfig, next_token_loss

T, BATCH, SHARE = 512, 16, 0.25  # native context, blocks per step, share of look-up documents
END = "<|end|>"
SHAPE = {
    "model_type": "llama",
    "vocab_size": 4096,
    "hidden_size": 320,
    "intermediate_size": 896,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": T,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "rope_theta": 10000.0,
    "bos_token_id": None,
    "eos_token_id": 4095,
}


def sources() -> list[tuple[str, Path]]:
    """The demo's own corpus and, for more text, the standard library's tests."""
    root = data.standard_library()
    tests = [(str(f.relative_to(root)), f) for f in sorted((root / "test").rglob("*.py"))]
    return data.find_files([]) + tests


def make_tokenizer(out: Path, texts: list[str]) -> None:
    """Trains BPE and writes it twice: 256 bytes, then the merges in order, then the end token."""
    words = [
        pre_tokenizers.Split(Regex(LLAMA3_WORDS), "isolated"),
        pre_tokenizers.ByteLevel(False, use_regex=False),
    ]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(words)
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=4095, initial_alphabet=alphabet, show_progress=False)
    )
    bpe.add_special_tokens([END])
    bpe.save(str(out / "tokenizer.json"))
    to_byte = {c: b for b, c in _byte_letters().items()}
    ranks = {
        i: bytes(to_byte[c] for c in t) for t, i in bpe.get_vocab(with_added_tokens=False).items()
    }
    lines = (f"{base64.b64encode(ranks[i]).decode()} {i}\n" for i in sorted(ranks))
    (out / "tokenizer.tiktoken").write_text("".join(lines))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "add_bos_token": False,
    }
    settings |= {
        "added_tokens_decoder": {"4095": {"content": END, "special": True}},
        "pat_str": LLAMA3_WORDS,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")


def _byte_letters() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte, which tokenizer.json uses."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in plain]
    return {b: chr(b) for b in plain} | {b: chr(256 + n) for n, b in enumerate(rest)}


def initialise(model: Llama) -> None:
    for name, p in model.named_parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.02 if "embed" in name else p.shape[1] ** -0.5)
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            p.data /= math.sqrt(2 * model.config.n_layer)


def blocks(corpus: data.Corpus, lookups: Lookups, step: int) -> torch.Tensor:
    """[BATCH, T + 1]: ordinary blocks, the last of them replaced by look-up documents."""
    out = corpus.batch(0, step * BATCH, BATCH, T)
    rng = np.random.default_rng([1, step])
    for row in range(int(BATCH * (1 - SHARE)), BATCH):
        out[row] = torch.from_numpy(lookups.document(rng, T, "anywhere")[0])
    return out


@torch.no_grad()
def measure(model: Llama, corpus: data.Corpus, lookups: Lookups) -> tuple[float, float]:
    """(held-out loss in nats, share of look-ups right) at the native length."""
    held = corpus.held_out_blocks(T, 64)
    loss = next_token_loss(model, model.hidden(held[:, :-1], torch.bfloat16), held[:, 1:]).item()
    rng, right = np.random.default_rng(2), []
    for _ in range(32):
        ids, where = lookups.document(rng, T, "far")
        best = model(torch.from_numpy(ids[None, :-1])).argmax(-1)[0]
        right += (best[where] == torch.from_numpy(ids[where + 1])).tolist()
    return loss, sum(right) / len(right)


def train(model: Llama, corpus: data.Corpus, lookups: Lookups, minutes: float, log) -> None:
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and "layers" in n]
    others = [p for n, p in model.named_parameters() if not (p.dim() == 2 and "layers" in n)]
    muon = torch.optim.Muon(matrices, lr=4e-3, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW(others, lr=4e-3, betas=(0.9, 0.95), weight_decay=0.0)
    begin, step, share = time.time(), 0, 0.0
    while share < 1:
        share = (time.time() - begin) / (60 * minutes)
        # Warm-up, level, then down
        rate = min((step + 1) / 100, 1.0) * max(0.02, min(1.0, (1 - share) / 0.5))
        ids = blocks(corpus, lookups, step)
        h = model.hidden(ids[:, :-1], torch.bfloat16)
        loss = next_token_loss(model, h, ids[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser in (muon, adam):
            optimiser.param_groups[0]["lr"] = 4e-3 * rate
            optimiser.step()
            optimiser.zero_grad()
        if step % 50 == 0 or share >= 1:
            row = {
                "step": step,
                "tokens": (step + 1) * BATCH * T,
                "minutes": round(share * minutes, 1),
            }
            row["loss"] = round(loss.item(), 4)
            if step % 250 == 0 or share >= 1:
                row["held_out"], row["recall"] = (
                    round(x, 4) for x in measure(model, corpus, lookups)
                )
            print(json.dumps(row), file=log, flush=True)
            print(row, flush=True)
        step += 1


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="directory to write; it must not exist yet"
    )
    parser.add_argument("--minutes", type=float, default=60, help="training time")
    args = parser.parse_args()
    if args.out.exists():
        sys.exit(f"--out {args.out} exists; remove it or name another")
    args.out.mkdir(parents=True)
    torch.manual_seed(0)
    (args.out / "config.json").write_text(json.dumps(SHAPE))
    make_tokenizer(args.out, [f.read_text(encoding="utf-8", errors="ignore") for _, f in sources()])
    tokenizer = load_tokenizer(args.out)
    texts = [(n, f.read_text(encoding="utf-8", errors="ignore")) for n, f in sources()]
    streams = data.split(
        [(n, np.asarray(tokenizer.encode_documents([t])[0], dtype=np.uint16)) for n, t in texts]
    )
    corpus = data.Corpus(*streams, name="the standard library and its tests")
    lookups = Lookups(tokenizer, corpus.train)
    model = Llama(LlamaConfig.from_hf(SHAPE))
    initialise(model)
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(corpus.train):,} "
        "training tokens"
    )
    with (args.out / "training.jsonl").open("w") as log:
        train(model, corpus, lookups, args.minutes, log)
    checkpoint.save_pretrained(
        model, args.out.with_name("written"), tokenizer_from=args.out, dtype=torch.bfloat16
    )
    for file in args.out.with_name("written").iterdir():
        file.replace(args.out / file.name)
    args.out.with_name("written").rmdir()


if __name__ == "__main__":
    main()
