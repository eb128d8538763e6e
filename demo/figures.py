"""The figures of the method, drawn by one command from what the code computes.

    python demo/figures.py [--run out/demo]        what `make figures` runs, after `make demo`

What.  Each figure in demo/figures/ stands beside the numbers it is drawn from:

    demo         loss at 1x and at 8x and look-ups by length, of every model of a demo run
    rope         what stretching does to each rotary pair: the angle it turns by per token, linear
                 and yarn beside the teacher's, and how far apart near tokens look
    relations    the map R of one head's Q/Q relation on a few lines: teacher, untrained, restored
    positions    loss by position over eight native lengths: teacher, interpolated, restored
    tiles        which tiles the kernels visit, and whose statistics they use there
    memory       peak memory of the loss against T: the rows of `python -m bench memory` that are
                 kept in memory.jsonl; a GPU's are added by hand
    qwen25       loss by position of Qwen2.5-Coder-0.5B up to 262,144 tokens, and the share of its
                 short scores that is kept, against stage 1's learning rate: the rows of
                 runs/qwen25-0.5b.json
    retention    the teacher's scores that SmolLM2 keeps, against the tokens of its training: the
                 rows of runs/smollm2-135m.json at scale 8 with the default loss and rates, however
                 their tokens are split; and the control, trained alike with nothing stretched

How.  demo, relations and positions need a demo run; without one they are drawn again from their
JSON, which says in "about" by which commands, commit, versions and hardware its numbers came. The
head shown is the one that interpolation moved most.

Limits.  A sentence, a head and twelve blocks: pictures to read with, not measurements to quote.
"""

import argparse
import json
import math
import re
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from matplotlib import rcParams
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import demo  # noqa: E402 - demo.py, beside this file
from bench import memory  # noqa: E402
from engine import data, exits  # noqa: E402
from engine.machine import commit  # noqa: E402
from evals.next_token import block_scores  # noqa: E402
from hub import files  # noqa: E402
from hub.tokenizer import load_tokenizer  # noqa: E402
from model import Llama, make_student  # noqa: E402
from rope import frequencies  # noqa: E402

HERE = ROOT / "demo" / "figures"
TEACHER = ROOT / "demo" / "teacher"
SCORES = ROOT / "runs" / "smollm2-135m.json"
QWEN = ROOT / "runs" / "qwen25-0.5b.json"
COLOURS = demo.COLOURS
SENTENCE = "def read_json(path):\n    with open(path) as file:\n        return json.load(file)\n"
# What the picture of the loss by position shows, and how it is called there
POSITIONS = {
    "teacher": "teacher",
    "linear untrained": "interpolated,\nuntrained",
    "linear restored": "linear, restored",
    "yarn restored": "yarn, restored",
}
BLOCKS, WIDTH = 12, 128  # held-out blocks; tokens of the running mean
SHOWN = {
    "lambada_openai, accuracy": "LAMBADA",
    "average accuracy": "mean of LAMBADA, PIQA, ARC-easy, OpenBookQA",
}
WHICH = {"1": "stage 1 alone", "both": "both stages"}  # of train.py's --stage
AVERAGE = "average accuracy of five"
BINS = 16  # of a curve up to 262,144 tokens
RATES = {"--lr1", "--lr2", "--stage", "--relations"}  # flags of rows that go by their rate
QWEN_ROWS = {
    "teacher": "teacher",
    "linear student": "linear",
    "control student": "linear's control",
    "yarn untrained": "yarn, untrained",
    "yarn student": "yarn",
    "control-yarn student": "yarn's control",
}
WALK = (
    "not visited",
    "row i's statistics",
    "the diagonal: masked",
    "column j's statistics",
    "row i's statistics; the sum for column j is handed on",
)


def show(name: str, draw, values: dict | None = None) -> None:
    """Keeps values as NAME.json (None: takes those kept there) and draws them as NAME.png."""
    kept, picture = HERE / f"{name}.json", HERE / f"{name}.png"
    if values is not None:
        kept.write_text(json.dumps(values) + "\n")
    rcParams["font.size"] = 12  # what can still be read at half size
    figure = draw(json.loads(kept.read_text()))
    figure.savefig(picture, dpi=110)
    print(f"drawn: {picture.relative_to(ROOT)}", flush=True)


def canvas(width: float, height: float, columns: int = 1):
    """A figure and its row of axes."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def tidy(axis, title: str, x: str, y: str) -> None:
    axis.set_title(title, loc="left", fontsize=13)
    axis.set(xlabel=x, ylabel=y)
    axis.spines[["top", "right"]].set_visible(False)


# ---- rope


def rope_values(teacher: Llama) -> dict:
    """Radians per token of each pair; and 1 - mean cos(distance * angle) at distances from 1."""
    native, D = teacher.config.rope, teacher.config.head_dim
    kinds = {"teacher": native} | {k: native.scaled(k, 8.0) for k in ("linear", "yarn")}
    angles = {name: frequencies(r, D)[0].double() for name, r in kinds.items()}
    distances = torch.arange(1, 33).double()
    apart = {n: (1 - (distances[:, None] * w).cos().mean(-1)).tolist() for n, w in angles.items()}
    return {"radians per token": {n: w.tolist() for n, w in angles.items()}, "apart": apart}


def draw_rope(values: dict) -> Figure:
    figure, (left, right) = canvas(11, 4.4, 2)
    for name, w in values["radians per token"].items():
        left.plot(range(len(w)), w, color=COLOURS[name], lw=2.5, label=name)
    for name, apart in values["apart"].items():
        right.plot(range(1, len(apart) + 1), apart, color=COLOURS[name], lw=2.5, label=name)
    left.set_yscale("log")
    right.set_ylim(0)
    tidy(left, "how fast each rotary pair turns", "pair", "radians per token (log axis)")
    tidy(right, "how far apart near tokens look", "distance in tokens", "1 - mean cosine")
    left.legend(frameon=False)
    return figure


# ---- relations


@torch.no_grad()
def relation_values(models: dict[str, Llama]) -> dict:
    """R of the query head that interpolation moves most, on SENTENCE; its KL in nats per row."""
    tokenizer = load_tokenizer(TEACHER)
    ids = tokenizer.encode(SENTENCE)
    T = len(ids)
    unseen = torch.ones(T, T).triu(1).bool()
    maps = {}
    for name, model in models.items():
        walk = model.walk(torch.tensor([ids]))
        queries = torch.cat([q[0] for _, (q, _, _) in walk]).double()  # [L H, T, D]
        scores = queries @ queries.mT * model.score_scale(T)
        maps[name] = scores.masked_fill(unseen, -math.inf).softmax(-1)
    kl = {n: (maps["teacher"] * (maps["teacher"].clamp_min(1e-30) / m.clamp_min(1e-30)).log())
          .sum((-1, -2)) / T for n, m in maps.items()}  # fmt: skip
    head = int(kl["linear untrained"].argmax())
    H = models["teacher"].config.n_head
    return {
        "tokens": [tokenizer.decode([i]) for i in ids],
        "layer": head // H,
        "head": head % H,
        "KL": {n: round(float(each[head]), 6) for n, each in kl.items()},
        "R": {n: [[round(v, 6) for v in r] for r in m[head].tolist()] for n, m in maps.items()},
    }


def draw_relations(values: dict) -> Figure:
    figure, axes = canvas(3.7 * len(values["R"]), 4.1, len(values["R"]))
    for axis, (name, rows) in zip(axes, values["R"].items(), strict=True):
        drawn = axis.imshow(np.sqrt(rows), cmap="magma", vmin=0, vmax=1, interpolation="nearest")
        apart = "" if name == "teacher" else f"\nKL {values['KL'][name]:.2f} nats per row"
        axis.set_title(name + apart, fontsize=13)
        axis.set_xlabel("token looked at")
        axis.set_xticks(range(0, len(rows), 5))
        axis.set_yticks(range(0, len(rows), 5))
    axes[0].set_ylabel("token that looks")
    bar = figure.colorbar(drawn, ax=axes, shrink=0.9, ticks=[0, 0.1**0.5, 0.5**0.5, 1])
    bar.ax.set_yticklabels(["0", "0.1", "0.5", "1"])
    bar.set_label("R (root scale)")
    return figure


# ---- positions


def position_values(models: dict[str, Llama], run: Path) -> dict:
    """Nats per token of BLOCKS held-out blocks: a running mean over WIDTH tokens, at every 32nd."""
    corpus = data.load_corpus([], load_tokenizer(TEACHER), run / "cache", quiet=True)
    native = models["teacher"].config.rope.length
    blocks = corpus.held_out_blocks(8 * native, BLOCKS)
    mean, curves = np.ones(WIDTH) / WIDTH, {}
    for name, model in models.items():
        losses = block_scores(model, blocks)[0].mean(0)
        curves[name] = np.convolve(losses, mean, "valid")[::32].round(4).tolist()
    return {"native": native, "blocks": BLOCKS, "width": WIDTH, "curves": curves}


def draw_positions(values: dict) -> Figure:
    figure, (axis,) = canvas(11, 4.8)
    native, curves = values["native"], values["curves"]
    for name in POSITIONS:
        at = np.arange(len(curves[name])) * 32 + values["width"] / 2
        style = (0, (1, 1.2)) if "untrained" in name else "-"
        axis.plot(at, curves[name], ls=style, color=COLOURS[name.split()[0]], lw=3)
    heights = _apart([np.mean(curves[name][-8:]) for name in POSITIONS], 0.06 * axis.get_ylim()[1])
    for (name, label), y in zip(POSITIONS.items(), heights, strict=True):
        colour = COLOURS[name.split()[0]]
        axis.text(8.06 * native, y, label, color=colour, fontsize=13, va="center", weight="bold")
    axis.axvspan(0, native, color="0.93", zorder=0)
    axis.set(xlim=(0, 8 * native), ylim=0, xticks=[native * n for n in range(1, 9)])
    axis.set_xticklabels([f"{n}x\n{native * n:,}" for n in range(1, 9)])
    axis.text(native / 2, 0.15, "native\nlength", ha="center", color="0.35")
    tidy(axis, "loss at each position (nats per token; lower is better)", "tokens read before", "")
    return figure


def _apart(heights: list[float], least: float) -> list[float]:
    """The heights of labels, none within `least` of another."""
    moved = list(heights)
    order = sorted(range(len(heights)), key=heights.__getitem__)
    for below, above in pairwise(order):
        moved[above] = max(moved[above], moved[below] + least)
    return moved


# ---- tiles


def tile_values() -> dict:
    """The forward's walk and both kernels' backward, 8 x 8 tiles, as numbers in WALK."""
    n = 8
    forward = [[2 if j == i else int(j < i) for j in range(n)] for i in range(n)]
    backward = [[2 if j == i else 1 if j < i else 3 for j in range(n)] for i in range(n)]
    triangle = [[2 if j == i else 4 * (j < i) for j in range(n)] for i in range(n)]
    return {"forward": forward, "backward": backward, "triangle": triangle, "meaning": WALK}


def draw_tiles(values: dict) -> Figure:
    figure, axes = canvas(13.5, 5.8, 3)
    colours = ["0.9", "#4c72b0", "#dd8452", "#55a868", "#8172b3"]
    titles = {
        "forward": "forward: up to the diagonal",
        "backward": "kernel_triton.py, backward: all",
        "triangle": "kernel_hopper.py, backward: the triangle",
    }
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        axis.imshow(values[name], cmap=ListedColormap(colours), vmin=0, vmax=4)
        axis.set_xticks(np.arange(len(values[name]) + 1) - 0.5, [])
        axis.set_yticks(np.arange(len(values[name]) + 1) - 0.5, [])
        axis.grid(color="white", lw=2)
        axis.tick_params(length=0)
        axis.set_title(title, loc="left", fontsize=13)
        axis.set(xlabel="columns j, BS at a time", ylabel="rows i, BT per program")
    patches = [Patch(color=c, label=m) for c, m in zip(colours, values["meaning"], strict=True)]
    figure.legend(handles=patches, loc="outside lower center", ncols=3, frameon=False)
    return figure


# ---- retention


def retention_values() -> dict:
    """{score: {kind: {"untrained": share, WHICH: [[tokens, share], ...], "control": likewise}}}.

    share: of the teacher's score. Rows: those of SCORES at scale 8 with the default loss and rates.
    """
    rows = [r for r in json.loads(SCORES.read_text())["rows"] if _default(r)]
    out = {}
    for score, title in SHOWN.items():
        teacher = next(r["figures"]["teacher"][score] for r in rows if "teacher" in r["figures"])
        kinds = {k: {which: [] for which in (*WHICH.values(), "control")} for k in demo.KINDS}
        for row in rows:
            known, kind = row["figures"], kinds.get(row["arguments"]["rope"])
            if kind is None:
                continue
            if "untrained" in known:
                kind["untrained"] = round(known["untrained"][score] / teacher, 4)
            model = known.get("student") or known["model"]
            control = row["row"].startswith("control")
            which = "control" if control else WHICH[row["arguments"]["stage"]]
            kind[which].append([_tokens(row["arguments"]), round(model[score] / teacher, 4)])
        out[title] = kinds
    return out


def _default(row: dict) -> bool:
    arguments = row["arguments"]
    changed = arguments["lora_rank"] or arguments["logit_weight"] != 1
    changed = changed or arguments.get("stage2 native blocks") or arguments["scale"] > 8
    changed = changed or "--lr" in row["row"]
    # A control that learns from the teacher in stage 2, as its student does not
    changed = changed or arguments.get("stage2 teacher share")
    return not changed and arguments["relations"] == "qkv" and arguments["stage"] in WHICH


def _tokens(arguments: dict) -> int:
    stages = [s for s in ("stage1", "stage2") if f"{s} T" in arguments]
    return sum(math.prod(arguments[f"{s} {k}"] for k in ("T", "batch", "steps")) for s in stages)


def draw_retention(values: dict) -> Figure:
    figure, axes = canvas(11, 4.8, 2)
    found = [found for kinds in values.values() for found in kinds.values()]
    longest = max(tokens for each in found for which in WHICH.values() for tokens, _ in each[which])
    powers = [2**k for k in range(16, 32, 2) if 2**k <= 1.5 * longest]
    zero = powers[0] / 2  # where a logarithmic axis has room for 0
    for axis, (title, kinds) in zip(axes, values.items(), strict=True):
        axis.set_xscale("log", base=2)
        for kind, found in kinds.items():
            look = {"color": COLOURS[kind], "ms": 8, "clip_on": False}
            axis.plot(zero, 100 * found["untrained"], "s", **look, label=f"{kind}, untrained")
            for which, fill in zip(WHICH.values(), ("white", COLOURS[kind]), strict=True):
                each: dict[int, list[float]] = {}
                for tokens, share in sorted(found[which]):
                    each.setdefault(tokens, []).append(100 * share)
                axis.plot(list(each), [np.mean(y) for y in each.values()], color=COLOURS[kind])
                points = [(tokens, y) for tokens, shares in each.items() for y in shares]
                label = f"{kind}, {which}"
                axis.plot(*zip(*points, strict=True), "o", mfc=fill, **look, label=label)
            points = [(tokens, 100 * share) for tokens, share in found["control"]]
            axis.plot(*zip(*points, strict=True), "x", mew=2.5, **look, label=f"{kind}, control")
        axis.axhline(100, color=COLOURS["teacher"], lw=1.5, ls="--", label="teacher")
        axis.set_xticks([zero, *powers], ["0", *(f"{t / 1e6:.2g}M" for t in powers)])
        axis.set_ylim(0, 130)
        tidy(axis, title, "tokens of training (log axis, 0 apart)", "% of the teacher's score")
    labels = axes[0].get_legend_handles_labels()
    figure.legend(*labels, loc="outside lower center", ncols=4, frameon=False)
    return figure


# ---- qwen


def qwen_values() -> dict:
    """Of QWEN's rows by default, seed 0: nats per token by position, BINS means up to 262,144
    tokens.

    tried: {kind: {WHICH or "control": [[stage 1's learning rate, % of the teacher's average]]}}.
    """
    rows = json.loads(QWEN.read_text())["rows"]
    rows = [r for r in rows if AVERAGE in r["figures"].get("student", {})]
    teacher = rows[0]["figures"]["teacher"][AVERAGE]
    curves, tried, untrained = {}, {kind: {} for kind in demo.KINDS}, {}
    for row in rows:
        known, name, arguments = row["figures"], row["row"].split()[0], row["arguments"]
        if (
            name.endswith("-long")
            or name in ("relations", "pretrain")
            or set(re.findall(r"--[a-z0-9-]+", row["row"])) - RATES
        ):
            continue
        kept = {k: round(100 * m[AVERAGE] / teacher, 2) for k, m in known.items()}
        kind = arguments["rope"]
        which = "control" if name.startswith("control") else WHICH[arguments["stage"]]
        tried[kind].setdefault(which, []).append([arguments["stage1 lr"], kept["student"]])
        if "untrained" in kept:
            untrained[kind] = kept["untrained"]
        whole = [p for p in row.get("loss by position", []) if p["window"] > 32768]
        for column in ("teacher", "untrained", "student"):
            default = column != "student" or row["row"] == name
            if whole and column in whole[0] and row["seed"] == 0 and default:
                label = column if column == "teacher" else f"{name} {column}"
                curves[label] = np.reshape(whole[0][column], (BINS, -1)).mean(1).round(4).tolist()
    return {"curves": curves, "tried": tried, "untrained": untrained}


def draw_qwen(values: dict) -> Figure:
    figure, (left, right) = canvas(13.5, 5.2, 2)
    curves = values["curves"]
    beyond = curves.pop("linear untrained")  # twice as high as all others
    for name, losses in curves.items():
        style = ":" if "untrained" in name else "--" if "control" in name else "-"
        at = (np.arange(BINS) + 0.5) * 256 / BINS
        left.plot(at, losses, style, color=_colour(name), lw=2.5)
    heights = _apart([losses[-1] for losses in curves.values()], 0.05)
    for name, y in zip(curves, heights, strict=True):
        left.text(259, y, QWEN_ROWS[name], color=_colour(name), va="center", weight="bold")
    said = f"linear, untrained: {min(beyond):.1f} to {max(beyond):.1f}"
    left.text(40, 3.13, said, color=COLOURS["linear"], weight="bold")
    left.axvspan(0, 32, color="0.93", zorder=0)
    left.text(2, 2.03, "native", color="0.35")
    left.set(xlim=(0, 256), ylim=(2, 3.2), xticks=range(0, 257, 32))
    left.set_xticklabels(f"{n}K" for n in range(0, 257, 32))
    tidy(left, "loss by position (nats per token)", "tokens read before", "")
    for kind, found in values["tried"].items():
        look = {"color": COLOURS[kind], "ms": 8, "mew": 2, "ls": ""}
        for which, points in found.items():
            mark = "x" if which == "control" else "o"
            fill = "white" if which == WHICH["1"] else COLOURS[kind]
            at = zip(*points, strict=True)
            right.plot(*at, marker=mark, mfc=fill, **look, label=f"{kind}, {which}")
        line = {"color": COLOURS[kind], "ls": ":", "zorder": 0}
        right.axhline(values["untrained"][kind], **line, label=f"{kind}, untrained")
    right.axhline(100, color=COLOURS["teacher"], lw=1.5, ls="--", label="teacher", zorder=0)
    right.set(xscale="log", ylim=(65, 103))
    title = "% of the teacher's average of five short tasks"
    tidy(right, title, "stage 1's learning rate (log axis)", "")
    right.legend(fontsize=11, loc="lower left", framealpha=1, edgecolor="none")
    return figure


def _colour(name: str) -> str:
    return COLOURS["teacher" if name == "teacher" else "yarn" if "yarn" in name else "linear"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("out/demo"), help="a `make demo` run")
    run = parser.parse_args().run
    drawn = {"command": "python demo/figures.py", "commit": commit(), "torch": torch.__version__}
    teacher = Llama.from_pretrained(TEACHER, dtype=torch.float32)
    show("rope", draw_rope, rope_values(teacher) | {"about": drawn})
    show("tiles", draw_tiles, tile_values())
    show("retention", draw_retention, retention_values())
    show("qwen25", draw_qwen, qwen_values())
    memory.draw([row for _, row in files.json_lines(HERE / "memory.jsonl")], HERE / "memory.png")
    if not (run / "demo.json").is_file():
        print(f"{run} holds no demo run: the rest is drawn from the JSON of the last one")
        columns, maps, curves = None, None, None
    else:
        models = {"teacher": teacher}
        for kind in demo.KINDS:
            trained = Llama.from_pretrained(run / kind / "student", dtype=torch.float32)
            models[f"{kind} untrained"] = make_student(teacher, trained.config, trained=())
            models[f"{kind} restored"] = trained
        columns = json.loads((run / "demo.json").read_text())
        about = {"about": drawn | {"of": columns["about"]}}
        curves = position_values(models, run) | about
        maps = relation_values({k: v for k, v in models.items() if "yarn" not in k}) | about
    show("demo", lambda values: demo.picture(values["models"]), columns)
    show("relations", draw_relations, maps)
    show("positions", draw_positions, curves)


if __name__ == "__main__":
    exits.run(main, "figures.py")
