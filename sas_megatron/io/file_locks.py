"""Locks of files among processes that share a file system; the kernel releases them with their process.

Some file systems have no locks (ENOSYS, ENOLCK, EOPNOTSUPP). Work continues there without them, which is
logged once.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import logging

from sas_megatron.config.errors import describe_os_error

logger = logging.getLogger(__name__)


def acquire_file_lock(descriptor: int, *, wait: bool = False, shared: bool = False) -> bool:
    """Lock an open file until its descriptor and all copies of it are closed.

    Args:
        descriptor: The open file.
        wait: Wait until no other process holds the lock.
        shared: Allow other shared locks at the same time.

    Returns:
        False if another process holds the lock; True if this process does, or the file system has no locks.
    """
    operation = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        fcntl.flock(descriptor, operation if wait else operation | fcntl.LOCK_NB)
    except OSError as error:
        # NFS, which emulates these locks by locks of byte ranges, may report EACCES for a lock that is held.
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        _log_that_locks_are_missing(describe_os_error(error))
    return True


@functools.cache
def _log_that_locks_are_missing(reason: str) -> None:
    logger.warning(
        "this file system has no file locks (%s): continuing without them; do not start two commands that "
        "write the same files at the same time",
        reason,
    )
