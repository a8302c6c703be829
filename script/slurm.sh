#!/usr/bin/env bash
# Training on several machines under Slurm: one torchrun a node, which starts one process a GPU.
#
#   sbatch --nodes=2 --gpus-per-node=8 script/slurm.sh sft --config script/recipes/sft.yaml --resume
#
# Everything after the name is for `main.py`. Submit it from the checkout, which all nodes must see under one path, with
# data and run folder, and after `bash script/setup.sh` there. Partition, account and time go on sbatch's line.
# With --resume a job that is requeued goes on from its newest checkpoint, and a new one starts.
#
#   NGPU=8                       processes a node; default: what Slurm gives it
#   PORT=29500                   of the rendezvous on the first node; default: made of the job's number
#   NCCL_SOCKET_IFNAME=ib0       network that processes find each other by, where they choose a wrong one
#   NCCL_IB_DISABLE=1            no InfiniBand or RoCE: TCP alone
#   NCCL_DEBUG=INFO              say what NCCL chose; default: WARN
#
# docs/multi_node.md explains them, and what to do when a job hangs.

#SBATCH --job-name=threedr1
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --output=slurm-%j.txt
#SBATCH --open-mode=append
#SBATCH --requeue
set -euo pipefail

# sbatch runs a copy of this file that lies elsewhere
here="$(dirname "${BASH_SOURCE[0]}")"
[[ -f "$here/common.sh" ]] || here="${SLURM_SUBMIT_DIR:-.}/script"
if [[ ! -f "$here/common.sh" ]]; then
    echo "There is no script/common.sh; submit the job from the checkout." >&2
    exit 1
fi
source "$here/common.sh"

if [[ -z "${SLURM_JOB_ID:-}" ]]; then
    echo "This is no Slurm job: start it by sbatch, or train on one machine by NGPU=8 bash script/train.generalist.sh." >&2
    exit 1
fi
if (($# == 0)); then
    echo "Say what to run: sbatch script/slurm.sh sft --config script/recipes/sft.yaml" >&2
    exit 1
fi

nodes="$(scontrol show hostnames "$SLURM_JOB_NODELIST")"
first="${nodes%%$'\n'*}" # no pipe to head, which may end before scontrol has written and fail the job by SIGPIPE
port="${PORT:-$((20000 + SLURM_JOB_ID % 10000))}" # two jobs may share a node
gpus="${NGPU:-${SLURM_GPUS_ON_NODE:-8}}"

export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
# a collective that failed ends its process, and so the job, instead of leaving the others waiting
export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}"
# of a process that waited in vain, say for which collective
export TORCH_NCCL_TRACE_BUFFER_SIZE="${TORCH_NCCL_TRACE_BUFFER_SIZE:-2000}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((${SLURM_CPUS_PER_TASK:-gpus} / gpus > 0 ? ${SLURM_CPUS_PER_TASK:-gpus} / gpus : 1))}"

echo "job $SLURM_JOB_ID: $SLURM_NNODES nodes with $gpus processes each, rendezvous at $first:$port"
srun --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --kill-on-bad-exit=1 \
    "$PY" -m torch.distributed.run \
    --nnodes="$SLURM_NNODES" --nproc-per-node="$gpus" \
    --rdzv-id="$SLURM_JOB_ID" --rdzv-backend=c10d --rdzv-endpoint="$first:$port" \
    main.py "$@"
