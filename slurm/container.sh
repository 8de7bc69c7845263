# shellcheck shell=bash
# How srun's tasks run in a container; sourced by slurm/launch.sh. These variables may be set when a job is submitted:
#
#   CONTAINER_IMAGE    everything runs in this image: what pyxis takes, a .sif file, or a .sqsh file for enroot
#   CONTAINER_RUNTIME  pyxis, apptainer or enroot; default: the first of them that is there
#   CONTAINER_MOUNTS   folders that the tasks see besides this one and RUN_ROOT, cut at commas: /data,/scratch/me

# Sets PYTHON, `container_flags` (of srun) and `inside` (what stands before the command of a task).
choose_container() {
    container_flags=() inside=()
    if [ -z "${CONTAINER_IMAGE:-}" ]; then
        PYTHON=${PYTHON:-.venv/bin/python}
        command -v "$PYTHON" >/dev/null || give_up 2 "there is no $PYTHON: run make GPU=1 install, or set CONTAINER_IMAGE"
        return
    fi
    PYTHON=${PYTHON:-python}
    mkdir -p "$RUN_ROOT"
    local folder folders mounts=''
    IFS=, read -ra folders <<<"$PWD,$(realpath "$RUN_ROOT")${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}"
    case ${CONTAINER_RUNTIME:-$(find_runtime)} in
        pyxis) # the plugin adds flags to srun
            container_flags=("--container-image=$CONTAINER_IMAGE" "--container-workdir=$PWD")
            for folder in "${folders[@]}"; do mounts+=",$folder:$folder"; done
            container_flags+=("--container-mounts=${mounts:1}") ;;
        apptainer)
            inside=(apptainer exec --nv --pwd "$PWD")
            for folder in "${folders[@]}"; do inside+=(--bind "$folder"); done
            inside+=("$CONTAINER_IMAGE") ;;
        enroot)
            inside=(bash -c "$IN_ENROOT" enroot)
            for folder in "${folders[@]}"; do inside+=(--mount "$folder:$folder"); done
            inside+=("$CONTAINER_IMAGE" bash -c "cd '$PWD' && exec \"\$@\"" enroot) ;;
        *) give_up 2 "CONTAINER_RUNTIME=${CONTAINER_RUNTIME:-}: write pyxis, apptainer or enroot, and have it on the nodes" ;;
    esac
}

find_runtime() {
    if srun --help | grep -q -- --container-image; then
        echo pyxis
    else
        basename -a "$(command -v apptainer || command -v enroot)"
    fi
}

# enroot hands no variable on by itself, and Slurm's differ from task to task.
# shellcheck disable=SC2016  # it is expanded in the task
IN_ENROOT='for name in $(compgen -e); do given+=(--env "$name"); done; exec enroot start "${given[@]}" "$@"'
