"""The demo: YaRN's student, then the paper's, in one table and one picture.

    python demo/demo.py [--out out/demo] [more flags of train.py]        what `make demo` runs

What.  Two runs of train.py on the embedded teacher, `--rope yarn` and `--rope linear` (position
interpolation, the paper's), each through both stages, in OUT/yarn and OUT/linear. YaRN's comes
first, as it needs a third of the tokens: its table and picture are there after a third of the time.
Then OUT/demo.md, OUT/demo.json (with command, commit, versions and hardware) and OUT/demo.png put
both reports side by side. An earlier demo's two folders, cache and these three files are replaced,
and nothing else. Ctrl-C stops it; a new demo begins anew.

Time.  Each run has all cores. One thread and two gave the same bits (AMD EPYC, Zen 4).

How it is read.  Recovered is (untrained linear - student) / (untrained linear - teacher) at 1x for
all columns: the share of what position interpolation loses. (In the runs' own reports each kind's
untrained student stands in linear's place: evals/retention.py.)

Limits.  A model of 5.7M parameters and minutes of two CPU cores: what it shows of a real model is
the shape of the curves, not their height.
"""

import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from engine import exits, folder  # noqa: E402

KINDS = ("linear", "yarn")
COLOURS = {"teacher": "0.35", "linear": "#c44e52", "yarn": "#4c72b0"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="a folder (out/demo)")
    args, rest = parser.parse_known_args()
    out = args.out
    began = time.time()
    # Tensors in huge pages: 5 % less time. Read when a process begins; other C libraries ignore it
    environment = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", **os.environ}
    for kind in KINDS:
        folder.clear(out / kind)
    for kind in reversed(KINDS):
        command = [sys.executable, str(ROOT / "train.py"), "--rope", kind, "--out", str(out / kind)]
        print(f"\n$ python train.py --rope {kind} --out {out / kind}", flush=True)
        command += ["--cache", str(out / "cache"), *rest]
        # In a session of its own, so that a stop reaches it once, by way of this process
        run = subprocess.Popen(command, start_new_session=True, env=environment)
        try:
            run.wait()
        except KeyboardInterrupt:
            exits.heard()
            run.send_signal(signal.SIGINT)  # train.py ends its step
            try:
                run.wait()
            finally:
                run.kill()  # at once, if asked once more
            raise
        if run.returncode:
            sys.exit(run.returncode)
        print(f"\n{round(time.time() - began)} seconds so far; {kind}'s table stands above, its "
              f"picture is {out / kind / 'report.png'}", flush=True)  # fmt: skip
    table, seconds = side_by_side(out), round(time.time() - began)
    (out / "demo.md").write_text(table + "\n")
    command = ["python", "demo/demo.py", *sys.argv[1:]]
    found = {"models": columns(out), "about": about(out, command) | {"seconds": seconds}}
    (out / "demo.json").write_text(json.dumps(found) + "\n")
    picture(found["models"]).savefig(out / "demo.png", dpi=110)
    print(f"\n{table}\n\n{seconds} seconds in all; the picture is {out / 'demo.png'}")


def about(out: Path, command: list[str]) -> dict:
    """What the figures mean nothing without."""
    from engine.machine import commit

    versions = json.loads((out / KINDS[0] / "report.json").read_text())["about"]["versions"]
    named = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    processor = {"processor": named[1]} if named else {}
    return {"command": shlex.join(command), "commit": commit(), **versions, **processor}


def columns(out: Path) -> dict[str, dict[str, float]]:
    """{column: {row: figure}} of both reports; the teacher once."""
    found = {}
    for kind in KINDS:
        report = json.loads((out / kind / "report.json").read_text())
        for name in report["columns"]:
            label = name if name == "teacher" else f"{kind} {name}"
            found[label] = {row: values[name] for row, values in report["rows"].items()}
    return found


def recovered(found: dict, label: str) -> float:
    """The share of what position interpolation loses at 1x."""
    lost = found["linear untrained"]["loss at 1x"]
    return (lost - found[label]["loss at 1x"]) / (lost - found["teacher"]["loss at 1x"])


def side_by_side(out: Path) -> str:
    """Markdown: a row for each model."""
    found = columns(out)
    rows = list(found["teacher"])
    shown = [r for r in rows if r.startswith(("loss at", "recall at"))]
    lines = ["| | " + " | ".join([*shown, "recovered of what linear loses"]) + " |"]
    lines.append("|---|" + "---:|" * (len(shown) + 1))
    for label, figures in found.items():
        cells = [f"{figures[r]:.3f}" if "loss" in r else f"{100 * figures[r]:.0f} %" for r in shown]
        ends = label in ("teacher", "linear untrained")  # 100 % and 0 % by definition
        share = "" if ends else f"{100 * recovered(found, label):.1f} %"
        lines.append("| " + " | ".join([label, *cells, share]) + " |")
    return "\n".join(lines)


def picture(found: dict[str, dict[str, float]]):
    """Two panels: loss at 1x and at 8x, and look-ups by length, for every model."""
    from matplotlib.figure import Figure

    lengths = [r for r in found["teacher"] if r.startswith("recall at")]
    near, far = (r for r in found["teacher"] if r.startswith("loss at"))
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    for i, (label, figures) in enumerate(found.items()):
        colour = COLOURS[label.split()[0]]
        dark = {"untrained": 0.35, "stage1": 0.65}.get(label.split()[-1], 1.0)
        left.bar(i - 0.2, figures[near], 0.38, color=colour, alpha=dark)
        left.bar(
            i + 0.2, figures[far], 0.38, color=colour, alpha=dark, hatch="//", edgecolor="white"
        )
        if label == "teacher" or "untrained" in label or "stage2" in label:
            style = {"untrained": ":", "stage2": "-"}.get(label.split()[-1], "--")
            values = [100 * figures[r] for r in lengths]
            right.plot(
                range(len(lengths)), values, style, color=colour, lw=2.5, marker="o", label=label
            )
    left.axhline(found["teacher"][near], color="0.35", lw=1, ls="--")
    left.set_xticks(range(len(found)), [label.replace(" ", "\n") for label in found], fontsize=10)
    left.set_ylabel("nats per token of held-out text", fontsize=12)
    unit = far.split()[-1]
    left.set_title(f"loss at 1x (plain) and at {unit} (hatched)", loc="left", fontsize=13)
    right.set_xticks(range(len(lengths)), [r.split()[-1] for r in lengths], fontsize=12)
    right.set_ylim(-3, 103)
    right.set_xlabel("times the native length", fontsize=12)
    right.set_title("look-ups answered right (%)", loc="left", fontsize=13)
    right.legend(frameon=False, fontsize=11)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    return figure


if __name__ == "__main__":
    exits.run(main, "demo.py")
