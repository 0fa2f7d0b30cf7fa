"""Checks of software versions: supported, compiled for the installed torch, and equal on all nodes."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
import re
from collections.abc import Iterator, Mapping

from packaging.requirements import Requirement

from sas_megatron.preflight.finding import Finding, failure, fine, warning

# These packages are compiled for one version of torch and cannot be imported with another. Depending on the
# package, Megatron-core then fails or continues without it.
COMPILED_PACKAGES = ("transformer_engine", "flash_attn", "apex")
# Their versions must be equal on all nodes, so that ranks compute and communicate identically.
COMPARED_PACKAGES = ("python", "torch", "cuda", "nccl", "megatron-core", "deepspeed", "numpy", "sas-megatron")


def check_software() -> Iterator[Finding]:
    """Check the installed packages against the requirements of this one, and import the compiled packages."""
    yield _check_requirements()
    for package in COMPILED_PACKAGES:
        yield from _check_compiled(package)


def describe_versions() -> dict[str, str]:
    """Return the versions of Python, torch, its CUDA and NCCL, and the installed packages, by name."""
    import torch

    versions = {"python": platform.python_version(), "torch": torch.__version__}
    if torch.version.cuda is not None:
        versions["cuda"] = torch.version.cuda
        versions["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    for name in ("sas-megatron", "megatron-core", "deepspeed", "numpy"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def compare_versions(by_host: Mapping[str, Mapping[str, str]]) -> Finding:
    """Compare the software versions of all hosts, each from `describe_versions`."""
    hosts = list(by_host)
    for name in COMPARED_PACKAGES:
        for host in hosts[1:]:
            first, other = by_host[hosts[0]].get(name), by_host[host].get(name)
            if first != other:
                return failure(
                    "equal software",
                    f"{name} is {first} on {hosts[0]} and {other} on {host}",
                    "use one environment or image for all nodes",
                )
    return fine("equal software", "equal versions on all nodes")


def _check_requirements() -> Finding:
    wrong = []
    for line in importlib.metadata.requires("sas-megatron") or []:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version} is not {requirement.specifier}")
    if wrong:
        return failure(
            "versions",
            "; ".join(wrong),
            "install sas-megatron again with pip, which installs its requirements",
        )
    versions = describe_versions()
    names = ("python", "torch", "cuda", "nccl", "megatron-core", "deepspeed")
    return fine("versions", ", ".join(f"{name} {versions[name]}" for name in names if name in versions))


def _check_compiled(package: str) -> Iterator[Finding]:
    try:
        importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name == package:
            return  # not installed: it is optional
        yield _unusable(package, error)
    except Exception as error:  # a binary for another torch raises many types
        yield _unusable(package, error)


def _unusable(package: str, error: Exception) -> Finding:
    message = re.sub(r"\s+", " ", str(error))[:160]
    return warning(
        "compiled packages",
        f"{package} is installed but cannot be imported ({type(error).__name__}: {message})",
        f"rebuild {package} for the installed torch, or uninstall it",
    )
