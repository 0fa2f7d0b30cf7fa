"""The configs and studies that are shipped with the package.

In a checkout they are in the folder `configs/`. The wheel contains the same files as
`sas_megatron/configs/` (see setup.py). The commands therefore accept the same paths, such as
`configs/studies/python.yaml`, in a checkout and in any folder of a machine with the installed wheel.
"""

from __future__ import annotations

import os
from pathlib import Path

FOLDER = "configs"
_PACKAGE = Path(__file__).parents[1]


def shipped_configs() -> Path:
    """Return the folder of the shipped configs: the installed package's or, in a checkout, the checkout's."""
    installed = _PACKAGE / FOLDER
    return installed if installed.is_dir() else _PACKAGE.parent / FOLDER


def find_config(path: str | os.PathLike[str]) -> Path:
    """Return `path`, or the shipped file that it names.

    A path names a shipped file if it starts with `configs/` and does not exist in the working directory.
    Otherwise it is returned unchanged, whether or not it exists.
    """
    given = Path(path)
    if given.parts[:1] == (FOLDER,) and not given.exists():
        shipped = shipped_configs().joinpath(*given.parts[1:])
        if shipped.is_file():
            return shipped
    return given
