# Sourced by pretrain.sh: what follows from the number of GPUs, from the kernels that are there and from FP8. Reads
# model, mine, GPUS and NNODES; sets layout (flags that the model's file may replace), fitted (those that follow from its
# own) and the environment. docs/cluster.md has a line on each variable, and on those that clusters need besides.

impl=${TRANSFORMER_IMPL:-transformer_engine}
# causal attention of Transformer Engine reads no mask, of which the data loader would make 32 MB a micro-batch
te_kernels=(
    --moe-grouped-gemm --moe-permute-fusion --cross-entropy-loss-fusion --no-create-attention-mask-in-dataloader
)
local_kernels=(--no-persist-layer-norm --no-gradient-accumulation-fusion --no-rope-fusion --no-masked-softmax-fusion)
case $impl in
    transformer_engine) kernels=("${te_kernels[@]}") ;;
    local) kernels=("${local_kernels[@]}") ;;
    *) refuse "TRANSFORMER_IMPL is $impl; accepted: transformer_engine or local." ;;
esac

# FP8. By itself blockwise: each 128 numbers have a scale from what they are, so it neither lags behind an expert that
# had few tokens for a while, as a history does, nor follows one token's outlier; DeepSeek-V3 was trained so, on Hopper.
# Its e4m3 for gradients too is Transformer Engine's default. torch alone has a kernel for scales of whole rows.
recipes="delayed, tensorwise or blockwise"
[[ $impl == transformer_engine ]] || recipes="delayed, tensorwise, blockwise or rowwise"
case $impl:${FP8:-0} in
    *:0) precision=() ;;
    transformer_engine:[1a-z]*)
        recipe=${FP8/#1/blockwise}
        precision=(--fp8-recipe "$recipe" --moe-router-padding-for-quantization)
        case $recipe in
            # the largest number of many steps: an expert that had no tokens in the last one keeps a scale that fits it
            delayed) precision+=(--fp8-format hybrid --fp8-amax-history-len 1024 --fp8-amax-compute-algo max) ;;
            tensorwise) precision+=(--fp8-format hybrid --first-last-layers-bf16) ;;
            blockwise) precision+=(--fp8-format e4m3 --first-last-layers-bf16) ;;
            *) refuse "FP8 is $FP8; accepted: $recipes, 1 for blockwise, or 0." ;;
        esac
        ;;
    local:1 | local:delayed | local:tensorwise | local:blockwise | local:rowwise)
        precision=(--moe-fp8-recipe "${FP8/#1/rowwise}" --first-last-layers-bf16)
        ;;
    *) refuse "FP8 is $FP8; accepted: $recipes, 1 for a choice of ours, or 0." ;;
esac

world=$((GPUS * NNODES))
tensor=$(number --tensor-model-parallel-size 1)
context=$(number --context-parallel-size 1)
stages=$(number --pipeline-model-parallel-size 1)
shared=$((tensor * context * stages))
((world % shared == 0)) || refuse "GPUS x NNODES is $world, which tensor x context x pipeline parallelism of \
$tensor x $context x $stages does not divide; give a multiple of $shared, or another layout."

# Experts are spread over 8 ranks or as many as the model's file says, fewer where GPUs or experts do not allow it.
experts=$(number --num-experts 1)
expert_tensor=$(number --expert-tensor-parallel-size "$tensor")
fits() { ((experts % $1 == 0 && world % ($1 * expert_tensor * stages) == 0)); }
expert=$(number --expert-model-parallel-size 8)
mine=() # what the model's file says
wanted=$(own --expert-model-parallel-size '')
most=$(number --micro-batch-size 8)
mine=("$@")
fitting=$(for ((n = 1; n <= world && n <= experts; n++)); do ! fits "$n" || echo "$n"; done | xargs)
[[ -n $fitting ]] || refuse "GPUS x NNODES is $world, which expert tensor parallelism $expert_tensor and $stages pipeline \
stages do not divide; give a multiple of $((expert_tensor * stages))."
if [[ $(printf '%s\n' "$@" | grep -c -- '^--expert-model-parallel-size') -gt 0 ]]; then
    fits "$expert" || refuse "--expert-model-parallel-size is $expert; accepted for $experts experts on $world GPUs in \
this layout: ${fitting// /, }."
else
    while ! fits "$expert"; do ((expert -= 1)); done
    ((expert == ${wanted:-expert})) || tell "--expert-model-parallel-size $wanted does not fit $experts experts on \
$world GPUs in this layout; it is $expert."
fi

# At most 8 sequences a GPU at a time, or as many as the model's file says; fewer where the GPUs are so many that they
# share a step's sequences.
replicas=$((world / shared))
batch=$(number --global-batch-size 512)
for ((micro = most; micro > 1; micro--)); do
    ((batch % (replicas * micro))) || break
done
((batch % (replicas * micro) == 0)) || refuse "--global-batch-size is $batch, which $replicas data-parallel replicas do not \
divide; give a multiple of their number."
fewest=$(sed -n 's/^# GPUs of 80 GB at least: //p' "$model_file")
((world >= ${fewest:-1} || ${SMOKE:-0})) || tell "$(basename "$model_file" .args) is planned for $fewest GPUs of 80 GB or \
more, and gets $world: it may run out of memory (dynmoe-plan)."

# All else is data parallel, the optimizer's state sharded.
layout=(
    --bf16 --transformer-impl "$impl" "${kernels[@]}" "${precision[@]}" --moe-token-dispatcher-type alltoall
    --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
)
fitted=(--micro-batch-size "$micro" --expert-model-parallel-size "$expert")

# Megatron wants one queue on GPUs before Blackwell, so that communication is launched in the order of the program.
((tensor * context == 1)) || export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
# Experts get another number of rows in each step, which leaves blocks of fixed size in pieces. The newer name of the
# variable is PYTORCH_ALLOC_CONF; Megatron looks at the older one, which torch reads too.
[[ -n ${PYTORCH_ALLOC_CONF:-} ]] || export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # as torchrun sets it for several ranks
