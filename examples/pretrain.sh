#!/usr/bin/env bash
# Pretrain one of the models in examples/models. MODEL is the name of its file there, without .args: dynamic_moe_24l, the
# 3.5B model of the Dynamic MoE paper; dynmoe_24l, as large, with the routing of DynMoE; one of moe_plus_plus_0.6b, _1b,
# _2b, _7b, the sizes of the MoE++ paper; dynamic_moe_30b_a3b, for 32 GPUs or more; or any other file that is there.
#
#   DATA="0.7 data/cc 0.3 data/code" TOKENIZER=llama2/tokenizer.model SAVE=runs/dynamic_moe \
#       examples/pretrain.sh dynamic_moe_24l
#
#   DATA       indexed datasets without .bin/.idx, each with its weight before it, or one alone
#   TOKENIZER  what the data was tokenized with: a SentencePiece .model, or a Hugging Face folder
#   SAVE       where checkpoints and curves go; training resumes from there if it holds a checkpoint
#   GPUS       GPUs of a node (8)
#   NNODES     nodes (1). More of them through slurm.sh, or by hand: on each node the same command, and the same
#              RDZV_ENDPOINT=host:port of the first
#   FP8        delayed, tensorwise or blockwise; 1 is blockwise. TRANSFORMER_IMPL=local: rowwise too, and 1 is rowwise
#   SMOKE      1: the same at toy sizes within minutes, on 2 CPU ranks where there is no GPU; DATA, TOKENIZER, SAVE are made
#   DRY_RUN    1: print the command instead of running it
#   PYTHON     which one; TORCHRUN likewise. By themselves the checkout's own, else what the PATH has
#
# Flags of your own come after and win:  examples/pretrain.sh dynamic_moe_24l --micro-batch-size 4
# A model's file wins over what stands here: layout (--pipeline-model-parallel-size ...), recomputation, rates. Its
# micro-batch and its expert parallelism are the most that is used, less where the GPUs are few or many.
# TRAIN_ITERS is the length of training. Ends and restarts (docs/cluster.md): RESTARTS (3), LOST_AFTER (90 s),
# GIVE_UP_AFTER (1800 s). Without Transformer Engine: TRANSFORMER_IMPL=local, experts by torch's grouped GEMM.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
refuse() { echo "$(basename "$0"): $*" >&2; exit 2; }
tell() { echo "$(basename "$0"): $*" >&2; }
check_number() { # NAME VALUE
    [[ $2 =~ ^[1-9][0-9]{0,8}$ ]] || refuse "$1 is $2; accepted: a whole number of at least 1."
}

models=("$here"/models/*.args)
models=("${models[@]##*/}")
accepted=$(printf ', %s' "${models[@]%.args}")
accepted=${accepted:2}
[[ -n ${1:-} ]] || refuse "MODEL is missing; give one as the first argument: $accepted."
[[ $1 != */* && -f $here/models/$1.args ]] || refuse "MODEL is $1; accepted as the first argument: $accepted."
model_file=$here/models/$1.args
shift
for switch in SMOKE DRY_RUN; do
    [[ ${!switch:-0} == [01] ]] || refuse "$switch is ${!switch}; accepted: 1 or 0."
done

bin=$here/../.venv/bin # the checkout's own, if `make` has built it
[[ -x $bin/torchrun ]] && made=$bin/torchrun && python=$bin/python
python=${PYTHON:-${python:-python3}}
[[ ! -d $here/../megatron_dynmoe ]] || export PYTHONPATH="$here/..${PYTHONPATH:+:$PYTHONPATH}" # a checkout

# The model and its routing: one flag a line, comments with #.
mapfile -t model < <(sed 's/#.*//' "$model_file" | xargs -n 1)
mine=("$@")
own() { # the value of flag $1 among the flags of your own or of the model, else $2
    local found=$2 before='' word
    for word in "${model[@]}" "${mine[@]}"; do
        [[ $before != "$1" ]] || found=$word
        [[ $word != "$1="* ]] || found=${word#*=}
        before=$word
    done
    echo "$found"
}
number() { # the same, where it has to be a number
    local found
    found=$(own "$1" "$2")
    check_number "$1" "$found" && echo "$found"
}

[[ ${SMOKE:-0} == 0 ]] || source "$here/smoke.sh"
GPUS=${GPUS:-8} NNODES=${NNODES:-1} iterations=${TRAIN_ITERS:-95368}
check_number GPUS "$GPUS"
check_number NNODES "$NNODES"
check_number TRAIN_ITERS "$iterations"

[[ -n ${DATA:-} ]] || refuse "DATA is not set; give the indexed dataset(s), as in DATA=\"0.7 data/cc 0.3 data/code\"."
[[ -n ${TOKENIZER:-} ]] || refuse "TOKENIZER is not set; give the SentencePiece .model or the Hugging Face folder of the data."
[[ -n ${SAVE:-} ]] || refuse "SAVE is not set; give the folder for checkpoints."
read -ra data <<<"$DATA"
for word in "${data[@]}"; do
    [[ $word =~ ^[0-9.]+$ || -f $word.idx ]] || refuse "DATA names $word, but there is no $word.idx."
done
if [[ -f $TOKENIZER ]]; then
    tokenizer=SentencePieceTokenizer
elif [[ -d $TOKENIZER ]]; then
    tokenizer=HuggingFaceTokenizer
else
    refuse "TOKENIZER is $TOKENIZER, which does not exist."
fi

# Flags, environment and what cannot work: kernels, precision, layout.
source "$here/layout.sh"

# 100B tokens, as in the Dynamic MoE paper. The rest of this list is our choice: 512 sequences of 2048 are 2^20 tokens a
# step, so 95368 steps; rates as usual for LLaMA models of this size.
training=(
    --train-iters "$iterations" --global-batch-size 512
    --lr 3e-4 --min-lr 3e-5 --lr-decay-style cosine --lr-warmup-iters $((iterations / 50))
    --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95 --clip-grad 1.0
    --eval-interval 1000 --eval-iters 20 --seed 1234
)

# Fully reshardable: resume on another number of GPUs, or with another layout.
files=(
    --data-path "${data[@]}" --split 998,1,1 --data-cache-path "$SAVE/index_cache"
    --tokenizer-type "$tokenizer" --tokenizer-model "$TOKENIZER"
    --save "$SAVE" --load "$SAVE" --save-interval 1000
    --ckpt-format torch_dist --dist-ckpt-optim-fully-reshardable
    --log-interval 10 --tensorboard-dir "$SAVE/tensorboard" --moe-metrics-file "$SAVE/metrics.jsonl"
)

if [[ ${DRY_RUN:-0} == 1 ]]; then
    exec() { printf '%q ' "$@" && echo && exit; }
fi
flags=("${training[@]}" "${layout[@]}" "${files[@]}" "${model[@]}" "${fitted[@]}" "$@")
if [[ ${LAUNCH:-torchrun} == srun ]]; then # one of Slurm's tasks is one rank: slurm.sh
    [[ -n ${SLURM_PROCID:-} ]] || refuse "LAUNCH is srun, but this is no task of Slurm's; LAUNCH=srun is for slurm.sh."
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$GPUS
    ((WORLD_SIZE == GPUS * NNODES)) || refuse "SLURM_NTASKS is $WORLD_SIZE; accepted: GPUS x NNODES, $((GPUS * NNODES))."
    exec "$python" "$here/pretrain_dynmoe.py" "${flags[@]}"
fi

# A supervisor on each node starts torchrun, and starts it again from the last checkpoint when a rank fails or a node is
# lost and comes back or has a spare in its place; docs/cluster.md says after how long.
watch=(--save "$SAVE" --restarts "${RESTARTS:-3}" --lost-after "${LOST_AFTER:-90}" --give-up-after "${GIVE_UP_AFTER:-1800}")
# slurm.sh sets where the nodes meet; without that the supervisor refuses more than one
watch+=(--nodes "$NNODES" ${RDZV_ENDPOINT:+--endpoint "$RDZV_ENDPOINT" --id "${RDZV_ID:-job}"})
exec "$python" -m megatron_dynmoe.launch "${watch[@]}" -- "${TORCHRUN:-${made:-torchrun}}" \
    --nproc-per-node "$GPUS" "$here/pretrain_dynmoe.py" "${flags[@]}"
