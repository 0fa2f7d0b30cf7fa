"""The rendered Job follows Kubernetes' schema, and its pods train, stop and resume on two hosts."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from tests.conftest import ROOT
from tests.end_to_end.namespaces import ADDRESSES, INTERFACE, missing_for_namespaces, two_namespaces
from tests.end_to_end.nodes import Nodes, started_nodes, steps, world_size, write_config
from tests.end_to_end.test_launching import shell
from tests.small_data import SmallData

RENDER = "launch/kubernetes/render_job.sh"
VARIABLES = {"RUN_ID": "sas-small", "VOLUME_CLAIM": "shared.work", "NNODES": "2", "GPUS_PER_NODE": "1"}
IN_IMAGE = "/opt/sas_megatron"


def render(*arguments: str, **variables: str) -> list[dict[str, Any]]:
    """Return the Service and the Job."""
    done = shell(RENDER, *arguments, **{**VARIABLES, **variables})
    assert done.returncode == 0, done.stderr
    return list(YAML(typ="safe").load_all(done.stdout))


def container_of(job: dict[str, Any]) -> dict[str, Any]:
    (container,) = job["spec"]["template"]["spec"]["containers"]
    return dict(container)


@pytest.mark.parametrize("version", ["1.31", "1.37"])
@pytest.mark.parametrize("variables", [{}, {"INFINIBAND_RESOURCE": "rdma/hca"}, {"GPU_RESOURCE": ""}])
def test_manifests_follow_the_schema(version: str, variables: dict[str, str]) -> None:
    import kubernetes_validate

    for manifest in render("run.yaml", "training.num_steps=3", **variables):
        kubernetes_validate.validate(manifest, version, strict=True)


def test_the_job_has_the_resources_addresses_and_time_to_stop_that_the_variables_state() -> None:
    service, job = render(
        *("run.yaml", 'x="a b"\\c', "y=$(z)"),
        INFINIBAND_RESOURCE="rdma/hca",
        GRACE_SECONDS="240",
        SHARED_MEMORY="64Gi",
        MAX_RESTARTS="5",
    )
    spec = job["spec"]
    pod, container = spec["template"]["spec"], container_of(job)
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 2, 2)
    assert spec["backoffLimit"] == 5 * 2
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": job["metadata"]["name"]}
    assert pod["subdomain"] == service["metadata"]["name"]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 1, "rdma/hca": 1}
    environment = {each["name"]: each.get("value") for each in container["env"]}
    assert environment["MASTER_ADDR"] == "sas-small-0.sas-small"
    assert pod["terminationGracePeriodSeconds"] == 240
    assert int(environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < 240
    (shared,) = [each for each in pod["volumes"] if "emptyDir" in each]
    assert shared["emptyDir"] == {"medium": "Memory", "sizeLimit": "64Gi"}
    mounts = {each["name"]: each["mountPath"] for each in container["volumeMounts"]}
    assert mounts[shared["name"]] == "/dev/shm"
    # Kubernetes replaces $$( by $( in arguments.
    assert container["args"] == ["run.yaml", 'x="a b"\\c', "y=$$(z)"]
    (script,) = container["command"]
    assert os.access(script.replace(IN_IMAGE, str(ROOT)), os.X_OK)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("RUN_ID", ""),
        ("RUN_ID", "Run_1"),
        ("VOLUME_CLAIM", ""),
        ("NNODES", "2:4"),
        ("GPUS_PER_NODE", "0"),
        ("GRACE_SECONDS", "20"),
        ("SHARED_MEMORY", "16 GB"),
        ("INFINIBAND_RESOURCE", "mlx5"),
        ("IMAGE", 'a"\nb'),
    ],
)
def test_invalid_variables_are_refused(variable: str, value: str) -> None:
    done = shell(RENDER, "run.yaml", **{**VARIABLES, variable: value})
    assert (done.returncode, done.stdout) == (2, "")
    assert variable in done.stderr


def test_a_refused_config_ends_a_pod_with_the_status_that_fails_the_job(tmp_path: Path) -> None:
    done = shell("launch/kubernetes/run_pod.sh", str(tmp_path / "none.yaml"), MASTER_ADDR="localhost")
    assert done.returncode == 2
    assert "none.yaml: cannot be read" in done.stderr
    _, job = render("run.yaml")
    rules = {
        rule["action"]: rule["onExitCodes"]["values"]
        for rule in job["spec"]["podFailurePolicy"]["rules"]
        if "onExitCodes" in rule
    }
    assert rules == {"Ignore": [75], "FailJob": [2]}


@contextlib.contextmanager
def two_pod_hosts(address: str) -> Iterator[list[str]]:
    """Yield two network namespaces in which `address` is the first, as the cluster's DNS would answer."""
    with two_namespaces() as names:
        folders = [Path("/etc/netns") / name for name in names]
        try:
            for folder, own in zip(folders, ADDRESSES, strict=True):
                folder.mkdir(parents=True)
                lines = f"127.0.0.1 localhost\n{ADDRESSES[0]} {address}\n{own} {socket.gethostname()}\n"
                (folder / "hosts").write_text(lines)
            yield names
        finally:
            for folder in folders:
                shutil.rmtree(folder, ignore_errors=True)


def start_pods(nodes: Nodes, names: list[str], job: dict[str, Any]) -> None:
    """Start the exact command of both pods, with the environment that Kubernetes sets."""
    container = container_of(job)
    environment = {each["name"]: each["value"] for each in container["env"] if "value" in each}
    command = [part.replace(IN_IMAGE, str(ROOT)) for part in (*container["command"], *container["args"])]
    for index, name in enumerate(names):
        pod = {**environment, "NODE_RANK": str(index), "GLOO_SOCKET_IFNAME": INTERFACE}
        nodes.start("ip", "netns", "exec", name, *command, **pod)


@pytest.mark.exhaustive
@pytest.mark.system_packages("iproute2")
def test_pods_on_two_hosts_train_stop_together_and_resume(small_data: SmallData, tmp_path: Path) -> None:
    if reason := missing_for_namespaces():
        pytest.skip(reason)
    config = write_config(
        small_data,
        tmp_path,
        training={"num_steps": 300},
        checkpoint={"interval": None},
        evaluation={"interval": None, "num_sequences": 2},
    )
    _, job = render(str(config), JOIN_SECONDS="120")
    run_directory = tmp_path / "run"
    with two_pod_hosts("sas-small-0.sas-small") as names:
        with started_nodes(tmp_path) as nodes:
            start_pods(nodes, names, job)
            nodes.wait_until(lambda: len(steps(run_directory)) >= 3)
            # Only the second pod is evicted: the kubelet signals its process 1.
            evicted = min(
                pid
                for pid in nodes.processes(NODE_RANK="1")
                if b"run_pod.sh" in Path(f"/proc/{pid}/cmdline").read_bytes()
            )
            os.kill(evicted, signal.SIGTERM)
            assert nodes.wait() == [75, 75], nodes.output()
        with started_nodes(tmp_path) as nodes:
            start_pods(nodes, names, job)
            assert nodes.wait() == [0, 0], nodes.output()
            assert "resuming from" in nodes.output()
        assert steps(run_directory) == list(range(1, 301)), "each step once"
        assert world_size(run_directory) == 2
        with started_nodes(tmp_path) as nodes:  # a pod that is lost at the end is started without the others
            start_pods(nodes, names[1:], job)
            assert nodes.wait() == [0]
            assert "has finished" in nodes.output()
    assert not list(run_directory.glob(".started*"))
