"""A writer's folder: made and locked under a temporary name, then renamed, so that the agent never sees half of one."""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from skyrl_otel.spool import identity
from skyrl_otel.spool.layout import RunDir, new_writer_id, open_file

FIRST_SEGMENT = "records.0"


class WriterFolder:
    """The writing side of `w-<hex>`.

    `fds` maps "out", "err" and "records.0" to descriptors that append and hold the lock. They are close-on-exec; a dup2
    onto 1 and 2 is not, which is how children come to hold the lock too. `records_segment` is the one that is written now.
    """

    __slots__ = ("_identity_fd", "_lock", "_seq", "fds", "path", "records_segment", "writer_id")

    def __init__(self, writer_id: str, path: Path, fds: dict[str, int], identity_fd: int) -> None:
        self.writer_id = writer_id
        self.path = path
        self.fds = fds
        self.records_segment = 0
        self._identity_fd = identity_fd
        self._seq = 0
        self._lock = threading.Lock()  # protects _seq, so that lines are appended in the order of their seq

    @classmethod
    def create(
        cls, run: RunDir, *, files: tuple[str, ...] = ("out", "err"), facts: Mapping[str, Any] | None = None
    ) -> WriterFolder:
        """Make the folder and publish the first identity line.

        Args:
            run: the run's folder.
            files: ("out", "err") for redirected streams, () for followed files or records only.
            facts: the identity keys known so far.

        Raises:
            OSError: as the file system says; nothing is left behind but a `t-` folder.
        """
        writer_id = new_writer_id()
        scratch = run.path / f"t-{writer_id}"
        os.mkdir(scratch, 0o700)
        fds: dict[str, int] = {}
        try:
            for name in (*files, FIRST_SEGMENT):
                fds[name] = _open_locked(scratch / name)
            identity_fd = open_file(scratch / "identity", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND)
            folder = cls(writer_id, run.path / f"w-{writer_id}", fds, identity_fd)
            folder.publish(facts or {})
            os.rename(scratch, folder.path)
        except OSError:
            for descriptor in fds.values():
                os.close(descriptor)
            raise
        return folder

    def publish(self, changes: Mapping[str, Any]) -> None:
        """Append one identity line that holds from the files' present sizes on. Raises OSError."""
        with self._lock:
            sizes = {**self._sizes(), **self._records_size()}
            os.write(self._identity_fd, identity.encode(identity.IdentityLine(self._seq, sizes, changes)))
            self._seq += 1

    def _sizes(self) -> dict[str, tuple[int, int]]:
        return {name: (0, os.fstat(fd).st_size) for name, fd in self.fds.items() if name in ("out", "err")}

    def _records_size(self) -> dict[str, tuple[int, int]]:
        segment = self.records_segment
        try:
            return {"records": (segment, os.stat(self.path / f"records.{segment}").st_size)}
        except OSError:
            return {"records": (0, 0)}  # not renamed yet, or the next segment is just being made

    def give_up_first_segment(self) -> None:
        """Records go on in a later segment, which is locked: the lock on the first one may go."""
        descriptor = self.fds.pop(FIRST_SEGMENT, None)
        if descriptor is not None:
            os.close(descriptor)

    def close(self) -> None:
        """Give the locks up, unless children or dup2'd descriptors still hold the descriptions."""
        descriptors = [*self.fds.values(), self._identity_fd]
        self.fds, self._identity_fd = {}, -1
        for descriptor in descriptors:
            if descriptor >= 0:
                os.close(descriptor)


def _open_locked(path: Path) -> int:
    descriptor = open_file(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return descriptor
