"""Two names that ssh leads to, both on this machine: an sshd of the tests' own at 127.0.0.11 and .12."""

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


def lacking_for_ssh() -> str | None:
    """What this machine lacks for two hosts; None: nothing."""
    return lacking(PROGRAMS, needs_root=True)


@contextlib.contextmanager
def running_hosts() -> Iterator[dict[str, str]]:
    """Environment in which `ssh node1`, `ssh node2` and pdsh lead to them, and HOSTFILE names them."""
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
    Path("/run/sshd").mkdir(exist_ok=True)  # where it confines what has not logged in yet
    sshd = shutil.which("sshd", path=PATH)
    assert sshd is not None
    _call(sshd, "-f", str(folder / "sshd_config"))
    pid_file = folder / "sshd.pid"
    try:
        _wait_until(pid_file.exists)
        yield {"PATH_OF_SSH": str(ssh.parent), "HOSTFILE": str(folder / "hostfile")}
    finally:
        os.kill(int(pid_file.read_text()), signal.SIGTERM)
        # It removes the file by itself, as its last act.
        _wait_until(lambda: not pid_file.exists())
        shutil.rmtree(folder)


def _wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def _call(*command: str) -> None:
    subprocess.run(command, check=True, timeout=60)
