#!/usr/bin/env bash
# Mistral-7B from 8K to 32K tokens by linear interpolation: both stages, q, k and v trained whole.
#
#     TEACHER=path/to/teacher DATA=path/to/text runs/mistral-7b-32k.sh [more flags of train.py]
#
# Needs    one GPU of 80 GB: stage 1 took 54.8 GiB, stage 2 no more (commit 6d64a37); now the plan says 66 for stage 2.
#          GPUS=4 uses four; SHARD=1 beside it cuts the models over them, up to 40 GiB each (the plan's).
# Teacher  mistralai/Mistral-7B-v0.1, a copy whose config.json says "max_position_embeddings": 8192. As published it
#          says 32768, with attention over a sliding window of 4096; scale 4 is meant on top of 8192.
# Text     20 million tokens or more of long documents; 2.1 million are read in each stage.
# Time     on an H100, with random weights of its shape and --tokens1 262144 --tokens2 524288, a quarter and a sixth (6d64a37;
#          bench/step.jsonl): 2m09s: start 8s, tokenising 4s, measuring 18s, steps 1m21s (11,100 and 9,200 tokens/s, 71 and
#          52 % of the product rate), saving 0s, export 16s. So the whole, by these rates, takes some 8 minutes. Stage 2 went
#          in tiles there; since then the plan computes some layers again instead, which was not measured on this shape: on
#          LLaMA-3's it took a step of stage 2 from 1.85 to 1.54 s.
# Expect   not measured. curves.png should show all three relations falling in every layer; report.md what share of the
#          loss at 1x came back. The learning rate is train.py's rule, a guess at this width: compare two or three
#          with --stage 1 --tokens1 500000 --lr1 ... before the whole run.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${TEACHER:?the directory of the teacher}" "${DATA:?a file or folder of text}"
grep -q '"max_position_embeddings": 8192' "$TEACHER/config.json" || {
    echo "$TEACHER/config.json must say \"max_position_embeddings\": 8192; see the head of $0" >&2
    exit 2
}
launch=(.venv/bin/python)
if ((${GPUS:-1} > 1)); then launch+=(-m torch.distributed.run --standalone --nproc_per_node "$GPUS"); fi
exec "${launch[@]}" train.py --teacher "$TEACHER" --data "$DATA" --scale 4 --batch1 4 --batch2 "${GPUS:-1}" \
    ${SHARD:+--shard} --out out/mistral-7b-32k "$@"
