"""The one thread that writes: takes decoded batches, drops repeats, writes text and rows, commits, answers.

Several waiting batches share a transaction. Whatever fails, the state is that of the last commit: the text is cut back,
the transaction rolled back, the memory of repeats read again from the store, and the sender told to come again.
"""

from __future__ import annotations

import math
import os
import queue
import sqlite3
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from skyrl_otel.collector.decode import BadRequest, Batch
from skyrl_otel.collector.dedup import Sifted
from skyrl_otel.collector.routes import WAIT_S, Router
from skyrl_otel.collector.store import Store
from skyrl_otel.collector.text import LineFormat, Waiting
from skyrl_otel.collector.texts import ROUTE, Texts

_MAX_ROWS_PER_COMMIT = 50_000
_IDLE_S = 2.0  # how often statuses are stored while no rows come


class Unavailable(Exception):
    """Nothing can be stored now, and it was not; the sender keeps its batch. The message is for people."""


@dataclass(frozen=True, slots=True)
class _Job:
    batch: Batch
    done: Future[None]


class Committer:
    """Owns store and text files from `start` to `stop`."""

    def __init__(
        self,
        store: Store,
        texts: Texts,
        *,
        max_bytes: int,
        say: Callable[[str], None],
        router: Router | None = None,
        queue_size: int = 4,
    ) -> None:
        """`router`: which records go elsewhere than to their channel's file. `say` prints a line for the user (here)."""
        self._store = store
        self._texts = texts
        self._max_bytes = max_bytes
        self._say = say
        self._router = router if router is not None else Router(())
        self._format = LineFormat(self._router)
        self._router.restore(store.waiting(), time.monotonic())
        self._router.follow(store.followed())
        self._dedup = store.load_seen()
        # Bounded: a full queue holds the decoding thread up, and so the requests behind it.
        self._jobs: queue.Queue[_Job | None] = queue.Queue(queue_size)
        self._lock = threading.Lock()  # protects _reports
        self._reports: dict[str, tuple[str, int, str]] = {}
        self._complaint = Complaint(say)
        self._ending = False
        self._thread = threading.Thread(target=self._run, name="committer", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float) -> bool:
        """Commit what waits and end; False if that took too long. Calling it twice does no harm."""
        if self._thread.is_alive():
            self._jobs.put(None)
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def submit(self, batch: Batch) -> Future[None]:
        """Hand over a batch; blocks while the queue is full.

        The future is done when the batch is committed, or has `Unavailable` or `BadRequest`.
        """
        job = _Job(batch, Future())
        job.done.set_running_or_notify_cancel()  # from here on it cannot be cancelled, only answered
        self._jobs.put(job)
        return job.done

    def report(self, agent: str, heard_unix_nano: int, status: str) -> None:
        """Keep an agent's status with the next transaction."""
        with self._lock:
            self._reports[agent] = (agent, heard_unix_nano, status)

    def _run(self) -> None:
        while not self._ending:
            jobs, self._ending = self._take()
            try:
                self._commit(jobs)
            except Exception as error:
                self._recover(jobs, error)
            else:
                for job in jobs:
                    job.done.set_result(None)

    def _take(self) -> tuple[list[_Job], bool]:
        jobs: list[_Job] = []
        rows = 0
        try:
            job = self._jobs.get(timeout=_IDLE_S)
            while job is not None:
                jobs.append(job)
                rows += len(job.batch.rows)
                if rows >= _MAX_ROWS_PER_COMMIT:
                    break
                job = self._jobs.get_nowait()
            return jobs, job is None
        except queue.Empty:
            return jobs, False

    def _commit(self, jobs: list[_Job]) -> None:
        with self._lock:
            reports = list(self._reports.values())
        self._router.give_up(math.inf if self._ending else time.monotonic() - WAIT_S)
        if not jobs and not reports and not self._router.released:
            return
        if jobs and (size := self._store.size_bytes()) > self._max_bytes:
            raise Unavailable(
                f"the store {self._store.path} has {size >> 20} MB, its limit; set SKYRL_OTEL_STORE_MAX higher and restart"
            )
        fresh: list[tuple[Batch, Sifted]] = []
        lines: dict[str | Waiting, list[str]] = {}
        for job in jobs:
            sifted = self._dedup.sift(job.batch.rows, job.batch.low_water)
            fresh.append((job.batch, sifted))
            for channel, found in self._format.lines(sifted.fresh, job.batch.resources).items():
                lines.setdefault(channel, []).extend(found)
        lines = {channel: text for channel, text in lines.items() if text}
        self._begin_texts(self._texts_to_write(lines))
        self._store.begin()
        for batch, sifted in fresh:
            self._store.add(batch.resources, sifted)
        # Text before the commit, its new length in it: what a kill leaves behind that length is cut off at the next start.
        for channel, text in self._that_wait_no_longer(lines).items():
            file = self._texts.get(channel)
            file.append(text)
            self._store.set_text(channel, file.path, file.length)
        self._store.set_followed(self._router.fresh)
        self._store.set_agents(reports)
        self._store.commit()
        self._texts.settle()
        self._router.settle()
        with self._lock:
            for report in reports:
                if self._reports.get(report[0]) is report:
                    del self._reports[report[0]]
        if jobs:
            self._complaint.over()

    def _texts_to_write(self, lines: Iterable[str | Waiting]) -> set[str]:
        """The files that these lines, and those that wait no longer, go to."""
        keys = {key for key in lines if not isinstance(key, Waiting)}
        for process, to in self._router.released.items():
            if to:
                keys.add(f"{ROUTE}{to}")
            else:
                keys.update(key.otherwise for key in lines if isinstance(key, Waiting) and key.process == process)
                keys.update(self._store.wait_for(process))
        return keys

    def _begin_texts(self, keys: Iterable[str]) -> None:
        """Commit where our lines begin in each file that is new, before the first of them is written: the next life could
        not tell the lines that a kill leaves behind from what somebody else wrote there."""
        new = [key for key in keys if not self._texts.knows(key)]
        if not new:
            return
        self._store.begin()
        for key in new:
            file = self._texts.get(key)
            self._store.set_text(key, file.path, file.length)
        self._store.commit()
        self._texts.settle()

    def _that_wait_no_longer(self, lines: dict[str | Waiting, list[str]]) -> dict[str, bytes]:
        """The text for each file: lines that waited first. Those that still have to wait are in the store."""
        found: dict[str, list[bytes]] = {}
        encoded = {key: "".join(text).encode("utf-8", "replace") for key, text in lines.items() if text}
        for key, text in encoded.items():
            if isinstance(key, Waiting):
                self._store.wait(key.process, key.otherwise, text)
        for process, to in self._router.released.items():
            for otherwise, text in self._store.release(process):
                found.setdefault(f"{ROUTE}{to}" if to else otherwise, []).append(text)
        for key, text in encoded.items():
            if not isinstance(key, Waiting):
                found.setdefault(key, []).append(text)
        return {key: b"".join(texts) for key, texts in found.items()}

    def _recover(self, jobs: list[_Job], error: Exception) -> None:
        self._store.rollback()
        for file in self._texts.values():
            try:
                file.revert()
            except OSError:
                pass  # tried again before the next write
        try:
            self._dedup = self._store.load_seen()
            self._router.restore(self._store.waiting(), time.monotonic())
        except sqlite3.Error as unreadable:
            error = unreadable
        if _is_storage_trouble(error):
            reason = str(error) if isinstance(error, Unavailable) else self._explain(error)
            self._complaint.say(reason)
            for job in jobs:
                job.done.set_exception(Unavailable(reason))
            return
        # Something in the data itself. One batch of the group has it; the others must not suffer for it.
        if len(jobs) > 1:
            for job in jobs:
                try:
                    self._commit([job])
                except Exception as own:
                    self._recover([job], own)
                else:
                    job.done.set_result(None)
            return
        traceback.print_exception(error, file=sys.stderr)
        for job in jobs:
            job.done.set_exception(BadRequest(f"the collector cannot store this batch: {error!r}"))

    def _explain(self, error: Exception) -> str:
        if isinstance(error, MemoryError):
            return "memory is short; nothing is lost meanwhile"
        folders = {self._store.path.parent, *(file.path.parent for file in self._texts.values())}
        if isinstance(error, OSError):
            path = next((file.path for file in self._texts.values()), self._store.path)
            folders = {path.parent}
        full = [str(folder) for folder in sorted(folders) if free_bytes(folder) < 16 << 20]
        where = " and ".join(full) or " or ".join(str(folder) for folder in sorted(folders))
        if full or "full" in str(error):
            return f"the disk of {where} is full ({error}); free space there, nothing is lost meanwhile"
        return f"cannot write to {where} ({error}); make it writable, nothing is lost meanwhile"


def _is_storage_trouble(error: Exception) -> bool:
    """Trouble with disks, files and memory passes; what sqlite3 says of the data itself (DataError and the like) does not."""
    passing = OSError | MemoryError | Unavailable | sqlite3.OperationalError
    return isinstance(error, passing) or type(error) is sqlite3.DatabaseError


class Complaint:
    """One line when trouble begins, one a minute while it lasts, one when it is over."""

    def __init__(self, say: Callable[[str], None], every_s: float = 60.0) -> None:
        self._say = say
        self._every_s = every_s
        self._said_at: float | None = None

    def say(self, reason: str) -> None:
        now = time.monotonic()
        if self._said_at is None or now - self._said_at >= self._every_s:
            self._said_at = now
            self._say(f"takes nothing now: {reason}")

    def over(self) -> None:
        if self._said_at is not None:
            self._said_at = None
            self._say("takes records again")


def free_bytes(folder: Path) -> int:
    """Bytes that this user may still write there; a large number if the system does not tell."""
    try:
        found = os.statvfs(folder)
    except OSError:
        return 1 << 62
    return found.f_bavail * found.f_frsize
