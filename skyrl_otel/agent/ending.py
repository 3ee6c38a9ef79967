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
from dataclasses import dataclass
from pathlib import Path

# _IOWR(PIDFS_IOCTL_MAGIC 0xFF, 11, struct pidfd_info of 64 bytes, PIDFD_INFO_SIZE_VER0)
_GET_INFO = 3 << 30 | 64 << 16 | 0xFF << 8 | 11
_INFO_EXIT = 1 << 3
_INFO = struct.Struct("<QQ11Ii")


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
