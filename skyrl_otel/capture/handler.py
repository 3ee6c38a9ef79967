"""`OTelLogHandler`, and the one place where records, takeover, loguru and console are put together for a process."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

from skyrl_otel.capture import guard, takeover
from skyrl_otel.capture.console import Console, Mode
from skyrl_otel.capture.kin import Kin
from skyrl_otel.capture.levels import Levels
from skyrl_otel.capture.records import Place, Records
from skyrl_otel.capture.taker import Take, make_take

_TELL_S = 1.0
# Places at which our errors are told of in the identity, for `skyrl-otel doctor`.
_OURS = ("console.", "handler.", "loguru.", "records.", "takeover.")


class Recording:
    """All that takes records in this process. One per runtime."""

    def __init__(self, place: Place, levels: Levels, kin: Kin) -> None:
        self.records = Records(place)
        self.console = Console(self.records)
        self.take: Take = make_take(self.records, levels, takeover.is_loguru_s, self._is_elsewhere)
        self._kin = kin
        self._levels = levels
        self._is_over = False
        self._told: dict[str, Any] = {}
        self._told_at = 0.0
        self._telling = threading.Lock()  # only ever tried: a signal handler may log, and lose it, within a telling

    def start(self) -> None:
        """Take every record from now on."""
        takeover.install(self.take, self.console)
        from skyrl_otel.capture.postimport import after_import

        after_import("loguru", self._tap)

    def _is_elsewhere(self, record: logging.LogRecord) -> bool:
        takeover.arrived(record)
        return record.process is not None and self._kin.took(record.process, record.created)

    def _tap(self, _: ModuleType) -> None:
        if self._is_over:  # it was still waiting for the import; a later recording waits behind it
            return
        from skyrl_otel.capture import loguru_tap

        loguru_tap.install(self.records, self._levels, self.console)

    def stop(self) -> None:
        """Give everything back, for good."""
        self._is_over = True
        self.console.modes.clear()
        takeover.remove()
        import sys

        tap = sys.modules.get("skyrl_otel.capture.loguru_tap")
        if tap is not None:
            tap.remove()
        with guard.guarded("recording.stop"):
            self.records.use(None)

    def close(self) -> None:
        """Let the folder go that records were given when their first one was gone. After `stop`."""
        if self.records.folder is not None:
            self.records.folder.close()

    def echo(self, modes: dict[int, Mode], nonce: bytes = b"") -> None:
        """What becomes of the console's echo on descriptors 1 and 2 from now on."""
        self.console.watch(modes, nonce)

    def look_after(self) -> None:
        """For the watch thread and the exit: find out what was lost, and say so. Raises OSError."""
        try:
            self.records.look_after()
        finally:
            self.tell_losses()

    def after_fork(self) -> None:
        """In a child: it has a place of its own, and no watch thread that would tell what it loses."""
        self.records.after_fork()
        self.records.on_loss = self._tell_soon
        self._told, self._told_at, self._telling = {}, 0.0, threading.Lock()

    def _tell_soon(self) -> None:
        """Once a second while records are lost, and when that has ended."""
        if self.records.failing and time.monotonic() - self._told_at < _TELL_S:
            return
        with guard.guarded("records.tell"):
            self.tell_losses()

    def tell_losses(self) -> None:
        """Say in an identity line what could not be recorded, where that is news; the agent counts it, `doctor` shows it.

        Raises OSError; then it is said next time.
        """
        if not self._telling.acquire(blocking=False):
            return
        try:
            self._tell()
        finally:
            self._telling.release()

    def _tell(self) -> None:
        records = self.records
        news: dict[str, Any] = {}
        if records.lost:
            why = records.lost.most_common(1)[0][0]
            news["lost"] = {"records": sum(records.lost.values()), "bytes": records.lost_bytes, "why": why}
        # Keys with a colon repeat others with the text of an exception, which may say anything.
        errors = {key: count for key, count in guard.counts.items() if key.startswith(_OURS) and ":" not in key}
        if errors:
            news["errors"] = errors
        if news != self._told and records.folder is not None:
            self._told_at = time.monotonic()
            records.folder.publish(news)
            self._told = news


_current: Callable[[], Recording | None] = lambda: None  # noqa: E731


def provide(current: Callable[[], Recording | None]) -> None:
    """Where `OTelLogHandler` finds this process's recording. The runtime says it."""
    global _current
    _current = current


class OTelLogHandler(logging.Handler):
    """A standard handler whose records go to the spool, one frame each, with all they know.

    `attach()` takes every record without it; then this one adds nothing and repeats nothing. It is for programs that want
    the records of chosen loggers alone: it starts the recording (`SKYRL_OTEL_*` as ever) without taking over `logging`.

    Args:
        level: the lowest level it takes.
    """

    def __init__(self, level: int | str = logging.NOTSET) -> None:
        super().__init__(level)
        from skyrl_otel.capture import attach

        attach.start_records()

    def createLock(self) -> None:
        """None: one record is one write(2), and a signal handler that logs must not wait for its own thread."""
        self.lock = None

    def emit(self, record: logging.LogRecord) -> None:
        """Write the record; never raises."""
        if takeover.is_installed():
            return
        recording = _current()
        if recording is not None:
            recording.take(record)
