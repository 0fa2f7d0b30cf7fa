"""System packages for tests of SLURM, ssh, networks and HTML pages, and the reason to skip them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping

PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"


def lacking(packages: Mapping[str, str], *, needs_root: bool) -> str | None:
    """Return the reason to skip a test, or None if nothing is lacking.

    Args:
        packages: Command -> the Debian package that contains it.
        needs_root: Whether the test also needs root.
    """
    missing = sorted(
        {package for command, package in packages.items() if not shutil.which(command, path=PATH)}
    )
    if missing:
        return (
            f"lacks {', '.join(missing)}: tests/install_system_packages.sh installs them, as root on Debian"
        )
    if needs_root and os.geteuid() != 0:
        return "lacks root, which is needed to start the daemons"
    return None
