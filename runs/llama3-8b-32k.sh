#!/usr/bin/env bash
# LLaMA-3-8B from 8K to 32K tokens by linear interpolation: both stages, q, k and v trained whole.
#
#     TEACHER=path/to/teacher DATA=path/to/text runs/llama3-8b-32k.sh [more flags of train.py]
#
# Needs    one GPU of 80 GB: stage 1 took 49.5 GiB (commit 6d64a37), a step of stage 2 takes 65.5 (ea8a9fd). With 141 GB nothing is
#          computed again: 63.5 and 81.7 (4f88ae9).
#          GPUS=4 uses four; SHARD=1 beside it cuts the models over them, up to 49 GiB each (the plan's).
# Teacher  meta-llama/Meta-Llama-3-8B, a Hugging Face directory of safetensors.
# Text     20 million tokens or more of long documents; 2.1 million are read in each stage.
# Time     with random weights of its shape and --tokens1 262144 --tokens2 524288, an eighth and a quarter (bench/step.jsonl), on an
#          H200 (4f88ae9): 1m49s: start 17s, tokenising 5s, measuring 9s, steps 1m10s (10,370 and 11,960 tokens/s, 68 % of the
#          product rate in both), saving 0s, export 8s. So the whole, by these rates, takes some 7 minutes. On an H100 10,300
#          tokens/s in stage 1 (6d64a37, 67 %), 10,670 in stage 2, where 11 of 32 layers are computed again (ea8a9fd, 61 %).
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
