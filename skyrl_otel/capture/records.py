"""Where this process's frames go: `records.<n>` of its writer's folder, one write(2) a frame.

The descriptor keeps its number for ever; another segment, or another folder, is put behind it with dup2(2), so that a
thread in the middle of its write never meets a closed descriptor or, worse, somebody else's file under that number. Its
number is high, where daemons and `closerange` rarely lead others to. What fails is counted here and told to the agent by
an identity line; nothing waits and nothing raises.
"""

from __future__ import annotations

import fcntl
import os
import resource
import threading
import time
from collections import Counter
from collections.abc import Callable

from skyrl_otel.capture import guard
from skyrl_otel.spool.layout import open_file
from skyrl_otel.spool.writer import WriterFolder

SEGMENT_BYTES = 64 << 20
_RETRY_S = 1.0
_FIRST_NUMBER = 600  # below the usual limit of 1024, above what programs close or use by number

Place = Callable[[], "WriterFolder | None"]
"""Makes or finds the folder this process's records go to; None where it has none. May raise OSError."""


class Records:
    """The open segment. `fd` is -1 while there is none: the first write then fails, and `rescue` looks for a place.

    `size_bytes` is about what the segment holds; threads add to it without a lock. `lost` counts frames by reason, and
    `failing` is True from a loss until a write succeeds again.
    """

    def __init__(self, place: Place) -> None:
        self.fd = -1
        self.size_bytes = 0
        self.failing = False
        self.lost: Counter[str] = Counter()
        self.lost_bytes = 0
        self.folder: WriterFolder | None = None
        self._segment = 0
        self._place = place
        # Held while the segment changes. Only ever tried, never waited for: a signal handler may log within a change.
        self._lock = threading.Lock()
        self._not_before = 0.0

    def use(self, folder: WriterFolder | None) -> None:
        """From now on frames go to the first segment of `folder`; None gives the present one up. Raises OSError."""
        with self._lock:
            if folder is None:
                self._leave()
                return
            self._put_behind(folder.fds["records.0"])
            self.folder, self._segment = folder, 0

    def write(self, frame: bytes) -> bool:
        """Append one frame; whether all of it was taken. The hot path in `handler.py` has these lines in it."""
        try:
            if os.write(self.fd, frame) == len(frame):
                self.size_bytes += len(frame)
                return True
        except OSError as error:
            return self.rescue(frame, error)
        return self.rescue(frame, None)

    def rescue(self, frame: bytes, error: OSError | None) -> bool:
        """A write failed (`error`) or was short: try the next segment, or the first of a new folder; else count it lost."""
        reason = "a short write" if error is None else error.strerror or str(error)
        if time.monotonic() >= self._not_before and self._lock.acquire(blocking=False):
            try:
                self._move_on()
                if os.write(self.fd, frame) == len(frame):
                    self.size_bytes += len(frame)
                    self.failing = False
                    return True
            except OSError as again:
                reason = again.strerror or str(again)
            except Exception as failure:
                guard.counts[f"records.{type(failure).__name__}"] += 1
            finally:
                self._lock.release()
            self._not_before = time.monotonic() + _RETRY_S
        self.lost[reason] += 1
        self.lost_bytes += len(frame)
        self.failing = True
        return False

    def next_segment(self) -> None:
        """The segment is full. Where the next one cannot be made, this one goes on for a while."""
        self.size_bytes = 0
        if self._lock.acquire(blocking=False):
            try:
                self._move_on()
            except OSError as error:
                guard.counts[f"records.next_segment: {error.strerror}"] += 1
            finally:
                self._lock.release()

    def is_removed(self) -> bool:
        """Whether somebody removed the file we write to: write(2) does not tell."""
        try:
            return self.fd >= 0 and os.fstat(self.fd).st_nlink == 0
        except OSError:
            return False

    def start_anew(self) -> None:
        """The folder is gone: go on in another one. Raises OSError where there is none."""
        with self._lock:
            self.lost["the spool was removed"] += 1
            self.folder = None
            self._move_on()

    def after_fork(self) -> None:
        """In a child: the parent's segments are the parent's alone."""
        self._lock = threading.Lock()
        descriptor, self.fd = self.fd, -1
        self.folder, self.failing, self._not_before = None, False, 0.0
        self.lost, self.lost_bytes = Counter(), 0
        if descriptor >= 0:
            os.close(descriptor)

    def _move_on(self) -> None:
        if self.folder is None:
            folder = self._place()
            if folder is None:
                raise OSError("this process has no place in the spool")
            self._put_behind(folder.fds["records.0"])
            self.folder, self._segment = folder, 0
            return
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND
        number = self._segment + 1
        descriptor = open_file(self.folder.path / f"records.{number}", flags)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._segment = number
            self.folder.records_segment = number
            self._put_behind(descriptor)
            self.folder.give_up_first_segment()
        finally:
            os.close(descriptor)

    def _put_behind(self, descriptor: int) -> None:
        if self.fd < 0:
            self.fd = _high(descriptor)
        else:
            try:
                os.dup2(descriptor, self.fd, inheritable=False)
            except OSError:
                self.fd = _high(descriptor)
        self.size_bytes = os.fstat(self.fd).st_size
        self.failing = False

    def _leave(self) -> None:
        # Not closed: a thread may be about to write there. /dev/null takes its frame and its number stays ours.
        if self.fd >= 0:
            null = os.open("/dev/null", os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.dup2(null, self.fd, inheritable=False)
            finally:
                os.close(null)


def _high(descriptor: int) -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    for first in (_first_number(), 100, 10):
        if soft == resource.RLIM_INFINITY or first < soft:
            try:
                return fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, first)
            except OSError:
                continue
    return fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 3)


def _first_number() -> int:
    """The number to look from: `_FIRST_NUMBER`, or less where the kernel's table of descriptors would have to grow for it.

    In a process with threads that waits 10 to 25 ms for an RCU grace period (Linux, fs/file.c: expand_fdtable), and the
    start of each Ray worker would wait along.
    """
    try:
        with open("/proc/self/status", "rb") as status:
            fields = dict(line.split(b":", 1) for line in status)
        room = int(fields[b"FDSize"])
        return _FIRST_NUMBER if int(fields[b"Threads"]) == 1 else min(_FIRST_NUMBER, room * 3 // 4)
    except (OSError, ValueError, KeyError):
        return _FIRST_NUMBER
