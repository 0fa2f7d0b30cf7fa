"""Versions: within the tested range, compiled for each other, and equal on all nodes."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
import re
from collections.abc import Iterator, Mapping

from packaging.requirements import Requirement

from sas_megatron.preflight.finding import Finding, failure, fine, warning

# Compiled for one torch: with another they fail on import, and Megatron-core then does without them,
# or fails, depending on which.
COMPILED_PACKAGES = ("transformer_engine", "flash_attn", "apex")
# What must be equal on all nodes for ranks to compute and exchange alike.
DECISIVE = ("python", "torch", "cuda", "nccl", "megatron-core", "deepspeed", "numpy", "sas-megatron")


def check_software() -> Iterator[Finding]:
    """The installed packages against what this one asks for."""
    yield _check_requirements()
    for package in COMPILED_PACKAGES:
        yield from _check_compiled(package)


def describe_versions() -> dict[str, str]:
    """By name, as far as installed; torch's CUDA and NCCL with them."""
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


def compare_versions(by_place: Mapping[str, Mapping[str, str]]) -> Finding:
    """Whether nodes run the same software."""
    places = list(by_place)
    for name in DECISIVE:
        for place in places[1:]:
            ours, theirs = by_place[places[0]].get(name), by_place[place].get(name)
            if ours != theirs:
                return failure(
                    "equal software",
                    f"{name} is {ours} on {places[0]} and {theirs} on {place}",
                    "install the same on all nodes: one environment or image that they share",
                )
    return fine("equal software", "the same on all nodes")


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
        return failure("versions", "; ".join(wrong), "pip install sas-megatron's requirements again")
    versions = describe_versions()
    names = ("python", "torch", "cuda", "nccl", "megatron-core", "deepspeed")
    return fine("versions", ", ".join(f"{name} {versions[name]}" for name in names if name in versions))


def _check_compiled(package: str) -> Iterator[Finding]:
    try:
        importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name == package:
            return  # not installed, which is fine
        yield _unusable(package, error)
    except Exception as error:  # whatever a mismatched binary raises
        yield _unusable(package, error)


def _unusable(package: str, error: Exception) -> Finding:
    first = re.sub(r"\s+", " ", str(error))[:160]
    return warning(
        "compiled packages",
        f"{package} is installed and cannot be imported ({type(error).__name__}: {first})",
        f"rebuild {package} for the torch that is installed, or uninstall it",
    )
