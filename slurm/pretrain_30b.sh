#!/usr/bin/env bash
# Pretrains a 30B hybrid on 32 machines of 8 GPUs.
#   sbatch slurm/pretrain_30b.sh [setting=value ...]
#SBATCH --job-name=pretrain_30b
#SBATCH --nodes=32
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00
##SBATCH --partition=gpu
##SBATCH --account=my-account

# One log for all attempts. Five minutes before the end the run is asked to save; then the job is queued again. Jobs of
# one name, and so of one run, wait for each other.
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --dependency=singleton

EXPERIMENT=${EXPERIMENT:-pretrain_30b}

cd "${SLURM_SUBMIT_DIR:?submit this file with sbatch}" && source slurm/launch.sh || exit 2
launch "$@"
