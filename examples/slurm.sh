#!/bin/bash
# Pretraining on several nodes of a SLURM cluster:
#
#   sbatch examples/slurm.sh --config v2-base --data /shared/videos.csv --out /shared/runs/mine
#
# What follows the script's name goes to `vmae-fast pretrain`. --out, the data and the Python
# environment must be at the same path on every node, on a disk that all of them see.
#
#SBATCH --job-name=vmae-fast
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
# 180 s before the time is up this script gets SIGUSR1 ("B:"), has the run save, and asks for
# another start. Preemption is a SIGTERM to all; SLURM itself starts the job again after it.
#SBATCH --signal=B:USR1@180
#SBATCH --requeue
# One log for all starts.
#SBATCH --open-mode=append
#SBATCH --output=vmae-fast-%j.log

set -uo pipefail

# The launchers meet on the job's first node, at a port of the job's own: jobs may share nodes.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000))

launch=(
  torchrun
  # One launcher a node starts a process for each of its GPUs; GPUS=4 for another number.
  "--nnodes=$SLURM_NNODES" "--nproc-per-node=${GPUS:-gpu}"
  --rdzv-backend=c10d "--rdzv-endpoint=$first:$port"
  # Another start of the job must not meet what is left of the one before.
  "--rdzv-id=$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"
  # Where one process dies, all start again from the last checkpoint.
  "--max-restarts=${MAX_RESTARTS:-3}"
  # The launcher passes these on, and kills what is not gone after as many seconds: 30 unless
  # told, too few for a large checkpoint. Keep it below the 180 of --signal.
  "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
  --shutdown-timeout=150
  -m vmae_fast.cli pretrain
)

# A launcher that has saved and gone must not have SLURM kill the others at once; and since SLURM
# 22.05 a step has one core a task unless told. --auto-resume: the first start begins the run, each
# one after it goes on from the last checkpoint.
srun --kill-on-bad-exit=0 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
  "${launch[@]}" "$@" --auto-resume &
step=$!

# srun passes on to all nodes what it gets. SIGTERM comes to the step from SLURM; this shell only
# has to live until the run has saved.
time_is_up=no
trap 'time_is_up=yes; kill -USR1 "$step"' USR1
trap 'echo "asked to end: waiting for the run to save"' TERM

# A signal ends `wait`, but not the step.
wait "$step"
status=$?
while kill -0 "$step" 2>/dev/null; do
  wait "$step"
  status=$?
done

if [[ $time_is_up == yes && $status -ne 0 ]]; then
  echo "the time is up: asking for another start"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
