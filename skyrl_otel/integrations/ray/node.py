"""Ray's own files of a node (raylet, gcs_server, monitor, dashboard, agents): followed once per node and run.

Whoever comes first makes the folders and holds their locks. Every other process of the run on this node waits in flock(2)
for its turn, so that they are followed as long as anybody of the run is there.
"""

from __future__ import annotations

import fcntl
import os
import re
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from skyrl_otel.capture import guard
from skyrl_otel.capture.fds import Place, place_of
from skyrl_otel.capture.folders import FollowedFolder
from skyrl_otel.capture.watch import Watch
from skyrl_otel.spool.layout import JOB_FILE, RunDir, open_file
from skyrl_otel.spool.writer import FIRST_SEGMENT

# session_dir/logs: ray/_private/node.py and services.py. python-core-* and worker-* are not here: the former are Ray's
# debugging logs of each worker, the latter the workers' own folders.
_FILES = (
    r"(raylet|gcs_server|monitor|dashboard|dashboard_agent|log_monitor|runtime_env_agent|runtime_env_setup-(\w+))"
    r"(?:\.\d+)?\.(out|err|log)"
)
_LOOK_AGAIN_S = 2.0
_STALE_S = 10.0


def facts(worker: Any) -> dict[str, Any]:
    """What identity lines of Ray's own files say beside the component's name."""
    node = getattr(worker, "node", None)
    return {
        "channel": "infra",
        "role": "ray",
        "silent_end": True,
        "host": os.uname().nodename,
        "node_id": str(getattr(node, "node_id", "") or ""),
    }


class SessionFiles:
    """Follows the files of one Ray session on this node, or waits to take that over.

    Args:
        session: Ray's session folder on this node.
        job_id: this process's Ray job. A cluster keeps a file for each job it ever had; only those of the run are ours.
        from_start: this run started the session, so all its files are this run's; else only what is written from now on.
        facts: identity keys.
    """

    def __init__(self, run: RunDir, session: str, job_id: str, *, from_start: bool, facts: Mapping[str, Any]) -> None:
        self._run = run
        self._job_id = job_id
        self._logs = Path(session) / "logs"
        self._from_start = from_start
        self._facts = facts
        self._list = run.path / f"ray-{os.path.basename(session)}"
        self._held: dict[str, int | FollowedFolder] = {}
        self._lock = -1

    def start(self, watch: Watch) -> None:
        """Wait for the turn in a thread of its own: flock(2) wakes it the moment the holder is gone, before the agent looks."""
        threading.Thread(target=self._wait, args=(watch,), name="skyrl-otel-ray", daemon=True).start()

    def _wait(self, watch: Watch) -> None:
        with guard.guarded("ray.session"):
            self._lock = open_file(self._list, os.O_RDWR | os.O_CREAT)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            self._take_over()
            watch.add("ray.session", self._look)

    def _take_over(self) -> None:
        """Hold what the former holder held, unless it is so long gone that the agent has closed the books on it."""
        fresh = time.time() - os.fstat(self._lock).st_mtime < _STALE_S
        for line in os.pread(self._lock, 1 << 16, 0).decode().split() if fresh else ():
            component, _, writer_id = line.partition("=")
            with suppress(OSError):
                self._held[component] = _take(self._run.path / f"w-{writer_id}" / FIRST_SEGMENT)
        if not self._held:
            os.ftruncate(self._lock, 0)

    def _look(self) -> float | None:
        """Follow files that are new, and leave a sign of life."""
        components: dict[str, dict[str, tuple[Place, int]]] = {}
        # The first look comes late for files of another's session; those that appear afterwards are read from the start.
        from_start = self._from_start or bool(self._held)
        others = (name for name in os.listdir(self._run.path) if name.startswith(JOB_FILE))
        jobs = {self._job_id, *(name.removeprefix(JOB_FILE) for name in others)}
        for name in sorted(os.listdir(self._logs)):
            match = re.fullmatch(_FILES, name)
            if match is None or (match[2] and match[2] not in jobs):
                continue
            component = f"{match[1]}.log" if match[3] == "log" else match[1]
            found = place_of(str(self._logs / name))
            if component not in self._held and found is not None:
                stream = "err" if match[3] == "err" else "out"
                components.setdefault(component, {})[stream] = (found, 0 if from_start else found.size)
        for component, places in components.items():
            facts = {**self._facts, "service": _service(component), "argv0": component}
            folder = FollowedFolder.follow(self._run, places, facts, skip_markers=False)
            self._held[component] = folder
            os.pwrite(self._lock, f"{component}={folder.writer_id}\n".encode(), os.fstat(self._lock).st_size)
        os.utime(self._lock)
        return _LOOK_AGAIN_S


def _service(component: str) -> str:
    """raylet, gcs_server, runtime_env_setup … without job ids and endings."""
    return component.removesuffix(".log").partition("-")[0]


def _take(path: Path) -> int:
    descriptor = open_file(path, os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
