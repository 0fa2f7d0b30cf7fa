"""Tests that devices which NCCL cannot or may not use are reported, on a copy of the kernel's folders."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from sas_megatron.preflight.finding import Severity
from sas_megatron.preflight.infiniband import check_infiniband


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """Return folders as on a node with two active ConnectX devices and one without a link."""
    for name, state in (("mlx5_0", "4: ACTIVE"), ("mlx5_1", "4: ACTIVE"), ("mlx5_2", "1: DOWN")):
        port = tmp_path / "system" / name / "ports" / "1"
        port.mkdir(parents=True)
        (port / "state").write_text(f"{state}\n")
    (tmp_path / "devices").mkdir()
    for number in range(3):
        (tmp_path / "devices" / f"uverbs{number}").touch()
    return {"system": tmp_path / "system", "device_files": tmp_path / "devices"}


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """Compile stand-ins for libibverbs that find a number of devices, of which CI machines have none."""
    folder = tmp_path_factory.mktemp("libraries")
    (folder / "verbs.c").write_text(
        "static void *list[4];\n"
        "void **ibv_get_device_list(int *count) { *count = FOUND; return list; }\n"
        "void ibv_free_device_list(void **devices) { }\n"
    )
    for found in (0, 1, 3):
        output = folder / f"libibverbs_{found}.so"
        command = ["gcc", "-shared", "-fPIC", f"-DFOUND={found}", "-o", str(output), str(folder / "verbs.c")]
        subprocess.run(command, check=True, timeout=60)
    return {found: str(folder / f"libibverbs_{found}.so") for found in (0, 1, 3)}


def test_usable_devices_are_listed(folders: dict[str, Path], library: dict[int, str]) -> None:
    (found,) = check_infiniband({}, **folders, library=library[3])
    assert (found.verdict, found.observed) == (Severity.FINE, "mlx5_0, mlx5_1, which NCCL can use")


def test_a_node_without_active_devices_has_no_finding(tmp_path: Path, folders: dict[str, Path]) -> None:
    assert not list(check_infiniband({}, system=tmp_path / "nothing", device_files=tmp_path))
    for state in folders["system"].glob("*/ports/*/state"):
        state.write_text("2: INIT\n")
    assert not list(check_infiniband({}, **folders))


@pytest.mark.parametrize("found", [0, 1])
def test_devices_without_provider_are_reported(
    folders: dict[str, Path], library: dict[int, str], found: int
) -> None:
    (problem,) = check_infiniband({}, **folders, library=library[found])
    assert problem.verdict == Severity.WARNING
    assert f"finds {found} of 2 devices (mlx5_0, mlx5_1): the others have no provider" in problem.observed
    assert "install ibverbs-providers" in problem.remedy


def test_a_missing_library_and_missing_device_files_are_reported(
    tmp_path: Path, folders: dict[str, Path], library: dict[int, str]
) -> None:
    (problem,) = check_infiniband({}, **folders, library=str(tmp_path / "libibverbs.so.1"))
    assert "cannot be loaded, so NCCL uses sockets" in problem.observed
    assert "libibverbs1 and ibverbs-providers" in problem.remedy
    (problem,) = check_infiniband(
        {}, system=folders["system"], device_files=tmp_path / "nothing", library=library[3]
    )
    assert "has no uverbs files, so NCCL uses sockets" in problem.observed
    assert "--device /dev/infiniband" in problem.remedy


@pytest.mark.parametrize(
    ("variable", "value", "is_reported"),
    [
        ("NCCL_NET", "Socket", True),
        ("NCCL_NET", "socket", True),
        ("NCCL_NET", "IB", False),
        ("NCCL_IB_DISABLE", "1", True),
        ("NCCL_IB_DISABLE", "0", False),
        # NCCL's documentation: prefixes, ^ to exclude, = for complete names, ports after a colon
        ("NCCL_IB_HCA", "mlx5", False),
        ("NCCL_IB_HCA", "mlx5_1:1,mlx5_7", False),
        ("NCCL_IB_HCA", "=mlx5", True),
        ("NCCL_IB_HCA", "=mlx5_0", False),
        ("NCCL_IB_HCA", "mlx4", True),
        ("NCCL_IB_HCA", "^mlx5", True),
        ("NCCL_IB_HCA", "^=mlx5_0", False),
    ],
)
def test_variables_that_keep_nccl_on_sockets_are_reported(
    folders: dict[str, Path], library: dict[int, str], variable: str, value: str, is_reported: bool
) -> None:
    (found,) = check_infiniband({variable: value}, **folders, library=library[3])
    assert found.verdict == (Severity.WARNING if is_reported else Severity.FINE)
    if is_reported:
        assert f"{variable}={value.capitalize() if variable == 'NCCL_NET' else value}" in found.observed
        assert f"unset {variable}" in found.remedy
