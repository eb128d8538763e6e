"""What was kept and what was gained: one model, or a student against its teacher.

    python eval.py --model out/demo/yarn/student --against demo/teacher
    python eval.py --model DIR --tasks piqa.jsonl.gz arc_easy --task-dir DATA --limit 200
    python eval.py --model DIR --against DIR --ruler --lengths 4096 32768 --ruler-data DATA
    python eval.py --model DIR --against DIR --passkey --ppl --positions --layers --out NEW
    python eval.py --model DIR --prompt "Once upon a time"

Held-out text.  Long blocks, s times the native length, are read twice: whole (loss at s x) and cut
into native blocks (loss at 1x), so that both figures are of the same words. Where s is not a whole
number, the last native block begins earlier and counts only words that the one before it did not
read. Loss is the mean over tokens, in nats; perplexity is its exponential; next-token accuracy, at
1x, is the share of tokens that the model holds for the likeliest.

Recall.  Look-up documents (engine/lookups.py) of 1, 2, 4 and 8 times the native length, up to s,
set values in their first eighth and ask for them in their last. Right means that the likeliest
token is the value.

Tasks.  LAMBADA and multiple choice by the rules of lm-evaluation-harness: evals/likelihood.py.

Long text.  Sliding-window perplexity and loss by position: evals/longtext.py. Passkey and RULER:
evals/prompts.py.

Layers.  Where the relations of teacher and student differ: evals/layers.py.

With --against two columns are added: "teacher", and "untrained" (the teacher's weights under the
student's positions). The table then also says which share of the lost loss was recovered, and each
task's retention with its confidence interval (evals/retention.py).

What comes out.  Each figure on standard error when it is known, then the table on standard output.
With --out, report.json (evals/report.py lists its keys), report.md and report.png, and what was
asked for of passkey.png, positions.png and layers.png. Same arguments, same machine: same figures.

Exit codes: 0 done; 2 refused or cannot go on, and one sentence says why; 3 stopped by Ctrl-C,
SIGTERM or SIGHUP.

Limits.  Held-out text runs on across document borders. A standard error says how far other words,
items or questions would move a figure, not how far another training run would.

Source.  LinearARD arXiv 2604.00004 for what is compared; each file of evals/ names its own.
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
from evals import flags, layers, likelihood, longtext, pictures, prompts, report, tasks
from evals.generate import stream
from evals.retention import TEACHER, UNTRAINED, retention
from evals.ruler_tasks import RULER_TASKS
from hub import checkpoint, files
from hub.tokenizer import Tokenizer, load_tokenizer
from model import Llama, LlamaConfig, choose_dtype, make_student

DOCUMENTS = 8  # look-up documents per length, with 8 questions each


# ---------------------------------------------------------------- the headline figures


@torch.no_grad()
def text_loss(
    model: Llama, blocks: Tensor, scored: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(loss in nats, whether the token is predicted right), each [n, scored], of blocks [n, T + 1].

    scored: how many predictions count, the last ones of each block (None: all T).
    """
    T = blocks.shape[1] - 1
    scored = scored or T
    losses, right = [], []
    for part in blocks.split(max(1, likelihood.batch_tokens(model.device) // T)):
        h = model.hidden(part[:, :-1].to(model.device), model.dtype)[:, T - scored :]
        goals = part[:, 1:].to(model.device)[:, T - scored :]
        loss, hit = likelihood.token_scores(model, h.flatten(0, 1), goals.flatten())
        losses.append(loss)
        right.append(hit)
    flat = torch.cat(losses).double().cpu().numpy(), torch.cat(right).double().cpu().numpy()
    return flat[0].reshape(len(blocks), scored), flat[1].reshape(len(blocks), scored)


@torch.no_grad()
def recall(model: Llama, lookups: Lookups, T: int, seed: int) -> np.ndarray:
    """[questions] of DOCUMENTS look-up documents of T tokens: 1 where answered right, else 0."""
    rng = np.random.default_rng([seed, T])
    made = [lookups.document(rng, T, "far") for _ in range(DOCUMENTS)]
    ids = torch.from_numpy(np.stack([ids for ids, _ in made]))  # [DOCUMENTS, T + 1]
    where = torch.from_numpy(np.stack([where for _, where in made])).to(model.device)
    likeliest, together = [], max(1, likelihood.batch_tokens(model.device) // T)
    for part, at in zip(ids[:, :-1].split(together), where.split(together), strict=True):
        h = model.hidden(part.to(model.device), model.dtype)
        asked = h[torch.arange(len(part), device=model.device)[:, None], at]  # [rows, 8, C]
        likeliest.append(model.lm_head(asked).argmax(-1))
    values = ids.gather(1, where.cpu() + 1)
    return (torch.cat(likeliest).cpu() == values).double().flatten().numpy()


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
        seed: int = 0,
    ):
        self.native, self.scale, self.seed = native, scale, seed
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
        full, rest = divmod(self.long, self.native)
        starts = [i * self.native for i in range(full)]
        cut = torch.cat([self.whole[:, i : i + self.native + 1] for i in starts])
        loss, right = text_loss(model, cut)  # [full * blocks, native]
        near, hits = np.split(loss, full), np.split(right, full)
        if rest:
            last = text_loss(model, self.whole[:, self.long - self.native :], rest)
            near, hits = [*near, last[0]], [*hits, last[1]]
        near, hits = np.concatenate(near, 1), np.concatenate(hits, 1)  # [blocks, long]
        far, _ = text_loss(model, self.whole)
        out = {}
        for times, losses in ((1, near), (self.scale, far)):
            mean, error, items = _mean(losses)
            row = np.exp(min(mean, 50.0))
            out[f"loss at {times:g}x"] = mean, error, items
            out[f"perplexity at {times:g}x"] = float(row), error and float(row * error), items
        out["next-token accuracy"] = _mean(hits)
        for times in (1, 2, 4, 8) if self.lookups else ():
            if times <= self.scale:
                found = recall(model, self.lookups, times * self.native, self.seed)
                out[f"recall at {times}x"] = _mean(found)
        return out

    def about(self, row: str) -> dict:
        """What a row was measured on, as report.json says it."""
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
    """None, with the reason said, where words, filler or room in `native` tokens are too few."""
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
    """One evaluation, or a text continued. argv: the command line's (None: the process's own).

    Raises ValueError for what cannot be measured.
    """
    args = flags.parse(argv, __doc__)  # nothing changes args after this line
    if args.prompt is not None:
        return talk(args)
    began, device = time.time(), torch.device(args.device)
    dtype, _ = choose_dtype(device, args.dtype)
    with contextlib.ExitStack() as ends:
        # ---- what to measure: whatever can be refused is refused here, before a weight is read
        if args.out:
            claim(args)
        student, teacher = configs(args.model, args.against)
        native = args.native or (teacher or student).rope.length
        longest = max(student.rope.length, teacher.rope.length if teacher else 0)
        scale = args.scale or max(1.0, longest / native)
        long = round(native * scale)
        lengths = args.lengths or [native << k for k in range(32) if native << k <= long]
        if args.ppl and min(lengths) < longtext.STRIDE:
            raise ValueError(flags.too_short(lengths))
        asked, lacking = tasks.find(args.tasks, args.task_dir, args.limit)
        tokenizer = load_tokenizer(args.model)
        requests = [likelihood.encode(tokenizer, task.pairs) for task in asked]
        wanted = args.ruler if args.ruler else list(RULER_TASKS) if args.ruler is not None else []
        wanted += ["passkey"] if args.passkey else []
        able, unable = prompts.feasible(
            tokenizer, wanted, lengths, args.ruler_seed, args.ruler_data
        )
        missing = lacking + unable
        documents = []
        if args.documents:
            documents = longtext.documents(args.documents, tokenizer, max(lengths), args.blocks)
        reads = [max(lengths)] if args.positions or (args.ppl and not documents) else []
        reads += [long] if args.layers or not args.no_text else []
        if missing:
            print("left out:\n  " + "\n  ".join(missing), file=sys.stderr)

        # ---- text, and the folder of the result
        out, corpus = None, None
        if args.out:
            out = ends.enter_context(folder.Folder(args.out, "eval.py"))
        if reads:
            cache = args.cache or Path(ends.enter_context(tempfile.TemporaryDirectory()))

            def enough(text: data.Corpus) -> None:
                text.held_out_blocks(max(reads), 1)

            with files.disk_sentences(cache):
                given = {"without": args.out, "check": enough, "field": args.text_field}
                corpus = data.load_corpus(args.data, tokenizer, cache, **given)
            for note in corpus.notes:
                print(note)
        of = f"held-out text of {corpus.name}" if corpus else ""
        keep = out.write if out and args.predictions else None

        # ---- the models, by column
        model = Llama.from_pretrained(args.model, dtype=dtype, device=str(device))
        models = {"model": model}
        if teacher:
            frozen = Llama.from_pretrained(args.against, dtype=dtype, device=str(device))
            untrained = make_student(frozen, student, trained=())
            models = {TEACHER: frozen, UNTRAINED: untrained, "student": model}
        scores = report.Scores({name: {} for name in models}, dtype, args.command, aloud=True)
        more: dict = {"missing": missing}

        # ---- the headline: held-out text
        if not args.no_text:
            held_out = HeldOut(corpus, tokenizer, native, scale, args.blocks, args.seed)
            for name, model in models.items():
                for row, (value, error, items) in held_out.figures(model).items():
                    scores.add(name, row, value, error=error, items=items, **held_out.about(row))

        # ---- short tasks
        likelihood.task_scores(scores, models, asked, requests, keep)

        # ---- long text: how far the context reaches
        if args.ppl:
            texts = documents or list(corpus.held_out_blocks(max(lengths), args.blocks).numpy())
            where = ", ".join(map(str, args.documents)) if documents else of
            about = {"version": f"sliding window (PI), {where}", "seed": None}
            longtext.sliding_scores(scores, models, tokenizer, texts, sorted(lengths), **about)
        if args.positions:
            blocks = corpus.held_out_blocks(max(lengths), args.blocks)
            about = {"version": f"loss by position, {of}", "seed": None}
            curve = longtext.position_scores(scores, models, blocks, native, **about)
            more["positions"] = curve
            if out:
                out.write("positions.png", pictures.positions(curve, native))
        if args.passkey:
            more["passkey"] = prompts.passkey_scores(
                scores, models, tokenizer, able, args.samples, args.ruler_seed
            )
            if out:
                out.write("passkey.png", pictures.passkey(more["passkey"]))
        prompts.ruler_scores(
            scores, models, tokenizer, able, args.samples, args.ruler_seed, args.ruler_data, keep
        )
        notes = [*tasks.own(asked), *prompts.variants(scores)]

        # ---- layers: where the stretched positions hurt
        if args.layers:
            blocks = corpus.held_out_blocks(long, args.blocks)[:, :-1]
            kl = layers.compare(models, blocks, dtype)
            about = {"tokens": long, "blocks": len(blocks), "version": f"relation KL, {of}"}
            more["layers"] = layers.as_lists(kl) | about
            notes.append(f"{layers.HEAD}, {long} tokens:\n\n{layers.table(kl)}")
            if out:
                out.write("layers.png", pictures.layers(kl))

        # ---- the report
        shares, kept = {}, {}
        if teacher and not args.no_text:
            shares = report.recovered(scores.columns, "loss at 1x")
        # Of tasks alone: beyond its own length the teacher's score does not say what could be kept
        judged = {row: x for row, x in scores.values.items() if not row.startswith(prompts.ROWS)}
        if teacher and judged:
            kept = retention(judged, args.seed)
        about = {"command": args.command, "seconds": round(time.time() - began, 1)}
        about |= versions(device) | {"seed": args.seed, "dtype": str(dtype).removeprefix("torch.")}
        print(report.render(out, scores, shares, about, kept=kept, more=more, notes=notes))
        print(json.dumps(about))


def claim(args) -> None:
    """Refuses an --out that is not this program's to write in."""
    apart = [("--model", args.model), *(("--data", path) for path in args.data)]
    apart += [("--against", args.against)] if args.against else []
    for flag, path in apart:
        folder.check(args.out, "--out", "eval.py", resume=None, apart={flag: path})


def configs(model: Path, against: Path | None) -> tuple[LlamaConfig, LlamaConfig | None]:
    """Both config.json; ValueError where they are not one network under two kinds of position."""
    student = config_of(model)
    if against is None:
        return student, None
    teacher = config_of(against)
    positions = {"rope": student.rope, "window": student.window, "source": student.source}
    if replace(teacher, **positions) != student:
        raise ValueError(
            f"--against {against} is another network than --model {model}: not its teacher"
        )
    return student, teacher


def config_of(path: Path) -> LlamaConfig:
    """config.json, which the weights beside it must fit: by their headers, in milliseconds."""
    config = LlamaConfig.from_hf(files.read_json(path / "config.json"))
    with torch.device("meta"):
        checkpoint.check_fits(Llama(config), path)
    return config


def talk(args) -> None:
    """Continues a text greedily, as it comes."""
    device = torch.device(args.device)
    config, _ = configs(args.model, None)
    tokenizer = load_tokenizer(args.model)
    ids = tokenizer.encode(sys.stdin.read() if args.prompt == "-" else args.prompt, bos=True)
    if len(ids) + args.new_tokens > config.rope.length:
        beyond = f"{args.new_tokens} new ones exceed the context of {config.rope.length}"
        said = f"the prompt's {len(ids)} tokens and {beyond}: what comes after that may be nonsense"
        print(said, file=sys.stderr)
    dtype, _ = choose_dtype(device, args.dtype)
    model = Llama.from_pretrained(args.model, dtype=dtype, device=args.device)
    began, n = time.time(), 0
    for text, n in stream(model, tokenizer, ids, args.new_tokens, dtype):  # noqa: B007
        print(text, end="", flush=True)
    rate = n / (time.time() - began)
    print(f"\n[{len(ids)} tokens in, {n} out, {rate:.0f} tokens/s]", file=sys.stderr)


if __name__ == "__main__":
    exits.run(main, "eval.py")
