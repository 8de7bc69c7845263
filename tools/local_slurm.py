"""A real Slurm cluster of virtual nodes on this one machine, to try batch scripts on and to test them with.

    eval "$(python tools/local_slurm.py start --nodes 2)"    # sets SLURM_CONF: sbatch, squeue, srun now talk to it
    python tools/local_slurm.py crash 2                      # node2 loses its slurmd and all that runs there
    python tools/local_slurm.py node 2                       # and comes back
    python tools/local_slurm.py stop

Nodes are called node1, node2 and so on. Each is a slurmd with a hostname, an address and a list of hosts of its own, 64
cores and 8 GPUs, which are empty files: Slurm hands them out, CUDA sees none. There are two partitions: `main`, and
`urgent`, whose jobs take the nodes of others. It needs root on Linux and Debian's packages slurmctld, slurmd,
slurm-client and munge.
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
FOLDER = Path("/var/lib/sleeptrain-slurm")  # where nobody but root can put another one first
CORES, GPUS = 64, 8
# Times are short, so that little is waited for. cred_expire is how long a job that is requeued is held back at least;
# it must be longer than KillWait + 2 s, or what is left of an attempt ends the step of the next, which has its number.
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
    """The cluster cannot be started, or has not come to be what was asked for."""


def why_not() -> str | None:
    """What keeps this machine from having a cluster; None where nothing does."""
    if not sys.platform.startswith("linux"):
        return "Slurm's daemons need Linux"
    if missing := [program for program in PROGRAMS if shutil.which(program, path=_path()) is None]:
        return f"{', '.join(missing)} not found: {INSTALL}"
    return None if os.geteuid() == 0 else "nodes with hostnames of their own need root"


class Cluster:
    """The cluster that lives in a folder, started or not. munge wants all folders above it open to others (o+x).

    Raises ClusterError for a folder that somebody else may change: daemons of root are told by its files what to run.
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
        """A new cluster, with no jobs; one that was there is stopped. Raises ClusterError."""
        if reason := why_not():
            raise ClusterError(reason)
        self.stop()
        for name in ("state", "spool", "run", "log", "munge", "gpus"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        _refuse_strangers(self.folder)  # it may have been put there a moment ago
        for folder in (self.folder, self.folder / "munge"):
            folder.chmod(0o755)
        self._configure(num_nodes)
        self._start_munge()
        self.start_controller(clean=True)
        for node in self.nodes:
            self.start_node(node)
        self._wait("the nodes", self._idle)

    def ask(self, *command: str) -> list[str]:
        """The lines that a client of Slurm prints; none where it fails. Without its controller it blocks for long."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=5, check=False)
            return done.stdout.splitlines() if done.returncode == 0 else []
        return []

    def start_controller(self, clean: bool = False) -> None:
        """clean: it forgets all jobs."""
        self._run("slurmctld", *(["-c"] if clean else []), "-f", str(self.configuration))
        self._wait("slurmctld", lambda: any("is UP" in line for line in self.ask("scontrol", "ping")))

    def kill_controller(self) -> None:
        _end([pid for pid in self._processes() if _name(pid) == "slurmctld"], signal.SIGKILL)

    def start_node(self, node: str) -> None:
        """The node's slurmd, in namespaces in which the hostname and /etc/hosts are its own."""
        (self.folder / "spool" / node).mkdir(exist_ok=True)
        inside = (
            f"mount --bind {self.folder}/hosts /etc/hosts && hostname {node} && exec slurmd -f {self.configuration}"
        )
        self._run("unshare", "--mount", "--uts", "--propagation", "slave", "bash", "-c", f"{inside} -N {node}")

    def crash(self, node: str) -> None:
        """Kills all that runs on a node at once: slurmd, Slurm's other processes, the jobs'."""
        _end(self.processes_of(node), signal.SIGKILL)

    def processes_of(self, node: str) -> list[str]:
        """Raises ClusterError for a node that does not run."""
        file = self.folder / "run" / f"{node}.pid"
        here = _namespace(file.read_text().strip()) if file.exists() else None
        if here is None:
            raise ClusterError(f"{node} does not run")
        return [pid for pid in self._processes() if _namespace(pid) == here]

    def mend(self) -> None:
        """Ends all jobs and brings back what is not as it was after the start."""
        if not any(_name(pid) == "slurmctld" for pid in self._processes()):
            self.start_controller()
        self.ask("scancel", "--user", "root")
        for node in self.nodes:
            if not self._runs(node):
                self.start_node(node)
            self.ask("scontrol", "update", f"NodeName={node}", "State=RESUME")
        self._wait("the nodes", self._idle)

    def stop(self) -> None:
        """Ends all jobs and everything that the cluster has started. Its log files stay."""
        if not self.configuration.exists():
            return
        if self.ask("squeue", "-h"):
            self.ask("scancel", "--user", "root")
            with contextlib.suppress(ClusterError):
                self._wait("the jobs' end", lambda: not self.ask("squeue", "-h"), seconds=10)
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
            NODE.format(name=name, host=host, address=addresses[name], port=its_port, cores=CORES, gpus=GPUS)
            for name, its_port in zip(names, ports, strict=True)
        ]
        # A job's number is in the port where its processes meet: two clusters on a machine must not share it.
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
        where = self.folder / "munge"
        files = {
            "socket": "munge.sock",
            "key-file": key.name,
            "pid-file": "pid",
            "log-file": "log",
            "seed-file": "seed",
        }
        self._run("munged", *(f"--{option}={where / name}" for option, name in files.items()))

    def _run(self, *command: str) -> None:
        """A daemon's start, which returns once it is one."""
        with open(self.folder / "log" / "starts.log", "a") as log:
            done = subprocess.run(command, env=self.environment, stdout=log, stderr=log, timeout=30, check=False)
        if done.returncode:
            raise ClusterError(f"{command[0]} does not start; see {self.folder / 'log'}")

    def _wait(self, what: str, ready: Callable[[], bool], seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not ready():
            if time.monotonic() > deadline:
                raise ClusterError(f"waited {seconds:g} s for {what}; see {self.folder / 'log'}")
            time.sleep(0.05)

    def _processes(self) -> Iterator[str]:
        """The cluster's own: its daemons name its folder, and what runs on a node has the node's namespace besides."""
        mark, outside = os.fsencode(self.folder) + b"/", _namespace("self")
        for pid in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes()
                daemon = _name(pid) in PROGRAMS and mark in words
                guest = _namespace(pid) not in (outside, None)
                if daemon or (guest and mark in words + Path(f"/proc/{pid}/environ").read_bytes()):
                    yield pid


def _refuse_strangers(folder: Path) -> None:
    """Raises ClusterError unless this user or root alone may change the folder and all that leads to it."""
    named = Path(os.path.abspath(folder))
    for place in dict.fromkeys([*reversed(named.parents), named, *reversed(named.resolve().parents), named.resolve()]):
        try:
            found = place.lstat()
        except FileNotFoundError:
            continue
        is_link, sticky = stat.S_ISLNK(found.st_mode), found.st_mode & stat.S_ISVTX and place != named.resolve()
        open_to_others = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not is_link and not sticky
        if found.st_uid not in (0, os.geteuid()) or open_to_others:
            raise ClusterError(f"{place} may be changed by others: give --folder one of your own, all the way down")


def _path() -> str:
    """Debian keeps daemons where only root's shells look."""
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def _name(pid: str) -> str:
    return Path(f"/proc/{pid}/comm").read_text().strip()


def _namespace(pid: str) -> str | None:
    """That of the hostname: each node has its own. None of a process that has gone."""
    try:
        return os.readlink(f"/proc/{pid}/ns/uts")
    except OSError:
        return None


def _alive(pid: str) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def _end(pids: list[str], number: signal.Signals) -> None:
    """Sends the signal, and waits up to 5 s for their end."""
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
    parser.add_argument("--folder", type=Path, default=FOLDER, help="the cluster's own files; default: %(default)s")
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("start", help="a new cluster; prints what a shell needs to use it").add_argument(
        "--nodes", type=int, default=2
    )
    actions.add_parser("stop", help="end it and all its jobs")
    actions.add_parser("crash", help="a node dies").add_argument("number", type=int)
    actions.add_parser("node", help="a node comes back").add_argument("number", type=int)
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
