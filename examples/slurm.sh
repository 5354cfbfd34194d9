#!/usr/bin/env bash
# One of the models in examples/models through Slurm, on nodes of 8 GPUs. From the repository's root, for 32 GPUs:
#
#   DATA=... TOKENIZER=... SAVE=... sbatch --nodes 4 --job-name dynmoe_24l examples/slurm.sh MODEL [flags of your own]
#
# 256 GPUs are --nodes 32; one GPU is --nodes 1 --gpus-per-node 1. FP8, SMOKE and the rest are pretrain.sh's settings.
# One task a node runs pretrain.sh; the nodes meet at the first of them (c10d). Two minutes before the time is up, or
# when the job is preempted, Slurm sends SIGTERM to every process: the ranks finish their iteration, save and exit. The
# job then queues itself again, and resumes from SAVE, as long as it got further than the time before.
# A node that is lost for LOST_AFTER seconds (90) ends training on all nodes; after GIVE_UP_AFTER (300) without it the
# job queues itself again likewise, and Slurm gives it nodes that work. Without progress it does so once in a row, and
# never after a refusal or NaN, which would only come again.
# LAUNCH=srun starts ranks without torchrun and supervisors, one task a GPU. Then Slurm ends all tasks when one fails or
# a node is lost, nothing restarts within the job, and the rule above decides whether it queues itself again.
# Partition, account and container are your cluster's: give them to sbatch.
#SBATCH --job-name=pretrain
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --no-kill
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

refuse() { echo "slurm.sh: $*" >&2; exit 2; }
[[ -n ${SLURM_JOB_ID:-} ]] || refuse "this is no Slurm job; start it with sbatch."
[[ -n ${SAVE:-} ]] || refuse "SAVE is not set; give a folder that all nodes see."
# sbatch runs a copy of this file from elsewhere, so the folder of submission is all it knows of the checkout.
cd "$SLURM_SUBMIT_DIR"
[[ -f examples/pretrain.sh ]] || refuse "$PWD has no examples/pretrain.sh; run sbatch in the repository's root."
# A wrong name is answered here, once, and not on every node.
[[ -f examples/models/${1:-}.args ]] || exec bash examples/pretrain.sh "$@"

saved() { # the iteration of the newest checkpoint, 0 before the first
    local tracker=$SAVE/latest_checkpointed_iteration.txt
    if [[ -f $tracker ]]; then cat "$tracker"; else echo 0; fi
}

launch=${LAUNCH:-torchrun}
[[ $launch == torchrun || $launch == srun ]] || refuse "LAUNCH is $launch; accepted: torchrun or srun."
[[ ${SMOKE:-0} == 0 ]] || export TRAIN_ITERS=${TRAIN_ITERS:-10}
export TRAIN_ITERS=${TRAIN_ITERS:-95368}
export NNODES=$SLURM_JOB_NUM_NODES GPUS=${GPUS:-${SLURM_GPUS_ON_NODE:-8}}
read -r first_node < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export RDZV_ENDPOINT=$first_node:$((20000 + SLURM_JOB_ID % 10000))
export RDZV_ID=$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0} # a requeued job must not find the one before it
export GIVE_UP_AFTER=${GIVE_UP_AFTER:-300} # a node that stays away is Slurm's to replace

before=$(saved) code=0
if [[ $launch == torchrun ]]; then
    # The supervisors agree on one exit code, and end by themselves when a node is gone; --no-kill lets them do so.
    srun --no-kill bash examples/pretrain.sh "$@" || code=$?
else
    export LAUNCH MASTER_ADDR=$first_node MASTER_PORT=${RDZV_ENDPOINT##*:}
    # The first rank that fails writes its exit code here; srun's own is the highest, that of the ranks it killed.
    export MEGATRON_DYNMOE_OUTCOME_FILE=$SAVE/.outcome-$RDZV_ID.json
    mkdir -p "$SAVE" && rm -f "$MEGATRON_DYNMOE_OUTCOME_FILE"
    # Ranks count through a node before the next one (block), see all its GPUs, and have its cores for their threads.
    srun --kill-on-bad-exit=1 --ntasks=$((NNODES * GPUS)) --ntasks-per-node="$GPUS" --distribution=block \
        --gpu-bind=none --cpu-bind=none bash examples/pretrain.sh "$@" || code=$?
    if [[ -f $MEGATRON_DYNMOE_OUTCOME_FILE ]]; then
        first=$(sed -n 's/.*"code": \([0-9]*\).*/\1/p' "$MEGATRON_DYNMOE_OUTCOME_FILE")
        code=${first:-$code}
        rm -f "$MEGATRON_DYNMOE_OUTCOME_FILE"
    fi
fi
after=$(saved)

stuck=$SAVE/.requeued_without_progress
if ((after >= TRAIN_ITERS)); then
    rm -f "$stuck"
    echo "finished: $after of $TRAIN_ITERS iterations, saved in $SAVE"
elif ((code == 2 || code == 17)); then
    refuse "stopped at iteration $after of $TRAIN_ITERS with exit code $code, which would come again; not queueing again."
elif ((after > before)); then
    rm -f "$stuck"
    echo "saved at iteration $after of $TRAIN_ITERS; queueing again"
    scontrol requeue "$SLURM_JOB_ID"
elif [[ ! -e $stuck ]]; then
    mkdir -p "$SAVE" && touch "$stuck"
    echo "stopped at iteration $after of $TRAIN_ITERS with no new checkpoint (exit code $code); queueing again, once"
    scontrol requeue "$SLURM_JOB_ID"
else
    rm -f "$stuck"
    refuse "stopped at iteration $after of $TRAIN_ITERS with no new checkpoint (exit code $code) again; not queueing again."
fi
