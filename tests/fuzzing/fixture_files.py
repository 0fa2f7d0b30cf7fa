"""Files that an earlier version wrote, as seeds of fuzz targets."""

from __future__ import annotations

import tarfile
from pathlib import Path

from tests.fork_server import ROOT
from tests.fuzzing.inputs import Files

FIXTURES = ROOT / "tests" / "checkpoint" / "fixtures"


def unpack(*names: str, folder: str | None = None) -> Files:
    """Return the files of archives in the fixtures; `folder` replaces the first folder of their paths."""
    files: Files = {}
    for name in names:
        with tarfile.open(FIXTURES / f"{name}.tar.xz") as archive:
            for member in archive.getmembers():
                content = archive.extractfile(member)
                if content is not None:
                    first, _, rest = member.name.partition("/")
                    files[f"{folder or first}/{rest}"] = content.read()
    return files


def exported_model() -> Files:
    """Return the files of a model that an earlier version exported."""
    return {Path(name).name: content for name, content in unpack("exported").items()}
