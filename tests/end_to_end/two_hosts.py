"""Two host names for ssh, both on this machine: the tests start an sshd at 127.0.0.11 and 127.0.0.12."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.end_to_end.nodes import free_port
from tests.system_packages import PATH, lacking

PROGRAMS = {"sshd": "openssh-server", "ssh": "openssh-client", "pdsh": "pdsh"}
ADDRESSES = {"node1": "127.0.0.11", "node2": "127.0.0.12"}

SERVER = """
Port {port}
ListenAddress 127.0.0.11
ListenAddress 127.0.0.12
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/user_key.pub
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin prohibit-password
PidFile {folder}/sshd.pid
"""
CLIENT = """
Host node1
  HostName 127.0.0.11
Host node2
  HostName 127.0.0.12
Host node1 node2
  Port {port}
  IdentityFile {folder}/user_key
  IdentitiesOnly yes
  StrictHostKeyChecking no
  UserKnownHostsFile {folder}/known_hosts
  LogLevel ERROR
"""


def missing_for_ssh() -> str | None:
    """Return what this machine lacks for two hosts; None if it lacks nothing."""
    return lacking(PROGRAMS, needs_root=True)


@contextlib.contextmanager
def running_hosts() -> Iterator[dict[str, str]]:
    """Start sshd, and yield a PATH entry for ssh that reaches both hosts and a HOSTFILE that names them."""
    folder = Path(tempfile.mkdtemp(prefix="hosts-"))
    port = free_port()
    for key in ("host_key", "user_key"):
        _call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key))
    (folder / "sshd_config").write_text(SERVER.format(folder=folder, port=port))
    (folder / "ssh_config").write_text(CLIENT.format(folder=folder, port=port))
    (folder / "bin").mkdir()
    ssh = folder / "bin" / "ssh"
    ssh.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/ssh_config "$@"\n')
    ssh.chmod(0o755)
    (folder / "hostfile").write_text("".join(f"{name} slots=1\n" for name in ADDRESSES))
    Path("/run/sshd").mkdir(exist_ok=True)  # sshd's chroot for connections that are not authenticated
    sshd = shutil.which("sshd", path=PATH)
    assert sshd is not None
    _call(sshd, "-f", str(folder / "sshd_config"))
    pid_file = folder / "sshd.pid"
    try:
        _wait_until(pid_file.exists)
        yield {"PATH_OF_SSH": str(ssh.parent), "HOSTFILE": str(folder / "hostfile")}
    finally:
        os.kill(int(pid_file.read_text()), signal.SIGTERM)
        # sshd removes the file when it exits.
        _wait_until(lambda: not pid_file.exists())
        shutil.rmtree(folder)


def _wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def _call(*command: str) -> None:
    subprocess.run(command, check=True, timeout=60)
