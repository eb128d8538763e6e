"""Makes the demo's teacher: a tokenizer and a small LLaMA, trained from nothing on the default
text (engine/default_text.py).

    python demo/make_teacher.py --out DIR --steps 0                  the tokenizer alone
    python demo/make_teacher.py --out DIR --tokenizer DIR --steps N  the weights, with that one

A quarter of the blocks are look-up documents (engine/lookups.py), so that recall over a distance
can be measured later. The tokenizer is byte-level BPE, kept as a tiktoken rank file and, for other
programs, as tokenizer.json. The weights train with Muon (the matrices) and AdamW (the rest), in
bf16 with float32 masters, and are stored in bf16: minutes on a GPU, an hour of two CPU cores.

Limits.  The seed fixes the weights' beginning and the data's order; another device rounds
otherwise and ends with other weights, about as good.
"""

import argparse
import base64
import json
import math
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from engine import data, default_text
from engine.lookups import Lookups
from hub import checkpoint
from hub.tokenizer import LLAMA3_WORDS, load_tokenizer
from model import Llama, LlamaConfig, next_token_loss

T, BATCH, SHARE = 512, 16, 0.25  # native context, blocks per step, share of look-up documents
RATE = 4e-3
END = "<|end|>"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.tiktoken", "tokenizer_config.json")
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


def make_tokenizer(out: Path, texts: list[str]) -> None:
    """Trains BPE and writes it twice: 256 bytes, then the merges in order, then the end token."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

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
    device = model.lm_head.weight.device
    held = corpus.held_out_blocks(T, 64).to(device)
    loss = next_token_loss(model, model.hidden(held[:, :-1], torch.bfloat16), held[:, 1:]).item()
    rng, right = np.random.default_rng(2), []
    for _ in range(32):
        ids, where = lookups.document(rng, T, "far")
        best = model(torch.from_numpy(ids[None, :-1]).to(device)).argmax(-1)[0].cpu()
        right += (best[where] == torch.from_numpy(ids[where + 1])).tolist()
    return loss, sum(right) / len(right)


def train(model: Llama, corpus: data.Corpus, lookups: Lookups, steps: int, log) -> None:
    device = model.lm_head.weight.device
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and "layers" in n]
    others = [p for n, p in model.named_parameters() if not (p.dim() == 2 and "layers" in n)]
    muon = torch.optim.Muon(matrices, lr=RATE, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW(others, lr=RATE, betas=(0.9, 0.95), weight_decay=0.0)
    begin = time.time()
    for step in range(steps):
        # Warm-up over 100 steps, level, and from the middle down
        rate = min((step + 1) / 100, 1.0) * max(0.02, min(1.0, 2 * (1 - step / steps)))
        ids = blocks(corpus, lookups, step).to(device)
        h = model.hidden(ids[:, :-1], torch.bfloat16)
        loss = next_token_loss(model, h, ids[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser in (muon, adam):
            optimiser.param_groups[0]["lr"] = RATE * rate
            optimiser.step()
            optimiser.zero_grad()
        last = step == steps - 1
        if step % 50 == 0 or last:
            row = {"step": step, "tokens": (step + 1) * BATCH * T, "loss": round(loss.item(), 4)}
            row["minutes"] = round((time.time() - begin) / 60, 2)
            if step % 250 == 0 or last:
                figures = measure(model, corpus, lookups)
                row["held_out"], row["recall"] = (round(x, 4) for x in figures)
            print(json.dumps(row), file=log, flush=True)
            print(row, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="directory to write; it must not exist yet"
    )
    parser.add_argument("--steps", type=int, default=2400, help=f"of {BATCH} x {T} tokens (2400)")
    parser.add_argument("--tokenizer", type=Path, help="directory of an earlier run (made anew)")
    parser.add_argument(
        "--text", type=Path, help="the folder `sympy`, unpacked (the installed one)"
    )
    args = parser.parse_args()
    if args.out.exists():
        sys.exit(f"--out {args.out} exists; remove it or name another")
    found = default_text.find_files(args.text)
    texts = [text for _, text in data.documents(found)]
    args.out.mkdir(parents=True)
    (args.out / "config.json").write_text(json.dumps(SHAPE))
    if args.tokenizer:
        for name in TOKENIZER_FILES:
            shutil.copyfile(args.tokenizer / name, args.out / name)
    else:
        make_tokenizer(args.out, texts)
    tokenizer = load_tokenizer(args.out)
    each = tokenizer.encode_documents(texts)
    named = [(n, np.asarray(ids, np.uint16)) for (n, _), ids in zip(found, each, strict=True)]
    corpus = data.Corpus(*data.split(named), name=default_text.NAME)
    lookups = Lookups(tokenizer, corpus.train)
    print(f"{len(corpus.train):,} training tokens, {len(corpus.held_out):,} held out", flush=True)
    if args.steps == 0:
        return
    torch.manual_seed(0)
    model = Llama(LlamaConfig.from_hf(SHAPE))
    initialise(model)  # on the CPU: the same numbers for every device
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, on {device}", flush=True)
    with (args.out / "training.jsonl").open("w") as log:
        train(model.to(device), corpus, lookups, args.steps, log)
    written = args.out.with_name(f"{args.out.name}.written")
    checkpoint.save_pretrained(model.cpu(), written, tokenizer_from=args.out, dtype=torch.bfloat16)
    for file in written.iterdir():
        file.replace(args.out / file.name)
    written.rmdir()


if __name__ == "__main__":
    main()
