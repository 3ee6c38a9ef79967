"""What the agent counts and says of itself: the file `status`, and reports to the launcher's control listener.

Reports never decide delivery; a launcher that is gone costs nothing.
"""

from __future__ import annotations

import http.client
import json
import os
import secrets
import threading
from dataclasses import asdict, dataclass
from urllib.parse import urlsplit

from skyrl_otel.spool.layout import RunDir, replace_file
from skyrl_otel.spool.token import Control


@dataclass(slots=True)
class Tally:
    """Counts of this agent so far, and what went wrong last. `lost_bytes` are those of writers that are gone."""

    sent_records: int = 0
    sent_bytes: int = 0
    rejected_records: int = 0
    retries: int = 0
    lost_bytes: int = 0
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Status:
    """The agent of one node. `place` tells nodes apart that have one name, and is the same for all agents that follow one
    another there. `drained`: no writer has a byte that is not acknowledged, but partial lines younger than a
    second. Sizes in bytes."""

    run: str
    node: str
    place: str
    agent: str
    pid: int
    supervisor_pid: int
    time_unix_nano: int
    backlog_bytes: int
    drained: bool
    writers: int
    writers_alive: int
    sent_records: int
    sent_bytes: int
    lost_bytes: int
    rejected_records: int
    retries: int
    restarts: int
    redacted: dict[str, int]
    error: str | None
    notes: tuple[str, ...]

    def to_json(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    def write(self, run: RunDir) -> None:
        """Raises OSError."""
        replace_file(run.status, self.to_json())


def place_of(lock: int) -> str:
    """The random name that the first agent of this run on this node wrote into the lock's file."""
    try:
        if not os.fstat(lock).st_size:
            os.pwrite(lock, secrets.token_hex(8).encode(), 0)
        return os.pread(lock, 64, 0).decode(errors="replace")
    except OSError:
        return ""


class Reporter:
    """Posts the newest status in a thread of its own; older ones that found no time are dropped."""

    def __init__(self) -> None:
        self._changed = threading.Condition()  # protects the two fields below
        self._pending: tuple[Control, bytes] | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="reporter", daemon=True)
        self._thread.start()

    def report(self, control: Control, status: Status) -> None:
        with self._changed:
            self._pending = (control, status.to_json())
            self._changed.notify()

    def close(self, timeout_s: float = 2.0) -> None:
        """Post what is pending, then stop."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while True:
            with self._changed:
                while self._pending is None and not self._closed:
                    self._changed.wait()
                if self._pending is None:
                    return
                (control, content), self._pending = self._pending, None
            _post(control, content)


def _post(control: Control, content: bytes) -> None:
    url = urlsplit(control.url)
    connection = http.client.HTTPConnection(url.hostname or "", url.port, timeout=2)
    try:
        headers = {"content-type": "application/json", "authorization": control.authorization}
        connection.request("POST", url.path, content, headers)
        connection.getresponse().read()
    except (OSError, http.client.HTTPException):
        pass  # the next report is two seconds away
    finally:
        connection.close()
