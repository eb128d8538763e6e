#!/usr/bin/env bash
# Mistral-7B from 8K to 32K tokens by linear interpolation: both stages, q, k and v trained whole.
#
#     TEACHER=path/to/teacher DATA=path/to/text runs/mistral-7b-32k.sh [more flags of train.py]
#
# Needs    one GPU of 80 GB: stage 1 took 54.8 GiB, stage 2 no more (commit 6d64a37); now the plan says 66 for stage 2. With 141 GB
#          nothing is computed again: 54.7 and 75.8 (4f88ae9).
#          GPUS=4 uses four; SHARD=1 beside it cuts the models over them, up to 40 GiB each (the plan's).
# Teacher  mistralai/Mistral-7B-v0.1, a copy whose config.json says "max_position_embeddings": 8192. As published it
#          says 32768, with attention over a sliding window of 4096; scale 4 is meant on top of 8192.
# Text     20 million tokens or more of long documents; 2.1 million are read in each stage.
# Time     with random weights of its shape and --tokens1 262144 --tokens2 524288, an eighth and a quarter (bench/step.jsonl), on an
#          H200 (4f88ae9): 1m41s: start 14s, tokenising 7s, measuring 9s, steps 1m04s (11,610 and 12,760 tokens/s, 71 and 69 % of
#          the product rate), saving 0s, export 7s. So the whole, by these rates, takes some 6.5 minutes. On an H100 (6d64a37)
#          11,100 tokens/s in stage 1, 71 %; stage 2 went in tiles there, where now some layers are computed again: not measured.
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
