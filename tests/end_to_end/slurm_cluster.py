"""A real SLURM cluster on this machine, with its own key, ports and folder, without systemd and /etc.

munged <- slurmctld <- slurmd for each node, all on 127.0.0.1. As on many clusters, node names do not resolve.
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

# Program -> Debian package (tests/install_system_packages.sh).
DAEMONS = {"slurmctld": "slurmctld", "slurmd": "slurmd", "srun": "slurm-client", "munged": "munge"}
SECONDS_TO_START = 60
# SLURM declares a node lost after this time without an answer. It is long, for tests that lose no node.
SECONDS_TO_LOSE_A_NODE = 300

CONFIG = """
ClusterName=onemachine
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
AuthType=auth/munge
# With a short lifetime of credentials, a requeued job starts after seconds instead of minutes.
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
# Jobs in this partition preempt the jobs of the other.
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2
"""


class SlurmCluster:
    """Nodes with four processors and `gpus` GPUs each; the GPUs are empty files, which torch does not see."""

    def __init__(
        self, *, nodes: int = 2, gpus: int = 2, seconds_to_lose_a_node: int = SECONDS_TO_LOSE_A_NODE
    ) -> None:
        self.nodes = [f"node{number}" for number in range(1, nodes + 1)]
        # The socket of munge needs a short path and a folder that other users can enter.
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
        # --force: munged otherwise refuses a socket below /tmp, which all users can write to.
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
        """Start the daemon of a node, also of one that was lost."""
        self._call("slurmd", "-N", node)

    def kill_daemon(self, node: str) -> None:
        """Kill the daemon of a node: its processes keep running, and SLURM loses contact with them."""
        os.kill(int((self.folder / f"slurmd.{node}.pid").read_text()), signal.SIGKILL)

    def kill_node(self, node: str) -> None:
        """Kill all processes of a node, like a power failure: its daemon, step managers and their tasks."""
        self.kill_daemon(node)
        tasks = processes_with(SLURM_CONF=self.environment["SLURM_CONF"], SLURMD_NODENAME=node)
        managers = {parent for task in tasks if (parent := _find_step_manager(task)) is not None}
        # Managers first, because they would report the end of their tasks.
        for pid in (*managers, *tasks):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def stop(self) -> None:
        """Cancel all jobs, end the daemons, and wait for them."""
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
        """Return daemons and jobs: the processes with this folder in their environment or command."""
        mark, pids = str(self.folder).encode(), []
        for process in Path("/proc").iterdir():
            if process.name.isdigit() and int(process.name) != os.getpid():
                with contextlib.suppress(OSError):
                    if mark in (process / "environ").read_bytes() + (process / "cmdline").read_bytes():
                        pids.append(int(process.name))
        return pids

    def call(self, *command: str, check: bool = True, timeout: float = 60, **environment: str) -> str:
        """Run a client command and return its output; the time limit is needed because srun can hang."""
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
        """Return the state of a job or array task, such as COMPLETED."""
        fields = dict(
            field.split("=", 1) for field in self.call("scontrol", "show", "job", job).split() if "=" in field
        )
        return fields["JobState"]

    def wait_for(self, job: str, *states: str, seconds: float) -> str:
        """Wait until the job is in one of `states`, and return its state."""
        self.wait_until(lambda: self.state(job) in states, job, seconds=seconds)
        return self.state(job)

    def wait_until(self, condition: Callable[[], object], job: str, *, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
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
        # Debian's daemons are in folders that a user's PATH may not contain.
        path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
        # The output goes to a file, because a daemon would keep a pipe open.
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


def _find_step_manager(task: int) -> int | None:
    """Return the parent of a task if it is a slurmstepd, which starts the tasks of a job step."""
    with contextlib.suppress(OSError):
        _, parent, *_ = Path(f"/proc/{task}/stat").read_text().rpartition(")")[2].split()
        if Path(f"/proc/{parent}/comm").read_text() == "slurmstepd\n":
            return int(parent)
    return None


def missing_for_slurm() -> str | None:
    """Return what this machine lacks for a cluster; None if it lacks nothing."""
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
    """Return free ports below the range from which the kernel assigns ports.

    The port of a lost node must still be free when the node returns.
    """
    ports: list[int] = []
    for port in random.sample(range(10_000, 20_000), 1_000):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            ports.append(port)
        if len(ports) == number:
            return ports
    raise AssertionError("no free ports")
