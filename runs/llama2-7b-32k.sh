#!/usr/bin/env bash
# LLaMA-2-7B from 4K to 32K tokens by linear interpolation: both stages, q, k and v trained whole.
#
#     TEACHER=path/to/teacher DATA=path/to/text runs/llama2-7b-32k.sh [more flags of train.py]
#
# Needs    one GPU of 80 GB: stage 1 takes 51.6 GiB, stage 2 65.4. With 141 GB nothing is computed again: 67.1 and 84.9.
#          GPUS=4 uses four; SHARD=1 beside it cuts the models over them, some 30 GiB each (the plan's).
# Teacher  meta-llama/Llama-2-7b-hf, a Hugging Face directory of safetensors.
# Text     20 million tokens or more of long documents; 2.1 million are read in each stage.
# Time     with random weights of its shape (bench/step.jsonl): on an H200 (commit 22d919a) 6m37s: start 13s, tokenising 5s,
#          measuring 10s, steps 6m01s (10,980 and 12,760 tokens/s, 70 and 69 % of the product rate), saving 2s, export 7s.
#          On an H100 steps of 1.0M + 3.1M tokens took 6m23s (d39d6b1: 10,480 and 11,370 tokens/s, 66 and 61 %);
#          a run at 6d64a37 had read 10,160 and 11,170, 67 and 63 %, when its machine was lost.
# Expect   not measured. curves.png should show all three relations falling in every layer; report.md what share of the
#          loss at 1x came back. The learning rate is train.py's rule, a guess at this width: compare two or three
#          with --stage 1 --tokens1 500000 --lr1 ... before the whole run.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${TEACHER:?the directory of the teacher}" "${DATA:?a file or folder of text}"
launch=(.venv/bin/python)
if ((${GPUS:-1} > 1)); then launch+=(-m torch.distributed.run --standalone --nproc_per_node "$GPUS"); fi
exec "${launch[@]}" train.py --teacher "$TEACHER" --data "$DATA" --scale 8 --batch1 4 --batch2 "${GPUS:-1}" \
    ${SHARD:+--shard} --out out/llama2-7b-32k "$@"
