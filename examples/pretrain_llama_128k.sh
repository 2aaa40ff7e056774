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
# Continual pretraining of a Llama on 131,072-token windows, by torchrun on this node, on each of several nodes
# (NNODES, NODE_RANK, MASTER_ADDR), or inside a SLURM allocation (sbatch --nodes N
# examples/pretrain_llama_128k.sh, or run it from salloc). docs/install.md has containers and clusters.
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
# NNODES, NODE_RANK, MASTER_ADDR  without SLURM: number of nodes, this one's (0, 1, ...), the name of node 0;
#              default: torchrun's own PET_NNODES, PET_NODE_RANK, PET_MASTER_ADDR (Kubeflow Trainer sets them)
# MASTER_PORT  where the nodes meet (default: 29500; in SLURM 20000 + the job's number modulo 12000)
# CONTAINER_IMAGE, CONTAINER_MOUNTS  in SLURM with pyxis: the image, and folders that it sees (/lustre:/lustre)
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
NUM_NODES=${SLURM_JOB_NUM_NODES:-${SLURM_NNODES:-${NNODES:-${PET_NNODES:-1}}}}
CONTAINER=()
if [ "${CONTAINER_IMAGE:-}" ]; then
    CONTAINER=("--container-image=$CONTAINER_IMAGE" "--container-mounts=${CONTAINER_MOUNTS:-}"
        "--container-workdir=$REPOSITORY" --no-container-mount-home)
fi

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
[[ ${PET_NPROC_PER_NODE:-} =~ ^[0-9]+$ ]] && NPROC_PER_NODE=${NPROC_PER_NODE:-$PET_NPROC_PER_NODE}  # not "auto"
NPROC_PER_NODE=${NPROC_PER_NODE:-$(gpus_per_node)}
if ! [[ $NPROC_PER_NODE =~ ^[1-9][0-9]*$ ]]; then
    echo "error: job ${SLURM_JOB_ID:-} has $NPROC_PER_NODE GPUs on a node, and one process is started for each: ask" \
        "for GPUs (--gpus-per-node 8), or set NPROC_PER_NODE" >&2
    exit 2
fi

check_port() {
    if ! [[ $PORT =~ ^[0-9]{1,5}$ ]] || ((PORT < 1 || PORT > 65535)); then
        echo "error: MASTER_PORT is $PORT; all nodes meet at one port, 1 to 65535: unset it for the default" >&2
        exit 2
    fi
}
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
    check_port
    # A step of one task would be bound to one core. --kill-on-bad-exit accepts its value only after "=".
    LAUNCH=(srun --nodes="$NUM_NODES" --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=1 "${CONTAINER[@]}"
        --open-mode=append --output="$OUTPUT/logs/%j-%N.log" "${LAUNCH[@]}" --nnodes "$NUM_NODES"
        --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$HEAD_NODE:$PORT")
elif [ "$NUM_NODES" != 1 ]; then
    RANK_OF_NODE=${NODE_RANK:-${PET_NODE_RANK:-}} HEAD_NODE=${MASTER_ADDR:-${PET_MASTER_ADDR:-}}
    PORT=${MASTER_PORT:-${PET_MASTER_PORT:-29500}}
    if ! [[ $NUM_NODES =~ ^[1-9][0-9]*$ && $RANK_OF_NODE =~ ^[0-9]+$ && $HEAD_NODE ]] ||
        ((RANK_OF_NODE >= NUM_NODES)); then
        echo "error: NNODES is $NUM_NODES, NODE_RANK '$RANK_OF_NODE', MASTER_ADDR '$HEAD_NODE': on each node give" \
            "the number of nodes, its own from 0 to NNODES - 1, and the name or address of node 0" >&2
        exit 2
    fi
    check_port
    LAUNCH+=(--nnodes "$NUM_NODES" --node-rank "$RANK_OF_NODE" --master-addr "$HEAD_NODE" --master-port "$PORT")
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
CHECK=("$PYTHON" "$REPOSITORY/tools/check_layout.py")
[ "${CONTAINER_IMAGE:-}" ] && CHECK=(srun --nodes=1 --ntasks=1 "${CONTAINER[@]}" "${CHECK[@]}")
"${CHECK[@]}" --world-size $((NUM_NODES * NPROC_PER_NODE)) "${TRAIN_ARGS[@]}"

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
