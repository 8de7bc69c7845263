# shellcheck shell=bash
# What the scripts of this folder share: a batch script sources it and calls `launch [setting=value ...]`.
# It checks the settings and the nodes, trains with one task a GPU, tries a failed run once more on the nodes that are
# fit, and else puts the job back into the queue until the run is finished (docs/slurm.md). These variables may be set
# when a job is submitted:
#
#   EXPERIMENT         a file of configs/experiment; each script has its own
#   RUN_ROOT RUN_NAME  the run folder is RUN_ROOT/RUN_NAME (runs, the job's name); a run that is there is gone on with
#   OVERRIDES          more settings, cut at blanks; those given to the script come behind them
#   NODES              the nodes that train; the job's others are spares (all)
#   MAX_ATTEMPTS       so many attempts in a row may end without a new checkpoint (3)
#   DOCTOR             off: the nodes are not checked first
#   PYTHON             the interpreter (.venv/bin/python; in a container python)
#   CONTAINER_IMAGE CONTAINER_RUNTIME CONTAINER_MOUNTS   see slurm/container.sh

set -uo pipefail
source slurm/container.sh

say() { echo "$(date '+%F %T') launch: $*"; }

# give_up CODE WHY...
give_up() {
    say "${*:2}"
    exit "$1"
}

# Everything up to the end of the run. Returns when it is finished; otherwise the script ends here.
launch() {
    RUN_ROOT=${RUN_ROOT:-runs} RUN_NAME=${RUN_NAME:-$SLURM_JOB_NAME} MAX_ATTEMPTS=${MAX_ATTEMPTS:-3}
    run='' asked='' ended='' srun_pid=''
    case " ${OVERRIDES:-} $*" in *" run.name="* | *" run.root="* | *" experiment="*)
        give_up 2 "run.name, run.root and experiment are set by RUN_NAME, RUN_ROOT and EXPERIMENT" ;;
    esac
    # shellcheck disable=SC2206  # OVERRIDES is cut at blanks
    settings=("experiment=$EXPERIMENT" "run.root=$(quoted "$RUN_ROOT")" "run.name=$(quoted "$RUN_NAME")" ${OVERRIDES:-} "$@")
    # Ahead of the time limit, or when others need the nodes: #SBATCH --signal=B: sends it to this script alone.
    trap 'asked=yes; say "asked to save"; [ -z "$srun_pid" ] || kill -USR1 "$srun_pid"' USR1
    # Slurm ends the job and signals the tasks itself; whether it is queued again is then Slurm's affair.
    trap 'ended=yes' TERM

    set_environment
    choose_container
    doctor+=("${settings[@]}")
    find_run
    count_attempt
    announce
    if [ "$from" = "the start" ]; then
        step --nodes=1 --ntasks=1 -- -m sleeptrain plan --processes "$tasks" "${settings[@]}" || refuse $? "the settings do not fit"
    fi
    if [ "${DOCTOR:-on}" != off ]; then
        step --nodes="${#all[@]}" --ntasks="${#all[@]}" --ntasks-per-node=1 -- "${doctor[@]}" || leave_out_unfit $?
    fi
    while ! train; do
        try_here || queue_again "$code"
        count_attempt
        announce
    done
}

# train: an attempt. True if the run is finished; `code` says how it ended otherwise.
train() {
    local before
    before=$(status)
    step --nodes="${#chosen[@]}" --nodelist="$(joined "${chosen[@]}")" --ntasks="$tasks" --kill-on-bad-exit=1 -- \
        -m sleeptrain train "${settings[@]}"
    code=$?
    # srun tells the code of one task, perhaps one that it has killed. What the run says of itself counts.
    if [ "$(status)" != "$before" ]; then
        code=$(status | sed -n 's/^ "exit_code": \([0-9]*\).*/\1/p' | grep . || echo "$code")
    fi
    case $code in
        0) say "$run is finished" ;;
        2) give_up 2 "a mistake that you can mend, see above; not queued again" ;;
        *) return 1 ;;
    esac
}

# try_here: prepares one more attempt in this allocation. False if the job should be queued again: it was asked to
# save, two attempts in a row have saved nothing new, or the nodes that are fit cannot train.
try_here() {
    [ -z "$asked$ended" ] && [ "$code" != 75 ] && [ "$attempt" -lt "$MAX_ATTEMPTS" ] || return 1
    [ "$(newest)" != "$from" ] || [ "$attempt" = 1 ] || return 1
    say "ended with code $code at $(newest): looks for nodes that are fit"
    find_fit_nodes
    [ -z "$asked$ended" ] && [ "${#fit[@]}" -gt 0 ] || return 1
    choose_nodes "${fit[@]}"
    if [ "${#chosen[@]}" -lt "$needed" ]; then
        step --nodes=1 --ntasks=1 --nodelist="${chosen[0]}" -- -m sleeptrain plan --processes "$tasks" "${settings[@]}" || return 1
    fi
    mkdir -p "$run" && keep_count
}

# leave_out_unfit CODE: spares take the place of nodes that are not fit.
leave_out_unfit() {
    [ -n "$asked$ended" ] || [ "${#all[@]}" = "$needed" ] || find_fit_nodes
    [ "${#fit[@]}" -ge "$needed" ] || refuse "$1" "a node is not fit: mend it, or leave it out with sbatch --exclude=NODE"
    choose_nodes "${fit[@]}"
}

# find_fit_nodes: those that run a task and pass the checks, each by itself and all at once.
find_fit_nodes() {
    local pids=() node
    for node in "${all[@]}"; do
        is_fit "$node" &
        pids+=($!)
    done
    fit=()
    for node in "${all[@]}"; do
        # A trap interrupts `wait`; which nodes are fit is then not asked any more.
        if wait "${pids[0]}"; then fit+=("$node"); elif [ -z "$asked$ended" ]; then say "$node is not fit"; fi
        pids=("${pids[@]:1}")
    done
}

# is_fit NODE. What the failed step had may not be free yet, above all its memory: a task is started several times.
is_fit() {
    local try
    for try in 1 2 3 4 5 6; do
        ! on_node "$1" -c '' || break
        [ "$try" -lt 6 ] && sleep "$FREE_SECONDS" || return 1
    done
    [ "${DOCTOR:-on}" = off ] || on_node "$1" "${doctor[@]}"
}

# on_node NODE WORDS...: runs Python with these words on a node.
on_node() {
    timeout "$FIT_SECONDS" srun --nodes=1 --ntasks=1 --nodelist="$1" "${container_flags[@]}" "${inside[@]}" \
        "$PYTHON" "${@:2}" </dev/null
}

# choose_nodes NODE...: the first of them, as many as are needed or there are, train.
choose_nodes() {
    chosen=("${@:1:needed}")
    tasks=$((${#chosen[@]} * tasks_per_node))
    export MASTER_ADDR=${chosen[0]}
}

joined() { (IFS=, && echo "$*"); }

announce() {
    say "job $SLURM_JOB_ID on $(scontrol show hostlist "$(joined "${chosen[@]}")"), $tasks tasks: $run from $from, attempt $attempt of $MAX_ATTEMPTS"
}

FIT_SECONDS=600                   # until a node that does not answer is not fit
FREE_SECONDS=${FREE_SECONDS:-5}   # until a step that did not start is started again
doctor=(-m sleeptrain doctor --brief)

set_environment() {
    readarray -t all < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    needed=${NODES:-${#all[@]}} fit=()
    [ "$needed" -ge 1 ] 2>/dev/null && [ "$needed" -le "${#all[@]}" ] ||
        give_up 2 "NODES=$needed, but the job has ${#all[@]} nodes; set it to the number of nodes that train"
    tasks_per_node=$((${SLURM_NTASKS:-$((${#all[@]} * ${SLURM_NTASKS_PER_NODE:-1}))} / ${#all[@]}))
    choose_nodes "${all[@]}"
    export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
    # Since Slurm 22.05 srun takes it from here alone.
    [ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
}

# The tasks of a step meet on the first chosen node, at another port in each step of each attempt: one that is occupied costs
# an attempt. Below those that the system gives to outgoing connections, which may be taken at any moment.
steps=0
choose_port() {
    local first=32768
    read -r first _ 2>/dev/null </proc/sys/net/ipv4/ip_local_port_range
    [ "$first" -gt 20000 ] 2>/dev/null || first=32768
    steps=$((steps + 1))
    export MASTER_PORT=$((first - 1 - (SLURM_JOB_ID * 64 + ${SLURM_RESTART_COUNT:-0} * 8 + steps) % 10000))
}

# step SRUN-FLAGS... -- WORDS...: runs Python with these words in the job, in its container if it has one; the exit code.
step() {
    local flags=() code last
    while [ "$1" != -- ]; do flags+=("$1") && shift; done
    [ -z "$asked$ended" ] || return 75
    choose_port
    srun "${flags[@]}" "${container_flags[@]}" "${inside[@]}" "$PYTHON" "${@:2}" &
    srun_pid=$!
    # A trap interrupts `wait`, which then returns a code that is not srun's.
    while wait "$srun_pid"; code=$?; kill -0 "$srun_pid" 2>/dev/null; do :; done
    if [ "$code" -gt 128 ]; then
        wait "$srun_pid" 2>/dev/null; last=$?
        [ "$last" = 127 ] || code=$last
    fi
    srun_pid=''
    return "$code"
}

# quoted TEXT: as a value of the program's settings, whatever is in it. Backslashes are doubled where a quote follows.
quoted() { printf "'%s'" "$(printf %s "$1" | sed -E "s/(\\\\*)'/\1\1\\\\'/g; s/(\\\\+)\$/\1\1/")"; }

# The run folder is where the program says that it is.
find_run() {
    local code
    run=$(step --nodes=1 --ntasks=1 -- -m sleeptrain train --print-run-folder "${settings[@]}" | tail -n 1)
    code=$?
    [ "$code" = 0 ] || refuse "$code" "the settings do not fit"
}

status() { cat "$run/status.json" 2>/dev/null; }

newest() { cat "$run/checkpoints/latest" 2>/dev/null || echo "the start"; }

# How often this job has begun at this checkpoint. The file is in the run folder, for Slurm's own count also has the
# evictions; another job, which somebody has submitted, counts anew.
count_attempt() {
    from=$(newest) attempt=1
    local job='' count='' at=''
    [ ! -f "$run/attempts" ] || read -r job count at <"$run/attempts"
    [ "$job $at" != "$SLURM_JOB_ID $from" ] || attempt=$((count + 1))
    [ "$attempt" -le "$MAX_ATTEMPTS" ] || no_progress 1
    [ ! -d "$run" ] || keep_count
}

keep_count() { echo "$SLURM_JOB_ID $attempt $from" >"$run/attempts"; }

no_progress() { give_up "$1" "$MAX_ATTEMPTS attempts in a row have begun at $from and saved nothing new; not queued again"; }

# refuse CODE WHY: a check has failed, unless it was interrupted.
refuse() {
    [ -z "$asked$ended" ] || queue_again 75
    give_up "$1" "$2; not queued again"
}

# queue_again CODE: the attempt has ended with it before the run's end.
queue_again() {
    [ -z "$ended" ] || give_up "$1" "ended by Slurm at $(newest)"
    if [ -n "$run" ]; then
        [ "$(newest)" != "$from" ] || [ "$attempt" -lt "$MAX_ATTEMPTS" ] || no_progress "$1"
        mkdir -p "$run" && keep_count
    fi
    say "ended with code $1 at $(newest): queued again"
    trap - TERM
    scontrol requeue "$SLURM_JOB_ID" || give_up "$1" "this job may not be queued again: submit it anew, it goes on"
    sleep 600 & # until Slurm ends this attempt
    wait $!
    exit "$1"
}
