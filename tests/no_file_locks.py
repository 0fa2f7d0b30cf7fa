"""Run the command line on a kernel that answers flock with an error, as file systems without locks do.

python -m tests.no_file_locks ERRNO ARGUMENT ...
"""

from __future__ import annotations

import ctypes
import platform
import runpy
import sys

# Numbers of linux/filter.h, linux/seccomp.h and of the system call.
LOAD, JUMP_IF_EQUAL, RETURN = 0x20, 0x15, 0x06
ALLOW, FAIL = 0x7FFF0000, 0x00050000
FLOCK = {"x86_64": 73, "aarch64": 32}


class _Instruction(ctypes.Structure):
    _fields_ = (
        ("code", ctypes.c_uint16),
        ("jt", ctypes.c_uint8),
        ("jf", ctypes.c_uint8),
        ("k", ctypes.c_uint32),
    )


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_uint16), ("instructions", ctypes.POINTER(_Instruction)))


def refuse_locks(number: int) -> None:
    """Let flock fail with the error `number` in this process and its children (seccomp)."""
    instructions = (_Instruction * 4)(
        (LOAD, 0, 0, 0),  # the number of the system call
        (JUMP_IF_EQUAL, 0, 1, FLOCK[platform.machine()]),
        (RETURN, 0, 0, FAIL | number),
        (RETURN, 0, 0, ALLOW),
    )
    program = _Program(len(instructions), instructions)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    if libc.prctl(22, 2, ctypes.byref(program)):  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
        raise OSError(ctypes.get_errno(), "seccomp is not available")


if __name__ == "__main__":
    refuse_locks(int(sys.argv.pop(1)))
    runpy.run_module("sas_megatron", run_name="__main__", alter_sys=True)
