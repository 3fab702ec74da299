#!/bin/bash
# Everything, one job after the other: tokenizer, data, training, conversion, evaluation. A job that fails takes those
# after it out of the queue. Run it on the login node, from the root of the repository:
#
#   RECIPE=data_prep/mine.yaml INPUTS=inputs.txt OUTPUT=/data/tokens CONFIG=configs/train/mine.yaml \
#       RUN_DIR=/scratch/me/run1 OUT=/scratch/me/run1-hf slurm/chain.sh
#
# Options of sbatch go into PREPARE_OPTIONS, TRAIN_OPTIONS, CONVERT_OPTIONS and EVALUATE_OPTIONS. The configuration of
# the run names the parts that the data will be in. Training must go on by requeue: its number is what the rest waits for.
set -euo pipefail
: "${RECIPE:?}" "${INPUTS:?}" "${OUTPUT:?}" "${CONFIG:?}" "${RUN_DIR:?}" "${OUT:?}"
[ "${CONTINUE:-requeue}" = requeue ] || { echo "chain.sh needs CONTINUE=requeue" >&2; exit 2; }
export RECIPE INPUTS OUTPUT CONFIG RUN_DIR OUT
here=$(dirname "$0")

# submit JOB-BEFORE OPTIONS... : the id of the new job
submit() {
    local after=()
    [ -z "$1" ] || after=(--dependency="afterok:$1" --kill-on-invalid-dep=yes)
    sbatch --parsable "${after[@]}" "${@:2}" | cut -d ';' -f 1
}

take_back() {
    [ -z "${tokenizer:-}" ] || scancel ${conversion:-} ${training:-} ${data:-} "$tokenizer"
    echo "nothing is left in the queue: a job was refused" >&2
}
trap take_back ERR

# shellcheck disable=SC2086 # the options are several words
{
    tokenizer=$(TASK=train-tokenizer INPUTS='' submit '' ${PREPARE_OPTIONS:-} "$here/prepare_data.sbatch")
    data=$(submit "$tokenizer" --array="1-$(grep -c '' "$INPUTS")" ${PREPARE_OPTIONS:-} "$here/prepare_data.sbatch")
    training=$(submit "$data" ${TRAIN_OPTIONS:-} "$here/pretrain.sbatch")
    conversion=$(submit "$training" ${CONVERT_OPTIONS:-} "$here/convert.sbatch")
    evaluation=$(MODEL=$RUN_DIR OUT=$RUN_DIR/evaluation.json submit "$conversion" ${EVALUATE_OPTIONS:-} "$here/evaluate.sbatch")
}
echo "tokenizer $tokenizer, data $data, training $training, conversion $conversion, evaluation $evaluation"
