#!/usr/bin/env bash
# The smallest training run that is still the real thing: a top-p MoE on 2 ranks with expert parallelism 2, on the CPU
# of any machine and on made-up data. Under a minute; nothing to prepare, nothing saved.
#
#   examples/laptop.sh                      # watch the loss fall and the experts per token
#   examples/laptop.sh --moe-preset switch  # flags of your own come after and win
#
# RANKS (2) must divide the 4 experts. The demo (`make demo`) does the same with real text, from corpus to chat.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ranks=${RANKS:-2}
[[ $ranks =~ ^[124]$ ]] || { echo "laptop.sh: RANKS is $ranks; accepted: 1, 2 or 4, which divide the 4 experts." >&2; exit 2; }
[[ -x $here/../.venv/bin/torchrun ]] && made=$here/../.venv/bin/torchrun # the checkout's own, if `make` has built it

model=(
    --num-layers 2 --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 4
    --seq-length 64 --max-position-embeddings 64 --position-embedding-type rope
    --normalization RMSNorm --swiglu --disable-bias-linear --untie-embeddings-and-output-weights
    --attention-dropout 0 --hidden-dropout 0
    --num-experts 4 --moe-ffn-hidden-size 128 --moe-preset dynamic-moe
)
training=(
    --micro-batch-size 4 --global-batch-size 8 --train-iters 40
    --lr 3e-3 --min-lr 3e-4 --lr-decay-style cosine --lr-warmup-iters 5
    --eval-interval 1000 --eval-iters 0 --log-interval 10 --num-workers 0
)
layout=(--expert-model-parallel-size "$ranks" --moe-token-dispatcher-type alltoall)
data=(--mock-data --split 100,0,0 --tokenizer-type NullTokenizer --vocab-size 255)

export CUDA_VISIBLE_DEVICES= # the CPU also where there are GPUs: the same run everywhere
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
[[ ! -d $here/../megatron_dynmoe ]] || export PYTHONPATH="$here/..${PYTHONPATH:+:$PYTHONPATH}" # a checkout
exec "${TORCHRUN:-${made:-torchrun}}" --standalone --nproc-per-node "$ranks" "$here/pretrain_dynmoe.py" \
    "${model[@]}" "${training[@]}" "${layout[@]}" "${data[@]}" "$@"
