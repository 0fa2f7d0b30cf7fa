"""What tests of SLURM, ssh, networks and pages need beyond Python; a skip names what is lacking."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping

PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"


def lacking(packages: Mapping[str, str], *, needs_root: bool) -> str | None:
    """Command -> Debian package: a sentence on those that are not there, for a skip; None: all are."""
    missing = sorted(
        {package for command, package in packages.items() if not shutil.which(command, path=PATH)}
    )
    if missing:
        return (
            f"lacks {', '.join(missing)}: tests/install_system_packages.sh installs them, as root on Debian"
        )
    if needs_root and os.geteuid() != 0:
        return "lacks root, without which the daemons cannot be started"
    return None
