"""Mount an empty file system on a folder, visible to this process only, and run `sas-megatron train`.

usage: python -m tests.end_to_end.training_on_own_file_system FOLDER CONFIG [section.field=value ...]
"""

from __future__ import annotations

import ctypes
import runpy
import subprocess
import sys

CLONE_NEWNS = 0x00020000

if __name__ == "__main__":
    folder, *arguments = sys.argv[1:]
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), "cannot create a mount namespace")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], check=True)
    sys.argv = ["sas_megatron", "train", *arguments]
    runpy.run_module("sas_megatron", run_name="__main__", alter_sys=True)
