"""Docker images and the compose cluster pass their linters and agree with the launch scripts."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from tests.conftest import ROOT
from tests.end_to_end.test_launching import shell

DOCKERFILES = sorted(path.name for path in (ROOT / "docker").glob("*.Dockerfile"))
COMPOSE_FILES = sorted(path.name for path in (ROOT / "docker").glob("compose*.yaml"))


@pytest.mark.parametrize("name", DOCKERFILES)
def test_dockerfiles_pass_the_linter(name: str) -> None:
    done = shell("hadolint", f"docker/{name}")
    assert done.returncode == 0, done.stdout + done.stderr


def test_compose_files_follow_the_specification() -> None:
    assert len(COMPOSE_FILES) == 2
    files = [f"docker/{name}" for name in COMPOSE_FILES]
    done = shell("check-jsonschema", "--builtin-schema", "vendor.compose-spec", *files)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", DOCKERFILES)
def test_images_are_pinned_run_without_root_and_copy_only_existing_files(name: str) -> None:
    text = (ROOT / "docker" / name).read_text()
    (base,) = re.findall(r"^FROM (\S+)$", text, re.MULTILINE)
    assert re.search(r":.*\d+\.\d+", base), f"{base} has no version"
    assert "torch==2.13.0" in text
    assert re.findall(r"^USER (\S+)$", text, re.MULTILINE) == ["1000"]
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    for source in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE):
        for path in source.split():
            assert (ROOT / path).exists()
            assert f"!{path.split('/')[0]}" in ignored
    for script in re.findall(r"/opt/sas_megatron/(launch/\S+\.sh)", text):
        assert (ROOT / script).stat().st_mode & 0o111


def test_docker_run_passes_devices_and_variables_of_the_network(tmp_path: Path) -> None:
    engine = tmp_path / "engine"
    engine.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    engine.chmod(0o755)
    (tmp_path / "infiniband").mkdir()
    network = {
        "NCCL_SOCKET_IFNAME": "ib0",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
        "GLOO_SOCKET_IFNAME": "eth0",
        "UCX_TLS": "rc",
        "FI_PROVIDER": "efa",
        "CUDA_VISIBLE_DEVICES": "1",
    }
    others = {"CONTAINER_ENGINE": str(engine), "SECRET": "x", "MY_NCCL_NOTE": "x"}
    for folder, has_devices in ((tmp_path / "infiniband", True), (tmp_path / "nothing", False)):
        done = shell("launch/docker_run.sh", "2", "run.yaml", INFINIBAND=str(folder), **network, **others)
        assert done.returncode == 0, done.stderr
        options = done.stdout.splitlines()
        assert (f"{folder}:/dev/infiniband" in options) is has_devices
        passed = {option for before, option in itertools.pairwise(options) if before == "--env"}
        assert network.keys() <= passed
        assert not {"SECRET", "MY_NCCL_NOTE", "INFINIBAND"} & passed
        assert options[-2:] == ["2", "run.yaml"]


def test_the_gpu_image_has_the_providers_of_infiniband_devices() -> None:
    packages = (ROOT / "docker" / "train.Dockerfile").read_text().split("apt-get install")[1].split("&&")[0]
    # Ubuntu's libibverbs1 only recommends the package with the drivers of user space (mlx5 and others).
    assert {"libibverbs1", "ibverbs-providers"} <= set(packages.split())


def test_both_nodes_of_the_compose_cluster_have_the_variables_of_torchrun_sh() -> None:
    compose = YAML(typ="safe").load(ROOT / "docker" / "compose.yaml")
    nodes = [compose["services"][name] for name in ("node0", "node1")]
    for rank, node in enumerate(nodes):
        environment = node["environment"]
        assert environment["NODE_RANK"] == str(rank)
        assert environment["NNODES"] == str(len(nodes))
        assert environment["MASTER_ADDR"] == nodes[0]["hostname"]
        assert node["networks"] == ["training"]
        assert any(volume.startswith("runs:") for volume in node["volumes"])
    usage = (ROOT / "launch" / "torchrun.sh").read_text()
    assert all(variable in usage for variable in nodes[0]["environment"])
    assert compose["networks"]["training"]["internal"] is True
    assert all("healthcheck" in service for service in compose["services"].values())
