#!/usr/bin/env bash
#SBATCH --job-name=megatron-long
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@900
#
# Continual pretraining of a Llama on 131,072-token windows, by torchrun on this node or inside a SLURM
# allocation (sbatch --nodes N examples/pretrain_llama_128k.sh, or run it from salloc).
#
#   CHECKPOINT=ckpt/llama3-8b DATASET=data/mix OUTPUT=runs/llama3-8b-128k \
#       examples/pretrain_llama_128k.sh [any flag of megatron_long.pretrain or Megatron]
#
# CHECKPOINT   Megatron checkpoint to start from (tools/convert_checkpoint.py hf-to-megatron)
# NEXT_STAGE_OF  instead of CHECKPOINT: a finished run, whose optimizer is kept
# DATASET      folder that tools/preprocess_mix.py wrote
# OUTPUT       checkpoints, TensorBoard and losses; a second start resumes from the newest checkpoint there
# RECIPE       llama3_8b_128k (default), llama2_7b_80k, llama2_7b_128k, llama2_13b_64k, llama3_70b_128k
# KEEP_LAST    number of newest checkpoints to keep (default: 3; 0 keeps all; one of an 8B model takes 112 GB)
# NPROC_PER_NODE  processes on each node (default: its GPUs; 1 without any, outside SLURM)
# MASTER_PORT  where the nodes of a SLURM job meet (default: 20000 + the job's number modulo 12000)
# PYTHON       interpreter (default: python3)
# REQUEUE=0    do not requeue the job at its time limit
# DRY_RUN=1    print the command and exit
#
# A checkpoint is written every 30 minutes (--save-minutes; --save-interval counts steps instead). Inside SLURM
# each node writes OUTPUT/logs/JOB-NODE.log. Fifteen minutes before the time limit (--signal above: time for the
# current step, up to 3 minutes on one node of eight H100, and for the save) the run is signaled to save and exit,
# and the job is requeued and resumes from that checkpoint. It is also requeued after a node failure.
set -euo pipefail

need() {
    [[ -n ${!1:-} ]] || { echo "error: $1 is not set; set it to $2" >&2; exit 2; }
}
[[ ${NEXT_STAGE_OF:-} ]] || need CHECKPOINT "the Megatron checkpoint to start from"
need DATASET "the folder of tools/preprocess_mix.py"
need OUTPUT "the folder for checkpoints and logs"
RECIPE=${RECIPE:-llama3_8b_128k}
PYTHON=${PYTHON:-python3}
# SLURM runs a copy of this script, so its own path is not in the repository: submit from the repository.
REPOSITORY=${REPOSITORY:-${SLURM_SUBMIT_DIR:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}}
NUM_NODES=${SLURM_JOB_NUM_NODES:-${SLURM_NNODES:-1}}

gpus_per_node() {
    local listed
    if [[ ${SLURM_GPUS_ON_NODE:-} ]]; then
        echo "$SLURM_GPUS_ON_NODE"
    elif [[ ${SLURM_GPUS_PER_NODE:-} =~ ^([a-zA-Z0-9_.-]+:)?([1-9][0-9]*)$ ]]; then  # 8, or h100:8
        echo "${BASH_REMATCH[2]}"
    elif [[ ${SLURM_JOB_ID:-} ]]; then  # salloc leaves the shell on the login node: ask a node of the job
        srun --nodes=1 --ntasks=1 nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true
    else
        listed=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU') || true
        echo $((listed > 0 ? listed : 1))
    fi
}
if [[ ${NPROC_PER_NODE:-} ]] && ! [[ $NPROC_PER_NODE =~ ^[1-9][0-9]*$ ]]; then
    echo "error: NPROC_PER_NODE is $NPROC_PER_NODE: give the number of processes on a node, one for each GPU" >&2
    exit 2
fi
NPROC_PER_NODE=${NPROC_PER_NODE:-$(gpus_per_node)}
if ! [[ $NPROC_PER_NODE =~ ^[1-9][0-9]*$ ]]; then
    echo "error: job ${SLURM_JOB_ID:-} has $NPROC_PER_NODE GPUs on a node, and one process is started for each: ask" \
        "for GPUs (--gpus-per-node 8), or set NPROC_PER_NODE" >&2
    exit 2
fi

START=(--pretrained-checkpoint "${CHECKPOINT:-}")
[[ ${NEXT_STAGE_OF:-} ]] && START=(--next-stage-of "$NEXT_STAGE_OF")
TRAIN_ARGS=(
    --recipe "$RECIPE"
    --dataset "$DATASET"
    "${START[@]}"
    --load "$OUTPUT"
    --save "$OUTPUT"
    --tensorboard-dir "$OUTPUT/tensorboard"
    --loss-log "$OUTPUT/loss.jsonl"
    --exit-signal-handler
    --keep-last "${KEEP_LAST:-3}"
    "$@"
)
LAUNCH=("$PYTHON" -m megatron_long.launch --nproc-per-node "$NPROC_PER_NODE")
if [ "${SLURM_JOB_ID:-}" ]; then
    HEAD_NODE=${HEAD_NODE:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
    PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 12000))}
    if ! [[ $PORT =~ ^[0-9]{1,5}$ ]] || ((PORT < 1 || PORT > 65535)); then
        echo "error: MASTER_PORT is $PORT; all nodes meet at one port, 1 to 65535: unset it for one made from" \
            "the job's number" >&2
        exit 2
    fi
    # A step of one task would be bound to one core. --kill-on-bad-exit accepts its value only after "=".
    LAUNCH=(srun --nodes="$NUM_NODES" --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=1
        --open-mode=append --output="$OUTPUT/logs/%j-%N.log" "${LAUNCH[@]}" --nnodes "$NUM_NODES"
        --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$HEAD_NODE:$PORT")
else
    LAUNCH+=(--standalone)
fi
COMMAND=("${LAUNCH[@]}" -m megatron_long.pretrain "${TRAIN_ARGS[@]}")

if [ "${DRY_RUN:-0}" = 1 ]; then
    printf '%q ' "${COMMAND[@]}"
    printf '\n'
    exit 0
fi
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
if [ -z "${SLURM_JOB_ID:-}" ]; then
    exec "${COMMAND[@]}"
fi

# Check once, before all nodes start; on a single machine training's first process does the same checks.
"$PYTHON" "$REPOSITORY/tools/check_layout.py" --world-size $((NUM_NODES * NPROC_PER_NODE)) "${TRAIN_ARGS[@]}"

# Only the shell gets SLURM's signal; it forwards SIGUSR1, which srun sends to every node. SIGTERM would make srun
# kill the step at once, before anything is saved.
mkdir -p "$OUTPUT/logs"
echo "job $SLURM_JOB_ID, start ${SLURM_RESTART_COUNT:-0}, $NUM_NODES nodes: logs in $OUTPUT/logs"
TIME_IS_UP=0
"${COMMAND[@]}" &
STEP=$!
trap 'TIME_IS_UP=1; kill -USR1 "$STEP" 2>/dev/null || true' USR1
trap 'kill -USR1 "$STEP" 2>/dev/null || true' TERM
STATUS=0
wait "$STEP" || STATUS=$?
while kill -0 "$STEP" 2>/dev/null; do  # a trapped signal ends `wait` while the step still saves
    STATUS=0
    wait "$STEP" || STATUS=$?
done
if [ "$TIME_IS_UP" = 1 ] && [ "${REQUEUE:-1}" = 1 ]; then
    echo "job $SLURM_JOB_ID: time is up, queued again"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$STATUS"
