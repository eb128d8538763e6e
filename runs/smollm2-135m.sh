#!/usr/bin/env bash
# One row of runs/README.md's tables of SmolLM2-135M, from 8K to 64K tokens: trains it, then scores it.
#
#     TEACHER=path/to/teacher DATA=path/to/text TASKS=path/to/tasks [LONG=path/to/documents] \
#         [SEED=0] [SCALE=8] [OUT=out/smollm2] runs/smollm2-135m.sh ROW [more flags of train.py]
#
# On a CPU, stage 1 with its defaults:  runs/smollm2-135m.sh yarn-1   and   ... linear-1 --tokens1 262144
#
# ROW      linear, yarn, ntk             both stages with the program's defaults; linear's were 1.0M + 3.1M tokens until c62ff5e,
#                                        today --tokens1 1048576 --tokens2 3145728, and so were control's
#          control, control-yarn         the teacher trained like linear or yarn with nothing stretched, its blocks at most
#                                        its own 8K: what the text and the 4-bit weights' repair are worth by themselves
#          yarn-1                        stage 1 alone
#          pretrain                      linear, stage 2 alone, with the tokens of both
#          262144 ... 2097152            linear, this many tokens in each stage; the last is linear's default
#          linear-1                      of that last row, stage 1 alone
#          relations, kl                 as that last row; stage 1 with the relations alone (the paper's loss), or with
#                                        the next-token KL alone
#          adapters                      as that last row, with adapters of rank 64
#          q k v qk qv kv qkv            linear, stage 1 alone on 1M tokens, these relations and no KL
# Teacher  HuggingFaceTB/SmolLM2-135M-Instruct, a Hugging Face directory of safetensors.
# Text     some six million tokens of ordinary English (.txt, .jsonl, .npy); LONG: documents of 64K tokens or more;
#          without it neither perplexity nor loss by position is measured, which takes a CPU hours.
# Tasks    lambada_openai, piqa, arc_easy, openbook_qa and boolq as .jsonl(.gz): eval.py says where a missing one
#          is had. Every item's scores are
#          written too, so that rows can be compared item by item, a student with its control say. BoolQ was asked as
#          "Passage: ...\nQuestion: ...?": under the harness's prompt, which adds "\nAnswer:", the teacher says "no" to
#          nearly everything, and nothing can be lost.
# Scales   SCALE=16 and 32: to 131,072 and 262,144 tokens; loss by position is then also read to their end.
# Columns  ALONE=1 leaves out those of the teacher and of the untrained student; CACHE: a folder of tokenised text to share.
# Flags    runs go to OUT/ROW-SEED, whatever their flags: give a row with flags an OUT of its own.
# Time     linear: 109 s, scores included, on an H200 (4f88ae9; bench/step.jsonl): train.py 67, of which steps 49; eval.py 31; the
#          rest is outside of their clocks. On an H100, with 1.0M + 3.1M tokens, linear --relations qv took 95 (ea8a9fd).
set -euo pipefail
cd "$(dirname "$0")/.."
: "${TEACHER:?the directory of the teacher}" "${DATA:?a file or folder of text}" "${TASKS:?a folder of tasks}"
row=${1:?the row, see the head of this file}
shift
scale=${SCALE:-8} name=$row
[[ $scale == 8 ]] || name=$row-x$scale
case $row in
    linear | yarn | ntk) flags=(--rope "$row") ;;
    # The smallest that is above 1; the teacher could read a control's blocks, but not those that it is compared with
    control) flags=(--rope linear --teacher-share 0) scale=1.000001 ;;
    control-yarn) flags=(--rope yarn --teacher-share 0) scale=1.000001 ;;
    yarn-1) flags=(--rope yarn --stage 1) ;;
    linear-1) flags=(--rope linear --stage 1 --tokens1 2097152) ;;
    pretrain) flags=(--rope linear --stage 2 --tokens2 4194304) ;;
    relations) flags=(--rope linear --tokens1 2097152 --tokens2 2097152 --logit-weight 0) ;;
    kl) flags=(--rope linear --tokens1 2097152 --tokens2 2097152 --relations none) ;;
    q | k | v | qk | qv | kv | qkv)
        flags=(--rope linear --stage 1 --tokens1 1048576 --logit-weight 0 --relations "$row") ;;
    [0-9]*) flags=(--rope linear --tokens1 "$row" --tokens2 "$row") ;;
    adapters) flags=(--rope linear --tokens1 2097152 --tokens2 2097152 --lora-rank 64) ;;
    *) echo "smollm2-135m.sh: no row $row; the head of this file lists them" >&2 && exit 2 ;;
esac
python=${PYTHON:-.venv/bin/python} seed=${SEED:-0} out=${OUT:-out/smollm2}
cache=${CACHE:-$out/cache} run=$out/$name-$seed
$python train.py --teacher "$TEACHER" --data "$DATA" --scale "$scale" --seed "$seed" --eval-blocks 0 \
    --cache "$cache" --out "$run" "${flags[@]}" "$@"
against=(--against "$TEACHER")  # with the teacher's and the untrained student's columns: once for each kind
[[ $row-$seed =~ ^(linear|yarn|ntk)(-1)?-0$ && -z ${ALONE:-} ]] || against=()
text=(--data "$DATA" --cache "$cache" --native 8192 --no-text --positions --blocks 2)
long=("${text[@]}" --ppl --documents "${LONG:-}" --lengths 8192 65536)
[[ -n ${LONG:-} ]] || long=(--no-text)
$python eval.py --model "$run/student" "${against[@]}" --tasks all --task-dir "$TASKS" --predictions \
    "${long[@]}" --out "$run-scores"
if [[ -n ${LONG:-} && ${scale%.*} -gt 8 ]]; then
    $python eval.py --model "$run/student" "${text[@]}" --lengths $((8192 * scale)) --out "$run-long"
fi
