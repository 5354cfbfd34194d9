# Sourced by pretrain.sh with SMOKE=1: toy sizes, so that the same flags run in minutes, on a laptop as well. Every flag
# that this machine supports stays; a line on stderr names each that does not, and why. Adds to model; sets GPUS,
# TRAIN_ITERS, TRANSFORMER_IMPL and, where they are not given, DATA and TOKENIZER (smoke_data.py) and SAVE.

smoke() { echo "smoke: $*" >&2; }

# How many GPUs there are and whether Transformer Engine imports; nothing to ask where both are said.
gpus_here='' te_here=''
[[ -n ${GPUS:-} && -n ${TRANSFORMER_IMPL:-} ]] || read -r gpus_here te_here < <("$python" -c '
import torch
try:
    import transformer_engine.pytorch
except Exception:
    print(torch.cuda.device_count(), "no")
else:
    print(torch.cuda.device_count(), "yes")' 2>/dev/null) || refuse "SMOKE=1 needs a Python with torch; $python has none."
GPUS=${GPUS:-$((gpus_here == 1 ? 1 : 2))}
TRAIN_ITERS=${TRAIN_ITERS:-10}
if [[ -z ${TRANSFORMER_IMPL:-} && $te_here == no ]]; then
    TRANSFORMER_IMPL=local
    smoke "dropped --transformer-impl transformer_engine: Transformer Engine does not import here"
    smoke "dropped --moe-grouped-gemm: Transformer Engine's; torch's grouped GEMM computes the experts"
    smoke "dropped --moe-permute-fusion: Transformer Engine's kernels"
    smoke "dropped --no-create-attention-mask-in-dataloader: attention without Transformer Engine reads the mask"
    model+=(--cross-entropy-loss-fusion) # which torch has as well
fi
[[ $gpus_here != 0 ]] || smoke "no GPU here: $GPUS ranks on the CPU, gloo instead of NCCL"

# Widths are multiples of 128, as blockwise FP8 wants; one more layer on each side than --first-last-layers-bf16 takes.
model+=(
    --num-layers 4 --hidden-size 128 --ffn-hidden-size 128 --moe-ffn-hidden-size 128 --num-attention-heads 4
    --seq-length 64 --max-position-embeddings 64 --micro-batch-size 2 --global-batch-size 8
    --eval-interval 5 --eval-iters 1 --save-interval 5 --log-interval 1 --lr 1e-3 --split 90,5,5 --num-workers 1
)
shrink() { # FLAG VALUE, where the model has the flag
    [[ -z $(own "$1" '') ]] || model+=("$1" "$2")
}
shrink --num-query-groups 2
shrink --kv-channels 32
shrink --moe-shared-expert-intermediate-size 128
[[ $(own --moe-layer-freq 1) =~ ^[0-9]+$ ]] || shrink --moe-layer-freq 1

# Parallel layouts for many GPUs do not fit two.
for size in tensor-model context pipeline-model; do
    if (($(number "--$size-parallel-size" 1) > 1)) && [[ " ${mine[*]}" != *" --$size-parallel-size"* ]]; then
        smoke "dropped --$size-parallel-size $(own "--$size-parallel-size" 1): experts are spread over the $GPUS ranks"
        model+=("--$size-parallel-size" 1)
    fi
done

if [[ " ${model[*]} " == *" --sequence-parallel "* && $(own --tensor-model-parallel-size 1) == 1 ]]; then
    smoke "dropped --sequence-parallel: it comes with tensor parallelism"
    mapfile -t model < <(printf '%s\n' "${model[@]}" | grep -vx -- --sequence-parallel)
fi

if [[ -z ${SAVE:-} ]]; then
    SAVE=$(mktemp -d "${TMPDIR:-/tmp}/dynmoe-smoke-XXXXXX")
    smoke "checkpoints and curves are in $SAVE"
fi
if [[ -z ${DATA:-} ]]; then
    [[ ${NNODES:-1} == 1 ]] || refuse "DATA is not set; SMOKE=1 makes data on one node only, NNODES is $NNODES."
    "$python" "$here/smoke_data.py" "$SAVE/data"
    DATA=$SAVE/data/text TOKENIZER=$SAVE/data/tokenizer.model
fi
