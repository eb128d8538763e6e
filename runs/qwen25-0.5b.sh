#!/usr/bin/env bash
# One row of runs/README.md's tables of Qwen2.5-Coder-0.5B, from 32K to 256K tokens: trains it, then scores it.
#
#     TEACHER=path/to/teacher DATA=path/to/text TASKS=path/to/tasks [LONG=path/to/documents] [RULER=path/to/its/data] \
#         [SEED=0] [OUT=out/qwen25] [PARTS="train short long ruler"] runs/qwen25-0.5b.sh ROW [more flags of train.py]
#
# ROW      linear, yarn                  both stages with the program's defaults
#          linear-long, yarn-long        as these; stage 2 in blocks of 128K instead of 32K and 16K
#          control, control-yarn         the teacher trained like linear or yarn with nothing stretched: what the text and
#                                        the repair of the weights, which had been rounded, are worth by themselves
#          relations                     as linear; stage 1 by the relations alone: the paper's loss
#          pretrain                      linear, stage 2 alone, with the tokens of both
#          untrained, untrained-yarn     the teacher's weights under linear's or yarn's positions (one step at a rate of 1e-12)
#          teacher                       not trained; PARTS may be ruler alone
# Teacher  Qwen2.5-Coder-0.5B-Instruct, a Hugging Face directory of safetensors.
# Text     some eight million tokens: ordinary English, and code.
# Tasks    lambada_openai, piqa, arc_easy, openbook_qa and boolq, as for smollm2-135m.sh.
# Long     a folder whose held-out text (one document in 20, by its name) is three documents of 262,144 tokens; they are
#          read whole, and in windows of 32K. Without it, or without RULER, that part is left out.
# RULER    its word lists and essays (evals/ruler_data.py says where they are had). AT: "LENGTH:SAMPLES ..." to ask for.
# Columns  ALONE=1 leaves out those of the teacher and of the untrained student; CACHE: a folder of tokenised text to share.
# Flags    runs go to OUT/ROW-SEED, whatever their flags: give a row with flags an OUT of its own.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${TEACHER:?the directory of the teacher}"
row=${1:?the row, see the head of this file}
shift
native=${NATIVE:-32768} scale=${SCALE:-8} seed=${SEED:-0} out=${OUT:-out/qwen25} parts=${PARTS:-train short long ruler}
kind=linear flags=()
case $row in
    linear) ;;
    yarn) kind=yarn ;;
    linear-long) flags=(--length2 $((native * 4))) ;;
    yarn-long) kind=yarn flags=(--length2 $((native * 4))) ;;
    control) scale=1.000001 ;;  # the smallest that is above 1
    control-yarn) kind=yarn scale=1.000001 ;;
    relations) flags=(--logit-weight 0 --relations qkv) ;;
    pretrain) flags=(--stage 2 --tokens2 4194304 --teacher-share 0) ;;
    untrained) flags=(--stage 1 --tokens1 1024 --lr1 1e-12) ;;
    untrained-yarn) kind=yarn flags=(--stage 1 --tokens1 1024 --lr1 1e-12) ;;
    teacher) parts=${parts/train/} ;;
    *) echo "qwen25-0.5b.sh: no row $row; the head of this file lists them" >&2 && exit 2 ;;
esac
python=${PYTHON:-.venv/bin/python} cache=${CACHE:-$out/cache} run=$out/$row-$seed
model=$run/student against=(--against "$TEACHER")  # the teacher's and the untrained student's columns, once for each kind
[[ $row-$seed =~ ^(linear|yarn)-0$ && -z ${ALONE:-} ]] || against=()
[[ $row != teacher ]] || model=$TEACHER
if [[ $parts == *train* ]]; then
    : "${DATA:?a file or folder of text}"
    $python train.py --teacher "$TEACHER" --data "$DATA" --scale "$scale" --rope "$kind" --seed "$seed" --eval-blocks 0 \
        --cache "$cache" --out "$run" "${flags[@]}" "$@"
fi
if [[ $parts == *short* ]]; then
    : "${TASKS:?a folder of tasks}"
    $python eval.py --model "$model" "${against[@]}" --no-text --tasks all --task-dir "$TASKS" --predictions --out "$run-short"
fi
if [[ $parts == *long* && -n ${LONG:-} ]]; then
    text=(--no-text --positions --data "$LONG" --cache "$cache" --native "$native")
    $python eval.py --model "$model" "${against[@]}" "${text[@]}" --lengths $((native * 8)) --blocks 3 --out "$run-long"
    $python eval.py --model "$model" "${against[@]}" "${text[@]}" --lengths "$native" --blocks 24 --out "$run-native"
fi
if [[ $parts == *ruler* && -n ${RULER:-} ]]; then
    for at in ${AT:-4096:20 32768:5 65536:4 131072:4}; do
        $python eval.py --model "$model" --no-text --ruler --ruler-data "$RULER" --lengths "${at%:*}" --samples "${at#*:}" \
            --predictions --out "$run-ruler-${at%:*}"
    done
fi
