#!/usr/bin/env bash
# LLaMA-3-8B from 8K to 32K tokens by linear interpolation: both stages, q, k and v trained whole.
#
#     TEACHER=path/to/teacher DATA=path/to/text runs/llama3-8b-32k.sh [more flags of train.py]
#
# Needs    one GPU of 80 GB: stage 1 took 49.5 GiB (commit 6d64a37), a step of stage 2 takes 65.5 (ea8a9fd).
#          GPUS=4 uses four; SHARD=1 beside it cuts the models over them, up to 49 GiB each (the plan's).
# Teacher  meta-llama/Meta-Llama-3-8B, a Hugging Face directory of safetensors.
# Text     20 million tokens or more of long documents; 2.1 million are read in each stage.
# Time     on an H100, with random weights of its shape and --tokens1 262144 --tokens2 524288, a quarter and a sixth (6d64a37;
#          bench/step.jsonl): 2m22s: start 8s, tokenising 5s, measuring 19s, steps 1m25s (10,300 and 8,870 tokens/s, 67 and
#          50 % of the product rate), saving 8s, export 18s. Stage 2 went in tiles there; now 11 of 32 layers are computed again
#          instead: 10,670 tokens/s, 61 % (ea8a9fd). So the whole, by these rates, takes some 7.5 minutes.
# Expect   not measured. curves.png should show all three relations falling in every layer; report.md what share of the
#          loss at 1x came back. The learning rate is train.py's rule, a guess at this width: compare two or three
#          with --stage 1 --tokens1 500000 --lr1 ... before the whole run.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${TEACHER:?the directory of the teacher}" "${DATA:?a file or folder of text}"
launch=(.venv/bin/python)
if ((${GPUS:-1} > 1)); then launch+=(-m torch.distributed.run --standalone --nproc_per_node "$GPUS"); fi
exec "${launch[@]}" train.py --teacher "$TEACHER" --data "$DATA" --scale 4 --batch1 4 --batch2 "${GPUS:-1}" \
    ${SHARD:+--shard} --out out/llama3-8b-32k "$@"
