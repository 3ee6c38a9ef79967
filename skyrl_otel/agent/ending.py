"""How a process ended, for one that is not our child.

A pidfd becomes readable at the exit. Since Linux 6.15 it also tells the wait status, after the parent has reaped
(PIDFD_GET_INFO with PIDFD_INFO_EXIT, include/uapi/linux/pidfd.h); before that only clean or not is known.
"""

from __future__ import annotations

import fcntl
import os
import select
import signal
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# _IOWR(PIDFS_IOCTL_MAGIC 0xFF, 11, struct pidfd_info of 64 bytes, PIDFD_INFO_SIZE_VER0)
_GET_INFO = 3 << 30 | 64 << 16 | 0xFF << 8 | 11
_INFO_EXIT = 1 << 3
_INFO = struct.Struct("<QQ11Ii")

_EXIT_STATUS_WAIT_NS = 500_000_000


@dataclass(frozen=True, slots=True)
class Exit:
    """`code` or `signal` is None where it is not known."""

    code: int | None = None
    signal: int | None = None

    def describe(self) -> str:
        if self.signal is not None:
            try:
                return f"killed by {signal.Signals(self.signal).name}"
            except ValueError:
                return f"killed by signal {self.signal}"
        return "ended in an unknown way" if self.code is None else f"exited with code {self.code}"


class Ending:
    """The process of one writer, from when its pid is known to its end. `pidfd` is None where the kernel cannot tell of it."""

    __slots__ = ("_ended_at", "_oom_kills", "pidfd")

    def __init__(self) -> None:
        self.pidfd: int | None = None
        self._ended_at = 0
        self._oom_kills = oom_kills()

    def watch(self, pid: int, is_alive: Callable[[], bool]) -> None:
        """`is_alive` asks the writer's locks."""
        self.pidfd = open_pidfd(pid)
        if self.pidfd is not None and not is_alive():
            self.close()  # gone before we looked: the number may be another process's by now

    @property
    def is_due(self) -> bool:
        """The process is known to be gone."""
        return self.pidfd is not None and has_ended(self.pidfd)

    def exit(self, goodbye: Any, now: int) -> Exit | None:
        """How the process, which is gone, ended; None while that may still become known.

        Args:
            goodbye: what it, or the parent that reaped it, said last (docs/contracts.md).
            now: in nanoseconds.
        """
        self._ended_at = self._ended_at or now
        known = exit_of(self.pidfd) if self.pidfd is not None else Exit()
        if known != Exit():
            return known
        if isinstance(goodbye, dict) and isinstance(goodbye.get("signal"), int):
            return Exit(signal=goodbye["signal"])
        if isinstance(goodbye, dict) and isinstance(goodbye.get("code"), int):
            return Exit(code=goodbye["code"])
        if self.pidfd is not None and now - self._ended_at < _EXIT_STATUS_WAIT_NS:
            return None  # its parent has not reaped it yet
        return known

    def describe(self, known: Exit, facts: Mapping[str, Any], last: str) -> dict[str, object]:
        """The value of the `end` decision. `last` is the last line of what the process wrote."""
        goodbye = facts.get("goodbye")
        return {
            "name": "skyrl.process.end",
            "code": known.code,
            "signal": known.signal,
            "clean": isinstance(goodbye, dict) and "signal" not in goodbye,
            "fine": _ended_well(known, facts),
            # Ray's workers exit with 1, without a word, when their raylet or job is gone.
            "by_ray": known.code == 1 and "worker_id" in facts,
            "how": known.describe(),
            "oom": oom_kills() > self._oom_kills,
            "last": last,
        }

    def close(self) -> None:
        if self.pidfd is not None:
            os.close(self.pidfd)
            self.pidfd = None


def _ended_well(known: Exit, facts: Mapping[str, Any]) -> bool:
    goodbye = facts.get("goodbye")
    if not isinstance(goodbye, dict) or goodbye.get("code") or "signal" in goodbye:
        return known.code == 0
    # Ray ends its workers by SIGTERM when a job is over; their exit handlers run and they exit with code 1.
    return known.signal is None and (not known.code or "worker_id" in facts)


def open_pidfd(pid: int) -> int | None:
    """A pidfd, or None where the process is gone or the kernel has none (before 5.3)."""
    try:
        return os.pidfd_open(pid)
    except (OSError, AttributeError):
        return None


def has_ended(pidfd: int) -> bool:
    poll = select.poll()  # select(2) takes no descriptor from 1024 on
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def exit_of(pidfd: int) -> Exit:
    """The wait status, if it is known by now: it is not before the parent has reaped the process."""
    buffer = bytearray(64)
    struct.pack_into("<Q", buffer, 0, _INFO_EXIT)
    try:
        fcntl.ioctl(pidfd, _GET_INFO, buffer)
    except OSError:
        return Exit()
    mask, *_, status = _INFO.unpack_from(buffer)
    if not mask & _INFO_EXIT:
        return Exit()
    number = status & 0x7F
    return Exit(signal=number) if number else Exit(code=status >> 8 & 0xFF)


def oom_kills() -> int:
    """How many processes of our cgroup the kernel killed for memory so far; 0 where that is not told."""
    try:
        group = Path("/proc/self/cgroup").read_text().strip().rpartition("::")[2].strip("/")
    except OSError:
        group = ""
    for folder in (Path("/sys/fs/cgroup") / group, Path("/sys/fs/cgroup")):
        try:
            for line in (folder / "memory.events").read_text().splitlines():
                if line.startswith("oom_kill "):
                    return int(line.split()[1])
        except (OSError, ValueError):
            continue
    return 0
