"""A real SLURM cluster on this machine alone: its own key, ports and folder, no systemd, nothing in /etc.

munged <- slurmctld <- slurmd for each node, all on 127.0.0.1; node names do not resolve, as on many clusters.
"""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.end_to_end.started_processes import processes_with
from tests.system_packages import lacking

# One debian package each (tests/install_system_packages.sh).
DAEMONS = {"slurmctld": "slurmctld", "slurmd": "slurmd", "srun": "slurm-client", "munged": "munge"}
SECONDS_TO_START = 60
# After so long without an answer a node is lost; long where none is to be, on a busy machine.
SECONDS_TO_LOSE_A_NODE = 300

CONFIG = """
ClusterName=onemachine
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
AuthType=auth/munge
# A short life of credentials brings a requeued job back in seconds instead of minutes.
AuthInfo=socket={folder}/munge/socket,cred_expire=5
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=2,sched_min_interval=0,batch_sched_delay=0
ReturnToService=2
KillWait=30
SlurmdTimeout={seconds_to_lose_a_node}
MinJobAge=300
PropagateResourceLimits=NONE
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdSpoolDir={folder}/spool/%n
StateSaveLocation={folder}/state
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SlurmdParameters=config_overrides
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1
# What is submitted there takes the nodes from jobs of the other.
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2
"""


class SlurmCluster:
    """Nodes of four processors, each with `gpus` files that stand for GPUs to SLURM, not to torch."""

    def __init__(
        self, *, nodes: int = 2, gpus: int = 2, seconds_to_lose_a_node: int = SECONDS_TO_LOSE_A_NODE
    ) -> None:
        self.nodes = [f"node{number}" for number in range(1, nodes + 1)]
        # munge's socket wants a short path, and a folder that others can enter.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.folder.chmod(0o755)
        for name in ("state", "log", "munge", "spool", "gpus"):
            (self.folder / name).mkdir()
        self._write_config(gpus, seconds_to_lose_a_node)
        self.environment = {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def start(self) -> None:
        munge = self.folder / "munge"
        key = munge / "key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        # --force: it otherwise refuses a socket below /tmp, which all may write to.
        options = [f"--{name}={munge / name}" for name in ("socket", "pid-file", "log-file", "seed-file")]
        self._call("munged", "--force", f"--key-file={key}", "--num-threads=2", *options)
        self._call("slurmctld")
        for node in self.nodes:
            self.start_node(node)
        deadline = time.monotonic() + SECONDS_TO_START
        while self.call("sinfo", "-h", "-N", "--partition=main", "-o", "%T").split() != ["idle"] * len(
            self.nodes
        ):
            assert time.monotonic() < deadline, self.logs()
            time.sleep(0.2)

    def start_node(self, node: str) -> None:
        """Also brings one back that was lost."""
        self._call("slurmd", "-N", node)

    def kill_daemon(self, node: str) -> None:
        """What runs on the node goes on, and SLURM no longer knows."""
        os.kill(int((self.folder / f"slurmd.{node}.pid").read_text()), signal.SIGKILL)

    def kill_node(self, node: str) -> None:
        """As by a power cut: its daemon, the keepers of its job steps, and all that they have started."""
        self.kill_daemon(node)
        tasks = processes_with(SLURM_CONF=self.environment["SLURM_CONF"], SLURMD_NODENAME=node)
        keepers = {parent for task in tasks if (parent := _keeper_of(task)) is not None}
        # First those who would tell of the others.
        for pid in (*keepers, *tasks):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def stop(self) -> None:
        """Cancels what runs, ends the daemons, and waits for them."""
        with contextlib.suppress(subprocess.SubprocessError):
            self.call("scancel", "--user=root")
            deadline = time.monotonic() + 60
            while self.call("squeue", "-h") and time.monotonic() < deadline:
                time.sleep(0.2)
        for number in (signal.SIGTERM, signal.SIGKILL):
            deadline = time.monotonic() + 15
            while (processes := self.processes()) and time.monotonic() < deadline:
                for pid in processes:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, number)
                time.sleep(0.2)
        assert not self.processes()
        shutil.rmtree(self.folder)

    def processes(self) -> list[int]:
        """Those that have this cluster's folder in their environment or command: daemons, and their jobs."""
        mark, found = str(self.folder).encode(), []
        for process in Path("/proc").iterdir():
            if process.name.isdigit() and int(process.name) != os.getpid():
                with contextlib.suppress(OSError):
                    if mark in (process / "environ").read_bytes() + (process / "cmdline").read_bytes():
                        found.append(int(process.name))
        return found

    def call(self, *command: str, check: bool = True, timeout: float = 60, **environment: str) -> str:
        """A client's output. Every call has a time limit: srun may wait for ever."""
        done = subprocess.run(
            command,
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert done.returncode == 0 or not check, done.stdout + done.stderr + self.logs()
        return done.stdout.strip()

    def state(self, job: str) -> str:
        """Of a job or a member of an array, such as COMPLETED."""
        fields = dict(
            field.split("=", 1) for field in self.call("scontrol", "show", "job", job).split() if "=" in field
        )
        return fields["JobState"]

    def wait_for(self, job: str, *states: str, seconds: float) -> str:
        """The first of `states` that the job is in."""
        self.wait_until(lambda: self.state(job) in states, job, seconds=seconds)
        return self.state(job)

    def wait_until(self, holds: Callable[[], object], job: str, *, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < deadline, f"{self.call('scontrol', 'show', 'job', job)}\n{self.logs()}"
            time.sleep(0.3)

    def logs(self) -> str:
        files = sorted((self.folder / "log").iterdir())
        return "\n".join(f"--- {path.name}\n{path.read_text()[-3000:]}" for path in files)

    def _write_config(self, gpus: int, seconds_to_lose_a_node: int) -> None:
        port, *node_ports = _free_ports(1 + len(self.nodes))
        values = {"folder": self.folder, "port": port, "seconds_to_lose_a_node": seconds_to_lose_a_node}
        lines = [CONFIG.format(**values)]
        for node, node_port in zip(self.nodes, node_ports, strict=True):
            (self.folder / "spool" / node).mkdir()
            lines.append(
                f"NodeName={node} NodeHostname=localhost NodeAddr=127.0.0.1 Port={node_port} CPUs=4 "
                f"RealMemory=8000 Gres=gpu:{gpus}"
            )
        (self.folder / "slurm.conf").write_text("\n".join(lines) + "\n")
        for number in range(gpus):
            (self.folder / "gpus" / f"nvidia{number}").touch()
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpus/nvidia[0-{gpus - 1}]\n")

    def _call(self, *daemon: str) -> None:
        # A daemon of Debian lies where a user's PATH may not lead.
        path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
        # Its output to a file: it would hold a pipe open.
        with (self.folder / "log" / f"{daemon[0]}.start").open("a") as output:
            done = subprocess.run(
                daemon,
                env={**self.environment, "PATH": path},
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=60,
                check=False,
            )
        assert done.returncode == 0, self.logs()


def _keeper_of(task: int) -> int | None:
    """The process by which a node's daemon has started a task of a job, if it is that task's parent."""
    with contextlib.suppress(OSError):
        _, parent, *_ = Path(f"/proc/{task}/stat").read_text().rpartition(")")[2].split()
        if Path(f"/proc/{parent}/comm").read_text() == "slurmstepd\n":
            return int(parent)
    return None


def lacking_for_slurm() -> str | None:
    """What this machine lacks for a cluster; None: nothing."""
    return lacking(DAEMONS, needs_root=True)


@contextlib.contextmanager
def running_cluster(**options: int) -> Iterator[SlurmCluster]:
    cluster = SlurmCluster(**options)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def _free_ports(number: int) -> list[int]:
    """Below those that the kernel gives away: a lost node's must still be free when it returns."""
    found: list[int] = []
    for port in random.sample(range(10_000, 20_000), 1_000):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == number:
            return found
    raise AssertionError("no free ports")
