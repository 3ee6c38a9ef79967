"""Which other processes take their own records: by a `QueueHandler` of theirs the same records may come here once more.

Decided by what a process says of itself in the spool, never by comparing records. One that says nothing there is taken for
one that takes none: its record is then taken here, so that none is lost, and at worst there are two. That is so for a record
from before its process attached, and for processes further apart than parent, child and siblings: a number like theirs may
be another machine's.
"""

from __future__ import annotations

import os
from pathlib import Path

from skyrl_otel.spool import identity
from skyrl_otel.spool.layout import RunDir


class Kin:
    """The parent, the children and the siblings of this process, as far as they have a folder in the run."""

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._pids: dict[Path, int] = {}
        self._since: dict[int, float] = {}
        self._stamp = -1

    def took(self, pid: int, created: float) -> bool:
        """Whether process `pid` has taken a record it made at `created` (seconds since the epoch).

        It has its folder before the record can come here, so that one look at the spool decides.
        """
        since = self._since.get(pid)
        if since is None:
            self._look_for_folders()
            said = [self._read(path) for path, of in self._pids.items() if of == pid]
            since = min((time for time in said if time is not None), default=None)
            if since is None:
                return False
            self._since[pid] = since
        return created >= since

    def _look_for_folders(self) -> None:
        """Those that are new: each changes the time of the folder that it is in."""
        stamp = os.stat(self._run.path).st_mtime_ns
        if stamp == self._stamp:
            return
        for _, path in self._run.writers():
            if path not in self._pids:
                pid = _facts(path).get("pid")
                self._pids[path] = pid if isinstance(pid, int) else 0
        self._stamp = stamp

    def _read(self, path: Path) -> float | None:
        """Since when the process of a folder takes its records; None where it does not, or is none of ours."""
        facts = _facts(path)
        pid, parent, since = facts.get("pid"), facts.get("parent_pid"), facts.get("records_since")
        if not isinstance(since, float) or not {pid, parent} & {os.getpid(), os.getppid()}:
            return None
        return since


def _facts(path: Path) -> dict[str, object]:
    try:
        lines = identity.parse((path / "identity").read_bytes())
    except OSError:
        return {}
    return identity.in_force(lines, len(lines))
