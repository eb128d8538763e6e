#!/usr/bin/env bash
# LLaMA-2-7B from 4K to 32K tokens by linear interpolation: both stages, q, k and v trained whole.
#
#     TEACHER=path/to/teacher DATA=path/to/text runs/llama2-7b-32k.sh [more flags of train.py]
#
# Needs    one GPU of 80 GB: stage 1 takes 51.6 GiB, stage 2 65.4.
#          GPUS=4 uses four; SHARD=1 beside it cuts the models over them, some 30 GiB each (the plan's).
# Teacher  meta-llama/Llama-2-7b-hf, a Hugging Face directory of safetensors.
# Text     20 million tokens or more of long documents; 1.0 million are read in stage 1, 3.1 in stage 2.
# Time     on an H100, with random weights of its shape (commit d39d6b1; bench/step.jsonl): 9m36s: start 16s, tokenising 3s,
#          measuring 2m14s, steps 6m23s (10,480 and 11,370 tokens/s, 66 and 61 % of the product rate), saving 1s, export 39s.
#          Since then the table reads an eighth of the blocks, and four threads write the export. At 6d64a37 steps took the
#          same, but the run was lost before its end; by Mistral's parts it waits some 50 s beside its steps (LOG.md).
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
