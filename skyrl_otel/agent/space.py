"""What the spool takes of the disk: checkpoints, behind which space is given back, and what goes when there is too little."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from skyrl_otel.agent.ballast import Ballast
from skyrl_otel.agent.status import Tally
from skyrl_otel.agent.writer import Writer
from skyrl_otel.spool.layout import RunDir

_RESERVED_BYTES = 256 << 20
_AT_ONCE_BYTES = 1 << 20


class Space:
    """Of one run's folder, of which undelivered bytes may take `most_bytes`. Nothing here raises OSError."""

    def __init__(self, run: RunDir, most_bytes: int, tally: Tally) -> None:
        self._run = run
        self._most_bytes = most_bytes
        self._tally = tally
        self._ballast = Ballast(run.path / "ballast")
        self._behind: set[str] = set()  # writers whose checkpoint could not be written

    def keep(self, writers: Mapping[str, Writer]) -> None:
        """Have the ballast, and write the checkpoints that are behind, if there is room by now."""
        self._ballast.keep()
        self._behind &= writers.keys()
        for writer_id in list(self._behind):
            self.checkpoint(writers[writer_id])

    def checkpoint(self, writer: Writer) -> None:
        """Write the writer's checkpoint, now or as soon as there is room."""
        try:
            self._ballast.with_room(writer.write_checkpoint)
            self._behind.discard(writer.writer_id)
        except OSError as error:
            self._behind.add(writer.writer_id)  # and with it the space behind it, which is what a full disk needs
            self._tally.error = f"cannot write a checkpoint: {error.strerror}"

    def bound(self, writers: Sequence[Writer]) -> None:
        """Past the cap, or with the disk nearly full, the oldest bytes that are not under way go.

        Args:
            writers: all that may have a backlog.
        """
        backlog = sum(writer.backlog_bytes for writer in writers if "follow" not in writer.facts)
        if not backlog:
            return
        excess = backlog - self._most_bytes
        why = "the spool reached its cap (SKYRL_OTEL_SPOOL_MAX)" if excess > 0 else "the spool's disk is nearly full"
        excess = max(excess, self._short_bytes())
        if excess <= 0:
            return
        try:
            for writer in sorted(writers, key=lambda writer: -writer.backlog_bytes):
                excess -= self._give_up(writer, excess, why)
                if excess <= 0:
                    return
        except OSError as error:
            self._tally.error = f"cannot bound the spool: {error.strerror}"

    def _short_bytes(self) -> int:
        """How much the disk has too little."""
        try:
            disk = os.statvfs(self._run.path)
        except OSError:
            return 0
        return min(_RESERVED_BYTES, disk.f_blocks * disk.f_frsize // 20) - disk.f_bavail * disk.f_frsize

    def _give_up(self, writer: Writer, excess: int, why: str) -> int:
        """About `excess` bytes of one writer; how many it were. Raises OSError."""
        gone = 0
        for file in writer.files.values():
            if gone < excess:
                gone += file.give_up(min(excess - gone + _AT_ONCE_BYTES, file.unsent), why)
        self._ballast.with_room(writer.flush)
        for file in writer.files.values():
            file.punch_losses()
        return gone
