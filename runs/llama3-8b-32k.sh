#!/usr/bin/env bash
# LLaMA-3-8B from 8K to 32K tokens by linear interpolation: both stages, q, k and v trained whole.
#
#     TEACHER=path/to/teacher DATA=path/to/text runs/llama3-8b-32k.sh [more flags of train.py]
#
# Needs    one GPU of 80 GB: the plan says 67 GiB for stage 1 and 48 GiB for stage 2 (not measured).
#          GPUS=4 uses four; SHARD=1 beside it cuts the models over them, up to 49 GiB each (the plan's).
# Teacher  meta-llama/Meta-Llama-3-8B, a Hugging Face directory of safetensors.
# Text     20 million tokens or more of long documents; 1.0 million are read in stage 1, 3.1 in stage 2.
# Time     not measured. 2.5e17 floating-point operations: 11 minutes at 400 TFLOP/s, scoring and export on top.
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
