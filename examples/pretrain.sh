#!/usr/bin/env bash
# Pretrain one of the models in examples/models on 8 GPUs. MODEL is the name of its file there, without .args:
# dynamic_moe_24l, the model of the Dynamic MoE paper; dynmoe_24l, as large, with the routing of DynMoE; one of
# moe_plus_plus_0.6b, _1b, _2b, _7b, the sizes of the MoE++ paper; or dynamic_moe_30b_a3b, for 32 GPUs or more.
#
#   DATA="0.7 data/cc 0.3 data/code" TOKENIZER=llama2/tokenizer.model SAVE=runs/dynamic_moe \
#       examples/pretrain.sh dynamic_moe_24l
#
#   DATA       indexed datasets without .bin/.idx, each with its weight before it, or one alone
#   TOKENIZER  what the data was tokenized with: a SentencePiece .model, or a Hugging Face folder
#   SAVE       where checkpoints and curves go; training resumes from there if it holds a checkpoint
#
# Flags of your own come after and win:  examples/pretrain.sh dynamic_moe_24l --micro-batch-size 4
# GPUS (8) is the number of GPUs of a node, TRAIN_ITERS the length of training. Several nodes: slurm.sh.
# Ends and restarts (docs/cluster.md): RESTARTS (3), LOST_AFTER (90 s), GIVE_UP_AFTER (1800 s).
# Without Transformer Engine: TRANSFORMER_IMPL=local, which computes the experts with torch's grouped GEMM.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
refuse() { echo "$(basename "$0"): $*" >&2; exit 2; }

models=("$here"/models/*.args)
models=("${models[@]##*/}")
accepted=$(printf ', %s' "${models[@]%.args}")
accepted=${accepted:2}
[[ -n ${1:-} ]] || refuse "MODEL is missing; give one as the first argument: $accepted."
[[ $1 != */* && -f $here/models/$1.args ]] || refuse "MODEL is $1; accepted as the first argument: $accepted."
model_file=$here/models/$1.args
shift

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
impl=${TRANSFORMER_IMPL:-transformer_engine}
case $impl in
    # causal attention of Transformer Engine reads no mask, of which the data loader would make 32 MB a micro-batch
    transformer_engine)
        kernels=(--moe-grouped-gemm --moe-permute-fusion --cross-entropy-loss-fusion)
        kernels+=(--no-create-attention-mask-in-dataloader)
        ;;
    local)
        kernels=(--no-persist-layer-norm --no-gradient-accumulation-fusion --no-rope-fusion)
        kernels+=(--no-masked-softmax-fusion)
        ;;
    *) refuse "TRANSFORMER_IMPL is $impl; accepted: transformer_engine or local." ;;
esac

# The model and its routing: one flag a line, comments with #.
mapfile -t model < <(sed 's/#.*//' "$model_file" | xargs -n 1)

own() { # the value of flag $1 among the flags of your own or of the model, else $2
    local found=$2 before='' word
    for word in "${model[@]}" "${mine[@]}"; do
        [[ $before != "$1" ]] || found=$word
        [[ $word != "$1="* ]] || found=${word#*=}
        before=$word
    done
    echo "$found"
}
mine=()
most=$(own --micro-batch-size 8) # the model's alone
mine=("$@")
tensor=$(own --tensor-model-parallel-size 1) context=$(own --context-parallel-size 1)
# Megatron wants one queue on GPUs before Blackwell, so that communication is launched in the order of the program.
((tensor * context == 1)) || export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}

# At most 8 sequences a GPU at a time, or as many as the model's file says; fewer where the GPUs are so many that they
# share a step's sequences.
replicas=$((${GPUS:-8} * ${NNODES:-1} / (tensor * context * $(own --pipeline-model-parallel-size 1))))
batch=$(own --global-batch-size 512)
for micro in 8 4 2 1; do
    ((micro > most)) || ((replicas * micro > batch || batch % (replicas * micro))) || break
done
((replicas > 0 && batch % (replicas * micro) == 0)) || refuse "--global-batch-size is $batch, which $replicas data-parallel \
replicas do not divide; give a multiple of their number."

# A model file may say how many GPUs its weights and the optimizer's state want.
fewest=$(sed -n 's/^# GPUs of 80 GB at least: //p' "$model_file")
((${GPUS:-8} * ${NNODES:-1} >= ${fewest:-1})) || echo "$(basename "$0"): $(basename "$model_file" .args) is planned for \
$fewest GPUs of 80 GB or more, and gets $((${GPUS:-8} * ${NNODES:-1})): it may run out of memory (tools/plan_cluster.py)." >&2

# 100B tokens, as in the Dynamic MoE paper. The rest of this list is our choice: 512 sequences of 2048 are 2^20 tokens a
# step, so 95368 steps; rates as usual for LLaMA models of this size.
iterations=${TRAIN_ITERS:-95368}
training=(
    --micro-batch-size "$micro" --global-batch-size "$batch" --train-iters "$iterations"
    --lr 3e-4 --min-lr 3e-5 --lr-decay-style cosine --lr-warmup-iters $((iterations / 50))
    --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95 --clip-grad 1.0
    --eval-interval 1000 --eval-iters 20 --seed 1234
)

# Experts are spread over 8 ranks; all else is data parallel, the optimizer's state sharded.
layout=(
    --bf16 --transformer-impl "$impl" "${kernels[@]}"
    --expert-model-parallel-size 8 --moe-token-dispatcher-type alltoall
    --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
)

# Fully reshardable: resume on another number of GPUs, or with another layout.
files=(
    --data-path "${data[@]}" --split 998,1,1 --data-cache-path "$SAVE/index_cache"
    --tokenizer-type "$tokenizer" --tokenizer-model "$TOKENIZER"
    --save "$SAVE" --load "$SAVE" --save-interval 1000
    --ckpt-format torch_dist --dist-ckpt-optim-fully-reshardable
    --log-interval 10 --tensorboard-dir "$SAVE/tensorboard" --moe-metrics-file "$SAVE/metrics.jsonl"
)

# A supervisor on each node starts torchrun, and starts it again from the last checkpoint when a rank fails or a node is
# lost and comes back or has a spare in its place; docs/cluster.md says after how long.
watch=(--save "$SAVE" --restarts "${RESTARTS:-3}" --lost-after "${LOST_AFTER:-90}" --give-up-after "${GIVE_UP_AFTER:-1800}")
if [[ -n ${RDZV_ENDPOINT:-} ]]; then # set by the Slurm script: host:port where the nodes meet
    watch+=(--nodes "$NNODES" --endpoint "$RDZV_ENDPOINT" --id "$RDZV_ID")
fi
# torchrun (2.13 and later; 30 s before that) waits so long after SIGTERM for ranks that still save.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-110}

bin=$here/../.venv/bin # the checkout's own, if `make` has built it
[[ -x $bin/torchrun ]] && made=$bin/torchrun && python=$bin/python
export PYTHONPATH="$here/..${PYTHONPATH:+:$PYTHONPATH}"
if [[ ${DRY_RUN:-0} == 1 ]]; then # print the command instead of running it
    exec() { printf '%q ' "$@" && echo && exit; }
fi
exec "${python:-python3}" -m megatron_dynmoe.launch "${watch[@]}" -- "${TORCHRUN:-${made:-torchrun}}" \
    --nproc-per-node "${GPUS:-8}" "$here/pretrain_dynmoe.py" \
    "${model[@]}" "${training[@]}" "${layout[@]}" "${files[@]}" "$@"
