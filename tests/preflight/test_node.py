"""Preflight checks of a node under real conditions: limits, mounts, ports, host names."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sas_megatron.config.loading import dump_yaml
from sas_megatron.preflight.finding import Severity
from sas_megatron.preflight.network import judge_host_name
from sas_megatron.preflight.node import check_run_directory, check_shared_memory
from sas_megatron.preflight.software import check_software
from tests.conftest import ROOT
from tests.fork_server import run_command
from tests.run_configs import small_config


def read_findings(completed: subprocess.CompletedProcess[str]) -> tuple[int, dict[str, Any]]:
    """Return the exit status of `doctor`, and its findings by check."""
    assert completed.stdout, completed.stderr
    findings = json.loads(completed.stdout)["findings"]
    return completed.returncode, {found["check"]: found for found in findings}


def doctor(*arguments: object, **environment: str) -> tuple[int, dict[str, Any]]:
    """Run `sas-megatron doctor` in a forked process; return its exit status and findings."""
    return read_findings(
        run_command("doctor", "--json", *arguments, environment={**os.environ, **environment})
    )


def doctor_with_limit(limit: str, *arguments: str, **environment: str) -> tuple[int, dict[str, Any]]:
    """Run `sas-megatron doctor` in a new interpreter after the shell command `limit`."""
    command = f'{limit} && exec {sys.executable} -m sas_megatron doctor --json "$@"'
    completed = subprocess.run(
        ["bash", "-c", command, "doctor", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )
    return read_findings(completed)


def test_a_healthy_node_passes_and_a_wrong_port_limit_and_variable_are_reported(tmp_path: Path) -> None:
    status, found = doctor("--run-directory", str(tmp_path / "new"))
    assert status == 0
    assert {each["verdict"] for each in found.values()} <= {"fine", "warning"}
    assert not list(tmp_path.iterdir()), "the checks must delete their files"

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = str(listener.getsockname()[1])
        status, found = doctor_with_limit(
            *("ulimit -n 50", "--run-directory", str(tmp_path)),
            MASTER_ADDR="localhost",
            MASTER_PORT=port,
            NODE_RANK="0",
            GLOO_SOCKET_IFNAME="eth77",
        )
    assert status == 1
    assert found["rendezvous"]["verdict"] == "failure"
    assert f"MASTER_PORT={port}: is not available on" in found["rendezvous"]["observed"]
    assert found["open files"]["verdict"] == "failure"
    assert "at most 50" in found["open files"]["observed"]
    assert "ulimit -n 1024" in found["open files"]["remedy"]
    assert "GLOO_SOCKET_IFNAME=eth77 is not among lo" in found["interfaces"]["observed"]


def test_an_invalid_config_and_an_unknown_master_are_failures(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(dump_yaml(small_config(logging={"run_directory": str(tmp_path / "run")})))
    status, found = doctor(str(config), MASTER_ADDR="no-such-host.invalid")
    assert status == 1
    assert "does not exist" in found["config"]["observed"]
    assert "no-such-host.invalid: cannot be resolved on" in found["rendezvous"]["observed"]
    assert "address" in found["rendezvous"]["remedy"]


def test_a_host_name_for_loopback_is_a_warning_only_with_several_nodes() -> None:
    two_nodes = {"MASTER_ADDR": "10.0.0.5"}
    found = judge_host_name("node7", "127.0.1.1", two_nodes)
    assert found.verdict == Severity.WARNING
    assert "GLOO_SOCKET_IFNAME" in found.remedy
    for address, environment in [
        ("10.0.0.7", two_nodes),
        ("127.0.1.1", {}),
        ("127.0.1.1", {"MASTER_ADDR": "127.0.0.1"}),
        ("127.0.1.1", {**two_nodes, "GLOO_SOCKET_IFNAME": "eth0"}),
    ]:
        assert judge_host_name("node7", address, environment).verdict == Severity.FINE


@contextlib.contextmanager
def file_system(folder: Path, options: str) -> Iterator[Path]:
    """Mount a file system in memory."""
    if os.geteuid() != 0:
        pytest.skip("lacks root, which is needed to mount a file system")
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True, timeout=30)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True, timeout=30)


def test_a_full_disk_is_a_failure(tmp_path: Path) -> None:
    with file_system(tmp_path / "small", "size=2m") as folder:
        (folder / "filler").write_bytes(bytes(2 * 2**20 - 4096))
        found = {each.check: each for each in check_run_directory(folder / "run")}
    assert found["disk space"].verdict == Severity.FAILURE
    assert "free space" in found["disk space"].remedy


def test_less_space_than_one_checkpoint_needs_is_a_failure(tmp_path: Path) -> None:
    with file_system(tmp_path / "small", "size=2m") as folder:
        enough, short = (
            next(iter(check_run_directory(folder / "run", checkpoint_bytes=size))).verdict
            for size in (600_000, 3_000_000)
        )
    assert (enough, short) == (Severity.WARNING, Severity.FAILURE)


def test_a_read_only_disk_is_a_failure(tmp_path: Path) -> None:
    with file_system(tmp_path / "fixed", "ro") as folder:
        found = {each.check: each for each in check_run_directory(folder / "run")}
    assert found["run directory"].verdict == Severity.FAILURE
    assert "Read-only file system" in found["run directory"].observed


def test_a_file_at_the_path_of_the_run_directory_is_a_failure(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (found,) = check_run_directory(tmp_path / "file" / "run")
    assert found.verdict == Severity.FAILURE


def test_little_shared_memory_is_a_failure_with_gpus_and_a_warning_without(tmp_path: Path) -> None:
    with file_system(tmp_path / "shm", "size=64m") as folder:
        assert check_shared_memory(uses_gpus=True, directory=folder).verdict == Severity.FAILURE
        found = check_shared_memory(uses_gpus=False, directory=folder)
    assert found.verdict == Severity.WARNING
    assert "64 MiB free" in found.observed
    assert "--ipc=host" in found.remedy


def test_a_package_compiled_for_another_torch_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The loader rejects a file that is not a shared library, as it does one with the wrong symbols.
    (tmp_path / "flash_attn.abi3.so").write_bytes(b"\x7fELF" + bytes(60))
    monkeypatch.syspath_prepend(tmp_path)
    found = [each for each in check_software() if each.check == "compiled packages"]
    assert len(found) == 1
    assert "flash_attn is installed but cannot be imported (ImportError" in found[0].observed
    shutil.rmtree(tmp_path)
    assert [each.verdict for each in check_software()] == [Severity.FINE]
