#!/usr/bin/env bash
# Rule 110 with several numbers of passes and seeds: one task of the array for each run, and one page of curves at the end.
#   sbatch slurm/rule110_sweep.sh [setting=value ...]
#   PASSES="1 2 4 8" SEEDS=5 sbatch --array=0-19 slurm/rule110_sweep.sh     as many tasks as runs
#SBATCH --job-name=rule110_sweep
#SBATCH --array=0-5
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=1
#SBATCH --time=4:00:00
##SBATCH --partition=cpu
##SBATCH --account=my-account

# One log for each run.
#SBATCH --output=%x-%A-%a.log
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@60
#SBATCH --requeue

EXPERIMENT=rule110
RUN_ROOT=${RUN_ROOT:-runs/rule110}
read -ra passes <<<"${PASSES:-1 4}"
SEEDS=${SEEDS:-3}
n=${passes[SLURM_ARRAY_TASK_ID / SEEDS]:?the array has more tasks than PASSES and SEEDS have runs} || exit 2
seed=$((SLURM_ARRAY_TASK_ID % SEEDS))
RUN_NAME=n$n-seed$seed

cd "${SLURM_SUBMIT_DIR:?submit this file with sbatch}" && source slurm/launch.sh || exit 2
launch "sleep.passes=$n" "train.seed=$seed" "data.seed=$seed" train.threads=1 "$@"
# Whoever comes last finds that all are finished, and reports.
step --ntasks=1 -- tools/rule110.py --report --root "$RUN_ROOT" --passes "${passes[@]}" --seeds "$SEEDS"
