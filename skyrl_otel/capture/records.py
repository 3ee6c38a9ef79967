"""Where this process's frames go: `records.<n>` of its writer's folder, one write(2) a frame.

The descriptor keeps its number for ever; another segment, or another folder, is put behind it with dup2(2), so that a
thread in the middle of its write never meets a closed descriptor or, worse, somebody else's file under that number. Its
number is high, where daemons and `closerange` rarely lead others to. What fails is counted here and told to the agent by
an identity line; nothing raises, and a thread waits only while another one makes the place that both write to.
"""

from __future__ import annotations

import fcntl
import os
import resource
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from skyrl_otel.capture import guard
from skyrl_otel.spool import frames
from skyrl_otel.spool.layout import open_file
from skyrl_otel.spool.writer import WriterFolder

SEGMENT_BYTES = 64 << 20
_RETRY_S = 1.0
_WAIT_S = 1.0  # making a folder takes a millisecond
_FIRST_NUMBER = 600  # below the usual limit of 1024, above what programs close or use by number

_SHORT = "a short write"
_REMOVED = "the spool was removed"

Place = Callable[[], "WriterFolder | None"]
"""Makes or finds the folder this process's records go to; None where it has none. May raise OSError."""


class Records:
    """The open segment. `fd` is -1 while there is none and while it takes nothing: then each write comes to `rescue`.

    `size_bytes` is about what the segment holds; threads add to it without a lock. `lost` counts records by reason, and
    `failing` is True from a loss until a write succeeds again. `on_loss` is called, in the middle of a log call, after a
    loss and after the first record that was taken behind one.
    `untaken` is the last log record that no frame could be made of.
    """

    def __init__(self, place: Place) -> None:
        self.fd = -1
        self.size_bytes = 0
        self.failing = False
        self.lost: Counter[str] = Counter()
        self.lost_bytes = 0
        self.untaken: Any = None
        self.folder: WriterFolder | None = None
        self.on_loss: Callable[[], None] = lambda: None
        self._number = -1  # the descriptor, which `fd` is while it takes something
        self._segment = 0
        self._place = place
        # Held while the segment changes. Re-entrant: a signal handler or a finaliser may log within a change. It finds
        # `_busy`, and what it logs is written behind the record of the call that it interrupted.
        self._lock = threading.RLock()
        self._busy = False
        self._inside: deque[bytes] = deque()
        self._not_before = 0.0
        self._no_place = ""  # why there is none
        self._delivered = (0, 0)  # segment, offset

    def use(self, folder: WriterFolder | None) -> None:
        """From now on frames go to the first segment of `folder`; None gives the present one up. Raises OSError."""
        with self._lock, self._change():
            if folder is None:
                self._leave()
                return
            self.failing = False
            self._enter(folder)

    def write(self, frame: bytes) -> bool:
        """Append one frame; whether all of it was taken. The hot path in `taker.py` has these lines in it."""
        try:
            if os.write(self.fd, frame) == len(frame):
                self.size_bytes += len(frame)
                return True
        except OSError as error:
            return self.rescue(frame, error)
        return self.rescue(frame, None)

    def rescue(self, frame: bytes, error: OSError | None) -> bool:
        """A write failed (`error`) or was short: try the next segment, or the first of a new folder; else count it lost."""
        lock = self._lock
        if not lock.acquire(timeout=_WAIT_S):
            self._lose(frame, "no place for it was made in time")
            return False
        try:
            if self._busy:
                self._inside.append(frame)
                return True
            with self._change():
                taken = self._save(frame, _SHORT if error is None else "")
            self._save_inside()
            return taken
        finally:
            lock.release()

    def next_segment(self) -> None:
        """The segment is full. Where the next one cannot be made, this one goes on for a while."""
        self.size_bytes = 0
        lock = self._lock
        if not lock.acquire(blocking=False):
            return
        try:
            if self._busy:
                return
            with self._change():
                self._move_on()
            self._save_inside()
        except OSError as error:
            guard.counts[f"records.next_segment ({error.strerror})"] += 1
        finally:
            lock.release()

    def look_after(self) -> None:
        """Find out what write(2) does not tell, that somebody removed our file, and go on in another folder.

        Raises OSError where there is none; then records are lost, and counted, until there is.
        """
        with self._lock:
            folder = self.folder
            if folder is None or self._number < 0:
                return
            if os.fstat(self._number).st_nlink:
                # What is delivered by now is what is not lost when it is removed next.
                self._delivered = _delivered(folder)
                return
            with self._change():
                self._start_anew()
            self._save_inside()

    def after_fork(self) -> None:
        """In a child: the parent's segments are the parent's alone."""
        self._lock = threading.RLock()
        self._busy, self._inside = False, deque()
        descriptor, self.fd, self._number = self._number, -1, -1
        self.folder, self.failing, self._not_before, self._no_place = None, False, 0.0, ""
        self.lost, self.lost_bytes = Counter(), 0
        if descriptor >= 0:
            os.close(descriptor)

    # -- with the lock held --------------------------------------------------------------------------------------------

    @contextmanager
    def _change(self) -> Iterator[None]:
        self._busy = True
        try:
            yield
        finally:
            self._busy = False

    def _save_inside(self) -> None:
        """What was logged within a change by the thread that made it."""
        while self._inside:
            with self._change():
                self._save(self._inside.popleft(), "")

    def _save(self, frame: bytes, reason: str) -> bool:
        """`reason` is why not where the segment is; "" asks it (again): another thread may have put one there since."""
        reason = reason or self._try(frame)
        if reason and time.monotonic() >= self._not_before and self._would_another_help():
            try:
                self._move_on()
                reason = self._try(frame)
            except OSError as error:
                reason = error.strerror or str(error)
            except Exception as failure:
                guard.counts[f"records.{type(failure).__name__}"] += 1
            if reason:
                self._not_before, self._no_place = time.monotonic() + _RETRY_S, reason
        if reason:
            if self.folder is None:
                reason = self._no_place or reason
            # From here on each record comes to `rescue`, and the first one that is taken ends that.
            self.fd = -1
            self._lose(frame, reason)
        return not reason

    def _try(self, frame: bytes) -> str:
        """Write it; return why it could not be written, or nothing."""
        try:
            if os.write(self._number, frame) != len(frame):
                return _SHORT
        except OSError as error:
            return error.strerror or str(error)
        self.size_bytes += len(frame)
        self.fd = self._number
        if self.failing:
            self.failing = False
            self.on_loss()
        return ""

    def _lose(self, frame: bytes, reason: str) -> None:
        self.lost[reason] += 1
        self.lost_bytes += len(frame)
        self.failing = True
        self.on_loss()

    def _would_another_help(self) -> bool:
        """Not where an empty segment takes nothing: a full disk would get one after the other."""
        try:
            return self.folder is None or os.fstat(self._number).st_size > 0
        except OSError:
            return True

    def _start_anew(self) -> None:
        segment, offset = self._delivered
        start = offset if segment == self._segment else 0
        self.folder, self._delivered = None, (0, 0)
        gone = os.open(f"/proc/self/fd/{self._number}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._move_on()
        except OSError:
            self.fd, self.failing = -1, True
            raise
        finally:
            # Behind the change, since until then other threads write there.
            for size in frames.sizes(gone, start):
                self.lost[_REMOVED] += 1
                self.lost_bytes += size
            os.close(gone)

    def _move_on(self) -> None:
        if self.folder is None:
            folder = self._place()
            if folder is None:
                raise OSError("this process has no place in the spool")
            self._enter(folder)
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

    def _enter(self, folder: WriterFolder) -> None:
        self._put_behind(folder.fds["records.0"])
        self.folder, self._segment = folder, 0

    def _put_behind(self, descriptor: int) -> None:
        number = self._number
        if number < 0:
            number = _high(descriptor)
        else:
            try:
                os.dup2(descriptor, number, inheritable=False)
            except OSError:
                number = _high(descriptor)
        self._number = number
        self.fd = -1 if self.failing else number  # the first record that is taken again is `rescue`'s, which says so
        self.size_bytes = os.fstat(number).st_size

    def _leave(self) -> None:
        # Not closed: a thread may be about to write there. /dev/null takes its frame and its number stays ours.
        if self._number >= 0:
            null = os.open("/dev/null", os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.dup2(null, self._number, inheritable=False)
            finally:
                os.close(null)


def _delivered(folder: WriterFolder) -> tuple[int, int]:
    from skyrl_otel.spool.checkpoint import Checkpoint  # for the watch thread: a worker's start does not wait for it

    try:
        position = Checkpoint.read(folder.path / "checkpoint").files.get("records")
    except (OSError, ValueError, KeyError, TypeError):
        return 0, 0
    return (0, 0) if position is None else (position.generation, position.offset)


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
