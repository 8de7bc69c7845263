"""A real Slurm cluster of virtual nodes on one machine, to try and to test batch scripts.

    eval "$(python tools/local_slurm.py start --nodes 2)"    # sets SLURM_CONF for sbatch, squeue and srun
    python tools/local_slurm.py crash 2                      # kills node2: its slurmd and all its processes
    python tools/local_slurm.py node 2                       # starts node2 again
    python tools/local_slurm.py stop

Nodes are called node1, node2 and so on. Each node is a slurmd with its own hostname, address and /etc/hosts. It has 64
cores and 8 GPUs, which are empty files: Slurm allocates them, CUDA sees none. There are two partitions: `main` and
`urgent`. Jobs of `urgent` preempt jobs of `main`. The cluster needs root on Linux and Debian's packages slurmctld,
slurmd, slurm-client and munge.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
INSTALL = "apt-get install --no-install-recommends slurmctld slurmd slurm-client munge"
FOLDER = Path("/var/lib/sleeptrain-slurm")  # only root can create it
CORES, GPUS = 64, 8
# Times are short, to keep waits short. A requeued job waits for at least cred_expire, which must be longer than
# KillWait + 2 s: else the end of the last attempt kills a step of the next attempt, which has the same number.
CONFIGURATION = """\
ClusterName=local
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
MailProg=/bin/true
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/munge.sock,cred_expire=8
FirstJobId={first_job}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/%n.log
PlugStackConfig=/dev/null
SlurmdTimeout=6
MessageTimeout=5
BatchStartTimeout=10
KillWait=3
JobRequeue=1
MinJobAge=3600
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=2
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/log/jobs.txt
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
GresTypes=gpu
{nodes}
PartitionName=main Nodes=node[1-{count}] Default=YES MaxTime=INFINITE DefaultTime=60 PriorityTier=1 GraceTime=10
PartitionName=urgent Nodes=node[1-{count}] MaxTime=INFINITE PriorityTier=100 PreemptMode=OFF
"""
NODE = (
    "NodeName={name} NodeHostname={host} NodeAddr={address} Port={port} CPUs={cores} Sockets=1 CoresPerSocket={cores} "
    "ThreadsPerCore=1 RealMemory=4096 Gres=gpu:{gpus} State=UNKNOWN"
)


class ClusterError(Exception):
    """The cluster cannot be started, or does not reach the requested state."""


def why_not() -> str | None:
    """The reason why this machine cannot run a cluster; None if it can."""
    if not sys.platform.startswith("linux"):
        return "Slurm's daemons need Linux"
    if missing := [program for program in PROGRAMS if shutil.which(program, path=_path()) is None]:
        return f"{', '.join(missing)} not found: {INSTALL}"
    return None if os.geteuid() == 0 else "nodes need root to have their own hostnames"


class Cluster:
    """The cluster of a folder, started or not. munge needs all parent folders to be open to others (o+x).

    Raises ClusterError if another user may change the folder, since its files tell daemons of root what to run.
    """

    def __init__(self, folder: Path) -> None:
        _refuse_strangers(folder)
        self.folder = folder.resolve()
        self.configuration = self.folder / "slurm.conf"
        self.environment = {**os.environ, "SLURM_CONF": str(self.configuration), "PATH": _path()}

    @property
    def nodes(self) -> list[str]:
        return [line.split()[1] for line in (self.folder / "hosts").read_text().splitlines() if " node" in line]

    def start(self, num_nodes: int) -> None:
        """Start a new cluster without jobs. Stops an earlier one. Raises ClusterError."""
        if reason := why_not():
            raise ClusterError(reason)
        self.stop()
        for name in ("state", "spool", "run", "log", "munge", "gpus"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        _refuse_strangers(self.folder)  # another user may just have made it
        for folder in (self.folder, self.folder / "munge"):
            folder.chmod(0o755)
        self._configure(num_nodes)
        self._start_munge()
        self.start_controller(clean=True)
        for node in self.nodes:
            self.start_node(node)
        self._wait("the nodes", self._idle)

    def ask(self, *command: str) -> list[str]:
        """The lines that a Slurm client prints; none if it fails, or blocks for 5 s because the controller is down."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            run = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=5, check=False)
            return run.stdout.splitlines() if run.returncode == 0 else []
        return []

    def start_controller(self, clean: bool = False) -> None:
        """Start slurmctld. clean: without the jobs of the last one."""
        self._run("slurmctld", *(["-c"] if clean else []), "-f", str(self.configuration))
        self._wait("slurmctld", lambda: any("is UP" in line for line in self.ask("scontrol", "ping")))

    def kill_controller(self) -> None:
        _end([pid for pid in self._processes() if _name(pid) == "slurmctld"], signal.SIGKILL)

    def start_node(self, node: str) -> None:
        """Start a node's slurmd, in namespaces with its own hostname and /etc/hosts."""
        (self.folder / "spool" / node).mkdir(exist_ok=True)
        inside = (
            f"mount --bind {self.folder}/hosts /etc/hosts && hostname {node} && exec slurmd -f {self.configuration}"
        )
        self._run("unshare", "--mount", "--uts", "--propagation", "slave", "bash", "-c", f"{inside} -N {node}")

    def crash(self, node: str) -> None:
        """Kill all processes of a node: slurmd, Slurm's other processes and those of jobs."""
        _end(self.processes_of(node), signal.SIGKILL)

    def processes_of(self, node: str) -> list[str]:
        """The process ids of a node. Raises ClusterError if the node does not run."""
        file = self.folder / "run" / f"{node}.pid"
        namespace = _namespace(file.read_text().strip()) if file.exists() else None
        if namespace is None:
            raise ClusterError(f"{node} does not run")
        return [pid for pid in self._processes() if _namespace(pid) == namespace]

    def mend(self) -> None:
        """End all jobs, and restart the controller and the nodes that do not run."""
        if not any(_name(pid) == "slurmctld" for pid in self._processes()):
            self.start_controller()
        self.ask("scancel", "--user", "root")
        for node in self.nodes:
            if not self._runs(node):
                self.start_node(node)
            self.ask("scontrol", "update", f"NodeName={node}", "State=RESUME")
        self._wait("the nodes", self._idle)

    def stop(self) -> None:
        """End all jobs and all processes of the cluster. Its log files stay."""
        if not self.configuration.exists():
            return
        if self.ask("squeue", "-h"):
            self.ask("scancel", "--user", "root")
            with contextlib.suppress(ClusterError):
                self._wait("the end of all jobs", lambda: not self.ask("squeue", "-h"), seconds=10)
        for number in (signal.SIGTERM, signal.SIGKILL):
            _end(list(self._processes()), number)
        for name in ("state", "spool", "run"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        self.configuration.unlink()

    def _idle(self) -> bool:
        states = self.ask("sinfo", "-h", "-N", "-p", "main", "-o", "%T")
        return states == ["idle"] * len(self.nodes) and not self.ask("squeue", "-h")

    def _runs(self, node: str) -> bool:
        with contextlib.suppress(ClusterError):
            return bool(self.processes_of(node))
        return False

    def _configure(self, num_nodes: int) -> None:
        host, names = socket.gethostname().split(".")[0], [f"node{number + 1}" for number in range(num_nodes)]
        addresses = {name: f"127.77.0.{number + 1}" for number, name in enumerate(names)}
        hosts = ["127.0.0.1 localhost", f"127.0.0.1 {host}", *(f"{addresses[name]} {name}" for name in names)]
        (self.folder / "hosts").write_text("\n".join(hosts) + "\n")
        for number in range(GPUS):
            (self.folder / "gpus" / f"gpu{number}").touch()
        gpus = f"NodeName=node[1-{num_nodes}] Name=gpu File={self.folder}/gpus/gpu[0-{GPUS - 1}]\n"
        (self.folder / "gres.conf").write_text(gpus)
        port, *ports = _free_ports(num_nodes + 1)
        lines = [
            NODE.format(name=name, host=host, address=addresses[name], port=node_port, cores=CORES, gpus=GPUS)
            for name, node_port in zip(names, ports, strict=True)
        ]
        # A job's number determines the port where its processes meet: clusters on one machine must not share numbers.
        text = CONFIGURATION.format(
            host=host, port=port, folder=self.folder, nodes="\n".join(lines), count=num_nodes,
            first_job=random.randrange(1_000, 60_000),
        )  # fmt: skip
        self.configuration.write_text(text)

    def _start_munge(self) -> None:
        key = self.folder / "munge" / "munge.key"
        if not key.exists():
            key.touch(0o600)
            key.write_bytes(os.urandom(1024))
        folder = self.folder / "munge"
        files = {
            "socket": "munge.sock",
            "key-file": key.name,
            "pid-file": "pid",
            "log-file": "log",
            "seed-file": "seed",
        }
        self._run("munged", *(f"--{option}={folder / name}" for option, name in files.items()))

    def _run(self, *command: str) -> None:
        """Start a daemon. The command returns once the daemon is in the background."""
        with open(self.folder / "log" / "starts.log", "a") as log:
            run = subprocess.run(command, env=self.environment, stdout=log, stderr=log, timeout=30, check=False)
        if run.returncode:
            raise ClusterError(f"{command[0]} does not start; see {self.folder / 'log'}")

    def _wait(self, what: str, ready: Callable[[], bool], seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not ready():
            if time.monotonic() > deadline:
                raise ClusterError(f"waited {seconds:g} s for {what}; see {self.folder / 'log'}")
            time.sleep(0.05)

    def _processes(self) -> Iterator[str]:
        """The process ids of the cluster.

        They are the daemons whose command line names the cluster's folder, and processes in a node's namespace whose
        command line or environment names it.
        """
        mark, outside = os.fsencode(self.folder) + b"/", _namespace("self")
        for pid in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes()
                daemon = _name(pid) in PROGRAMS and mark in words
                guest = _namespace(pid) not in (outside, None)
                if daemon or (guest and mark in words + Path(f"/proc/{pid}/environ").read_bytes()):
                    yield pid


def _refuse_strangers(folder: Path) -> None:
    """Raise ClusterError if others than this user and root may change the folder or one of its parents."""
    path = Path(os.path.abspath(folder))
    for place in dict.fromkeys([*reversed(path.parents), path, *reversed(path.resolve().parents), path.resolve()]):
        try:
            status = place.lstat()
        except FileNotFoundError:
            continue
        is_link, sticky = stat.S_ISLNK(status.st_mode), status.st_mode & stat.S_ISVTX and place != path.resolve()
        open_to_others = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not is_link and not sticky
        if status.st_uid not in (0, os.geteuid()) or open_to_others:
            raise ClusterError(f"{place} may be changed by others: choose a --folder whose path only you can change")


def _path() -> str:
    """PATH with the folders of daemons, which Debian puts only on root's path."""
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def _name(pid: str) -> str:
    return Path(f"/proc/{pid}/comm").read_text().strip()


def _namespace(pid: str) -> str | None:
    """The hostname (UTS) namespace of a process; each node has its own. None if the process has ended."""
    try:
        return os.readlink(f"/proc/{pid}/ns/uts")
    except OSError:
        return None


def _alive(pid: str) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def _end(pids: list[str], number: signal.Signals) -> None:
    """Send a signal to processes, and wait up to 5 s until they end."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), number)
    deadline = time.monotonic() + 5
    while any(map(_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("", 0))
        return [one.getsockname()[1] for one in sockets]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="the folder of the cluster; default: %(default)s")
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("start", help="start a new cluster; prints the settings of a shell that uses it").add_argument(
        "--nodes", type=int, default=2
    )
    actions.add_parser("stop", help="end the cluster and all its jobs")
    actions.add_parser("crash", help="kill a node").add_argument("number", type=int)
    actions.add_parser("node", help="start a node again").add_argument("number", type=int)
    options = parser.parse_args(argv)
    try:
        cluster = Cluster(options.folder)
        if options.action == "start":
            cluster.start(options.nodes)
            print(f"export SLURM_CONF={shlex.quote(str(cluster.configuration))}")
        elif options.action == "stop":
            cluster.stop()
        else:
            {"crash": cluster.crash, "node": cluster.start_node}[options.action](f"node{options.number}")
    except ClusterError as error:
        print(f"local_slurm: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
