#!/usr/bin/env bash
# One of the models in examples/models on several nodes of 8 GPUs, through Slurm. From the repository's root:
#
#   DATA=... TOKENIZER=... SAVE=... sbatch --nodes 4 --job-name dynmoe_24l examples/slurm.sh MODEL [flags of your own]
#
# One task a node runs pretrain.sh; the nodes meet at the first of them (c10d). Two minutes before the time is up, or
# when the job is preempted, Slurm sends SIGTERM to every process: the ranks finish their iteration, save and exit. The
# job then queues itself again, and resumes from SAVE, as long as it got further than the time before.
# A node that is lost for LOST_AFTER seconds (90) ends training on all nodes; after GIVE_UP_AFTER (300) without it the
# job queues itself again likewise, and Slurm gives it nodes that work. Without progress it does so once in a row, and
# never after a refusal or NaN, which would only come again.
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

export TRAIN_ITERS=${TRAIN_ITERS:-95368}
export NNODES=$SLURM_JOB_NUM_NODES
read -r first_node < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export RDZV_ENDPOINT=$first_node:$((20000 + SLURM_JOB_ID % 10000))
export RDZV_ID=$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0} # a requeued job must not find the one before it
export GIVE_UP_AFTER=${GIVE_UP_AFTER:-300} # a node that stays away is Slurm's to replace

before=$(saved) code=0
# The supervisors agree on one exit code, and end by themselves when a node is gone; --no-kill lets them do so.
srun --no-kill bash examples/pretrain.sh "$@" || code=$?
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
