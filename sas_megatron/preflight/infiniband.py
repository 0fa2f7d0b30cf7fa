"""Check that NCCL can use the InfiniBand (or RoCE) devices of a node. Imports no torch.

    /sys/class/infiniband   the devices of the kernel, visible in every container
    /dev/infiniband         what a container needs to use them
    libibverbs              NCCL loads it; it finds only devices for which a provider is installed

If one of them is missing, NCCL communicates through sockets, without an error.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping
from pathlib import Path

from sas_megatron.preflight.finding import Finding, fine, warning

CHECK = "InfiniBand"


def check_infiniband(
    environment: Mapping[str, str],
    *,
    system: Path = Path("/sys/class/infiniband"),
    device_files: Path = Path("/dev/infiniband"),
    library: str = "libibverbs.so.1",
) -> Iterator[Finding]:
    """Check the devices with an active port on a node with GPUs; a node without such devices has no finding.

    Args:
        environment: Variables of the process, of which NCCL reads some.
        system: The kernel's folder of devices.
        device_files: Folder of the files through which a process uses them.
        library: The library that finds their providers.
    """
    names = _list_active(system)
    if not names:
        return
    problems = [
        *_find_missing_access(names, device_files, library),
        *_find_sockets_by_choice(names, environment),
    ]
    yield from problems or [fine(CHECK, f"{', '.join(names)}, which NCCL can use")]


def _list_active(system: Path) -> list[str]:
    """Return the devices with a port whose state is `4: ACTIVE`."""
    states = sorted(system.glob("*/ports/*/state"))
    return list(dict.fromkeys(path.parents[2].name for path in states if "ACTIVE" in _read(path)))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:  # a device that is being removed
        return ""


def _find_missing_access(names: list[str], device_files: Path, library: str) -> Iterator[Finding]:
    listed = ", ".join(names)
    if not any(device_files.glob("uverbs*")):
        yield warning(
            CHECK,
            f"{listed} cannot be used here: {device_files} has no uverbs files, so NCCL uses sockets",
            "start the container with --device /dev/infiniband (as launch/docker_run.sh does)",
        )
        return
    num_usable = count_usable_devices(library)
    if num_usable is None:
        yield warning(
            CHECK,
            f"{listed} cannot be used: {library} cannot be loaded, so NCCL uses sockets",
            "install libibverbs1 and ibverbs-providers (rdma-core on other distributions)",
        )
    elif num_usable < len(names):
        yield warning(
            CHECK,
            f"{library} finds {num_usable} of {len(names)} devices ({listed}): the others have no provider, "
            "so NCCL does not use them",
            "install ibverbs-providers (rdma-core on other distributions)",
        )


def _find_sockets_by_choice(names: list[str], environment: Mapping[str, str]) -> Iterator[Finding]:
    """Yield a warning for each variable that keeps NCCL from using any device (NCCL 2.27's documentation)."""
    listed = ", ".join(names)
    if environment.get("NCCL_NET", "").lower() == "socket":
        yield warning(CHECK, f"NCCL_NET=Socket, although there is {listed}", "unset NCCL_NET")
    if environment.get("NCCL_IB_DISABLE", "0") not in ("", "0"):
        yield warning(
            CHECK,
            f"NCCL_IB_DISABLE={environment['NCCL_IB_DISABLE']}, although there is {listed}",
            "unset NCCL_IB_DISABLE",
        )
    selection = environment.get("NCCL_IB_HCA", "")
    if selection and not any(_is_selected(name, selection) for name in names):
        yield warning(
            CHECK,
            f"NCCL_IB_HCA={selection} selects none of {listed}, so NCCL uses sockets",
            f"unset NCCL_IB_HCA, or name one of {listed}",
        )


def _is_selected(name: str, selection: str) -> bool:
    """Whether NCCL_IB_HCA selects a device: `^` excludes, `=` compares complete names, `:1` is a port."""
    excludes, selection = selection.startswith("^"), selection.removeprefix("^")
    is_exact, selection = selection.startswith("="), selection.removeprefix("=")
    patterns = [entry.split(":")[0] for entry in selection.split(",") if entry]
    matches = any(name == pattern if is_exact else name.startswith(pattern) for pattern in patterns)
    return matches != excludes


def count_usable_devices(library: str) -> int | None:
    """Return the number of devices for which libibverbs has a provider; None if it cannot be loaded."""
    try:
        verbs = ctypes.CDLL(library)
    except OSError:
        return None
    count = ctypes.c_int(0)
    verbs.ibv_get_device_list.restype = ctypes.c_void_p
    devices = verbs.ibv_get_device_list(ctypes.byref(count))
    if devices is None:
        return 0
    verbs.ibv_free_device_list(ctypes.c_void_p(devices))
    return count.value
