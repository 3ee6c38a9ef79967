"""Liveness by flock(2) on open file descriptions: the kernel answers, not a table of pids.

A lock belongs to the open file description, so it stays while any process that inherited the descriptor lives
(fork, spawn and exec children included) and goes the moment the last one is gone, SIGKILL or not.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from skyrl_otel.spool.layout import open_file


def is_held(path: Path) -> bool:
    """Whether somebody holds LOCK_EX on `path`. A missing file is held by nobody; one that cannot be asked counts as held.

    Asks with LOCK_SH so that two who ask at once do not see each other.
    """
    try:
        descriptor = open_file(path, os.O_RDONLY)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:  # out of descriptors, an I/O error: whoever lives must not be taken for gone
        return True
    return _is_refused(descriptor, fcntl.LOCK_SH)


def is_folder_in_use(path: Path) -> bool:
    """Whether somebody holds any lock, LOCK_SH too, on a folder; one that cannot be opened is used by nobody."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    return _is_refused(descriptor, fcntl.LOCK_EX)


def _is_refused(descriptor: int, lock: int) -> bool:
    """Whether somebody's lock stands against this one. Closes the descriptor."""
    try:
        fcntl.flock(descriptor, lock | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def take(path: Path) -> int | None:
    """Open `path` (made if missing) and lock it; the descriptor, or None where somebody else holds the lock."""
    descriptor = open_file(path, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False)):
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(descriptor)  # somebody else's; or of a run that was tidied away between the open and the lock
    return None
