"""What was kept and what was gained: one model, or a student against its teacher.

    python eval.py --model out/demo/student --against demo/teacher
    python eval.py --model DIR --tasks piqa.jsonl.gz arc_easy --task-dir DATA --limit 200
    python eval.py --model DIR --against DIR --ruler --lengths 4096 32768 --ruler-data DATA --out NEW
    python eval.py --model DIR --against DIR --passkey --ppl --positions --layers --out NEW
    python eval.py --model DIR --prompt "Once upon a time"

Held-out text.  Long blocks of s times the native length are read twice: whole (loss at s x) and cut
into native blocks (loss at 1x), so that both figures are of the same words. Where s is not a whole
number, the last native block begins earlier and counts only words that the one before it did not
read. Loss is the mean over tokens, in nats; perplexity its exponential; accuracy the share of tokens
that are the likeliest one.

Recall.  Look-up documents (engine/lookups.py) of 1, 2, 4 and 8 times the native length, values set in
the first eighth and asked for in the last; right means that the likeliest token is the value.

Tasks.  LAMBADA and multiple choice by the rules of lm-evaluation-harness: evals/likelihood.py.

Long text.  Sliding-window perplexity and loss by position: evals/longtext.py. Passkey and RULER:
evals/prompts.py.

Layers.  Where the relations of teacher and student differ: evals/layers.py.

Given --against, a third column is made: the teacher's weights under the student's positions,
"untrained". With it, the share of the lost loss recovered, and each task's retention with its
confidence interval (evals/retention.py).

What comes out.  The table on standard output; with --out report.json (evals/report.py lists its
keys), report.md and report.png, and, as asked for, passkey.png, positions.png and layers.png. Same
arguments, same machine: same figures.

Exit codes: 0 done; 2 refused, one sentence says why and nothing was written; 3 stopped by Ctrl-C.
"""

from engine import exits  # first: from here on, a Ctrl-C ends in one line  # isort: skip

import contextlib
import json
import platform
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engine import data, folder
from engine.lookups import Lookups
from evals import flags, layers, likelihood, longtext, prompts, report, ruler_tasks, tasks
from evals.generate import stream
from evals.retention import TEACHER, UNTRAINED, retention
from hub import files
from hub.tokenizer import Tokenizer, load_tokenizer
from model import Llama, LlamaConfig, choose_dtype, make_student

DOCUMENTS = 8  # look-up documents per length, with 8 questions each


# ---------------------------------------------------------------- the headline figures


@torch.no_grad()
def text_loss(
    model: Llama, blocks: Tensor, dtype: torch.dtype, scored: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(loss in nats, is the token predicted right) of blocks [n, T + 1], each [n, scored].

    scored: how many of the last predictions of a block count (all).
    """
    T = blocks.shape[1] - 1
    scored = scored or T
    losses, right = [], []
    for part in blocks.split(max(1, likelihood.batch_tokens(model.device) // T)):
        h = model.hidden(part[:, :-1].to(model.device), dtype)[:, T - scored :]
        goals = part[:, 1:].to(model.device)[:, T - scored :]
        loss, hit = likelihood.token_scores(model, h.flatten(0, 1), goals.flatten())
        losses.append(loss)
        right.append(hit)
    flat = torch.cat(losses).double().cpu().numpy(), torch.cat(right).double().cpu().numpy()
    return flat[0].reshape(len(blocks), scored), flat[1].reshape(len(blocks), scored)


@torch.no_grad()
def recall(model: Llama, lookups: Lookups, T: int, dtype: torch.dtype, seed: int) -> np.ndarray:
    """Which questions of DOCUMENTS look-up documents of T tokens are answered right: 0 or 1 each."""
    rng = np.random.default_rng([seed, T])
    made = [lookups.document(rng, T, "far") for _ in range(DOCUMENTS)]
    right = []
    together = max(1, likelihood.batch_tokens(model.device) // T)
    for first in range(0, DOCUMENTS, together):
        now = made[first : first + together]
        ids = torch.from_numpy(np.stack([ids[:-1] for ids, _ in now])).to(model.device)
        h = model.hidden(ids, dtype)
        for row, (ids, where) in enumerate(now):
            asked = h[row, torch.from_numpy(where).to(model.device)]
            right.extend(model.lm_head(asked).argmax(-1).cpu().numpy() == ids[where + 1])
    return np.asarray(right, dtype=np.float64)


class HeldOut:
    """The held-out text and the look-ups that the headline figures are measured on.

    `blocks` is how many long blocks are read: 0, with the reason said, where the text is too short.
    """

    def __init__(
        self,
        corpus: data.Corpus,
        tokenizer: Tokenizer,
        native: int,
        scale: float,
        blocks: int,
        *,
        seed: int = 0,
        dtype: torch.dtype | None = None,
    ):
        self.native, self.scale, self.seed, self.dtype = native, scale, seed, dtype
        self.long, self.name, self.blocks = round(native * scale), corpus.name, 0
        if not blocks:
            return
        if self.long >= len(corpus.held_out):
            print(f"no table: the held-out text has {len(corpus.held_out):,} tokens, a block "
                  f"{self.long:,}; add --data")  # fmt: skip
            return
        self.whole = corpus.held_out_blocks(self.long, blocks)  # [blocks, long + 1]
        self.blocks = len(self.whole)
        self.lookups = make_lookups(tokenizer, corpus, native, self.long)

    def measure(self, model: Llama) -> dict[str, float]:
        """One column of the table: {row: figure}."""
        return {row: value for row, (value, _, _) in self.figures(model).items()}

    def figures(self, model: Llama) -> dict[str, tuple[float, float | None, int]]:
        """{row: (figure, its standard error over blocks or questions, tokens or questions)}."""
        dtype = self.dtype or model.dtype
        full, rest = divmod(self.long, self.native)
        starts = [i * self.native for i in range(full)]
        cut = torch.cat([self.whole[:, i : i + self.native + 1] for i in starts])
        loss, right = text_loss(model, cut, dtype)  # [full * blocks, native]
        near, hits = np.split(loss, full), np.split(right, full)
        if rest:
            last = text_loss(model, self.whole[:, self.long - self.native :], dtype, rest)
            near, hits = [*near, last[0]], [*hits, last[1]]
        near, hits = np.concatenate(near, 1), np.concatenate(hits, 1)  # [blocks, long]
        far, _ = text_loss(model, self.whole, dtype)
        out = {}
        for times, losses in ((1, near), (self.scale, far)):
            mean, error, items = _mean(losses)
            row = np.exp(min(mean, 50.0))
            out[f"loss at {times:g}x"] = mean, error, items
            out[f"perplexity at {times:g}x"] = float(row), error and float(row * error), items
        out["next-token accuracy"] = _mean(hits)
        for times in (1, 2, 4, 8) if self.lookups else ():
            if times <= self.scale:
                found = recall(model, self.lookups, times * self.native, dtype, self.seed)
                out[f"recall at {times}x"] = _mean(found)
        return out

    def about(self, row: str) -> dict:
        """What a row is a figure of."""
        if row.startswith("recall"):
            return {"version": "look-ups, far", "seed": self.seed}
        text = {"version": f"held-out text of {self.name}", "seed": None}
        return text | {"blocks": self.blocks, "tokens each": self.long}


def _mean(x: np.ndarray) -> tuple[float, float | None, int]:
    """(mean, its standard error over rows, numbers) of x [rows] or [rows, tokens]."""
    rows = x.reshape(len(x), -1).mean(1)
    error = float(rows.std(ddof=1) / len(rows) ** 0.5) if len(rows) > 1 else None
    return float(x.mean()), error, x.size


def make_lookups(
    tokenizer: Tokenizer, corpus: data.Corpus, native: int, longest: int
) -> Lookups | None:
    """None, with the reason said, where words, filler text or room in `native` tokens are too few."""
    enough = len(corpus.held_out) > longest + 1
    try:
        lookups = Lookups(tokenizer, corpus.held_out if enough else corpus.train)
        for T in (native, longest):
            lookups.document(np.random.default_rng(0), T, "far")
        return lookups
    except ValueError as e:
        print(f"recall is left out: {e}", file=sys.stderr)
        return None


def versions(device: torch.device) -> dict:
    """What the figures were measured with."""
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": name,
        "threads": torch.get_num_threads(),
    }


# ---------------------------------------------------------------- the program


def main(argv: list[str] | None = None) -> None:
    args = flags.parse(argv, __doc__)  # nothing changes args after this line
    if args.prompt is not None:
        return talk(args)
    with contextlib.ExitStack() as ends:
        out = None
        if args.out:
            given = [("--model", args.model), ("--against", args.against or args.model)]
            for flag, path in (*given, *(("--data", path) for path in args.data)):
                folder.check(args.out, "--out", "eval.py", resume=None, apart={flag: path})
            out = ends.enter_context(folder.Folder(args.out, "eval.py"))
        cache = args.cache or Path(ends.enter_context(tempfile.TemporaryDirectory()))
        evaluate(args, out, cache)


def evaluate(args, out: folder.Folder | None, cache: Path) -> None:
    began, device = time.time(), torch.device(args.device)
    dtype, _ = choose_dtype(device, args.dtype)

    # ---- what to measure: whatever can be refused is refused here, before a weight is loaded
    student, teacher = configs(args.model, args.against)
    native = args.native or (teacher or student).rope.length
    longest = max(student.rope.length, teacher.rope.length if teacher else 0)
    scale = args.scale or max(1.0, longest / native)
    doubled = [native * 2**k for k in range(32) if native * 2**k <= scale * native]
    lengths = sorted(set(args.lengths or doubled))
    if args.ppl and lengths[0] < longtext.STRIDE:
        raise ValueError(f"--ppl needs windows of at least its stride, {longtext.STRIDE} tokens, "
                         f"and --lengths begins at {lengths[0]}; name longer ones")  # fmt: skip
    asked, lacking = tasks.find(args.tasks, args.task_dir, args.limit)
    tokenizer = load_tokenizer(args.model)
    wanted = (args.ruler or list(ruler_tasks.RULER_TASKS)) if args.ruler is not None else []
    wanted += ["passkey"] if args.passkey else []
    able, unable = prompts.feasible(tokenizer, wanted, lengths, args.ruler_seed, args.ruler_data)
    documents = []
    if args.ppl and args.documents:
        documents = longtext.documents(args.documents, tokenizer, lengths[-1], args.blocks)
    reads = [lengths[-1]] if args.positions or (args.ppl and not args.documents) else []
    reads += [round(native * scale)] if args.layers or not args.no_text else []
    corpus = None
    if reads:
        with files.disk_sentences(cache):
            corpus = data.load_corpus(args.data, tokenizer, cache, without=args.out,
                                      check=lambda text: text.held_out_blocks(max(reads), 1))  # fmt: skip
    if lacking or unable:
        print("left out:\n  " + "\n  ".join(lacking + unable), file=sys.stderr)

    # ---- the models, by column
    models = {"model": Llama.from_pretrained(args.model, dtype=dtype, device=str(device))}
    if teacher:
        frozen = Llama.from_pretrained(args.against, dtype=dtype, device=str(device))
        untrained = make_student(frozen, student, trained=())
        models = {TEACHER: frozen, UNTRAINED: untrained, "student": models["model"]}
    scores = report.Scores({name: {} for name in models}, dtype, args.command)
    keep = out.write if out and args.predictions else None
    more: dict = {"missing": lacking + unable}
    pictures: dict[str, tuple] = {}  # file: (the function of evals/pictures.py, its arguments)

    # ---- held-out text
    if not args.no_text:
        held_out = HeldOut(
            corpus, tokenizer, native, scale, args.blocks, seed=args.seed, dtype=dtype
        )
        for name, model in models.items():
            for row, (value, error, items) in held_out.figures(model).items():
                scores.add(name, row, value, error=error, items=items, **held_out.about(row))

    # ---- short tasks
    likelihood.task_scores(scores, models, asked, tokenizer, keep)

    # ---- long text
    if args.ppl:
        texts = documents or list(corpus.held_out_blocks(lengths[-1], args.blocks).numpy())
        of = ", ".join(map(str, args.documents)) if documents else f"held-out text of {corpus.name}"
        about = {"version": f"sliding window (PI), {of}", "seed": None}
        longtext.sliding_scores(scores, models, tokenizer, texts, lengths, **about)
    if args.positions:
        blocks = corpus.held_out_blocks(lengths[-1], args.blocks)
        about = {"version": f"loss by position, held-out text of {corpus.name}", "seed": None}
        more["positions"] = longtext.position_scores(scores, models, blocks, native, **about)
        pictures["positions.png"] = ("positions", more["positions"], native)
    if found := [length for length, task in able if task == "passkey"]:
        more["passkey"] = prompts.passkey_scores(
            scores, models, tokenizer, found, args.samples, args.ruler_seed
        )
        pictures["passkey.png"] = ("passkey", more["passkey"])
    able = [(length, task) for length, task in able if task != "passkey"]
    prompts.ruler_scores(
        scores, models, tokenizer, able, args.samples, args.ruler_seed, args.ruler_data, keep
    )
    notes = prompts.variants(scores)

    # ---- layers
    if args.layers:
        blocks = corpus.held_out_blocks(round(native * scale), args.blocks)[:, :-1]
        kl = layers.compare(models, blocks, dtype)
        more["layers"] = layers.as_lists(kl) | {"tokens": blocks.shape[1], "blocks": len(blocks)}
        notes.append(f"Relation KL in nats, mean over heads (worst head), {blocks.shape[1]} tokens:"
                     f"\n\n{layers.table(kl)}")  # fmt: skip
        pictures["layers.png"] = ("layers", kl)

    # ---- the report
    shares = {}
    if teacher and not args.no_text:
        shares = report.recovered(scores.columns, "loss at 1x")
    # Of tasks alone: beyond its own length the teacher does not say what there was to keep
    beyond = ("RULER", "passkey")
    judged = {row: x for row, x in scores.values.items() if not row.startswith(beyond)}
    kept = retention(judged, args.seed) if teacher and judged else {}
    about = {"command": args.command, "seconds": round(time.time() - began, 1), **versions(device)}
    about |= {"seed": args.seed, "dtype": str(dtype).removeprefix("torch.")}
    print(report.render(out, scores, shares, about, kept=kept, more=more, notes=notes))
    if out:
        from evals import pictures as drawn  # matplotlib is needed here alone

        for name, (function, *of) in pictures.items():
            out.write(name, getattr(drawn, function)(*of))
    print(json.dumps(about))


def configs(model: Path, against: Path | None) -> tuple[LlamaConfig, LlamaConfig | None]:
    """The two config.json; ValueError where they are not one network under two kinds of position."""
    student = LlamaConfig.from_hf(files.read_json(model / "config.json"))
    if against is None:
        return student, None
    teacher = LlamaConfig.from_hf(files.read_json(against / "config.json"))
    positions = {"rope": student.rope, "window": student.window, "source": student.source}
    if replace(teacher, **positions) != student:
        raise ValueError(
            f"--against {against} is another network than --model {model}: not its teacher"
        )
    return student, teacher


def talk(args) -> None:
    """Continues a text greedily, as it comes."""
    device = torch.device(args.device)
    config, _ = configs(args.model, None)
    tokenizer = load_tokenizer(args.model)
    ids = tokenizer.encode(sys.stdin.read() if args.prompt == "-" else args.prompt, bos=True)
    if len(ids) + args.new_tokens > config.rope.length:
        print(f"the prompt's {len(ids)} tokens and {args.new_tokens} new ones exceed the context "
              f"of {config.rope.length}: what comes after that may be nonsense", file=sys.stderr)  # fmt: skip
    dtype, _ = choose_dtype(device, args.dtype)
    model = Llama.from_pretrained(args.model, dtype=dtype, device=args.device)
    began, n = time.time(), 0
    for text, n in stream(model, tokenizer, ids, args.new_tokens, dtype):  # noqa: B007
        print(text, end="", flush=True)
    rate = n / (time.time() - began)
    print(f"\n[{len(ids)} tokens in, {n} out, {rate:.0f} tokens/s]", file=sys.stderr)


if __name__ == "__main__":
    exits.run(main, "eval.py")
