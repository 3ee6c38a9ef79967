"""Some room on the spool's disk that only the agent can use: to give a full disk space, it must first write."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable
from pathlib import Path

from skyrl_otel.spool.layout import open_file

_BYTES = 256 << 10
_FULL = (errno.ENOSPC, errno.EDQUOT)


class Ballast:
    """A file that is thrown overboard when the disk is full, and taken on again when it is not."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.keep()

    def keep(self) -> None:
        """Have it, if there is room. Never raises."""
        with contextlib.suppress(OSError):
            descriptor = open_file(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            try:
                os.posix_fallocate(descriptor, 0, _BYTES)
            except OSError:
                os.unlink(self._path)
                raise
            finally:
                os.close(descriptor)

    def with_room(self, write: Callable[[], None]) -> None:
        """Call `write`; once more without the ballast if the disk is full. Raises OSError."""
        try:
            write()
        except OSError as error:
            if error.errno not in _FULL or not self._drop():
                raise
            write()

    def _drop(self) -> bool:
        try:
            os.unlink(self._path)
        except OSError:
            return False
        return True
