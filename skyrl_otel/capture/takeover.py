"""Every record of every `logging.Logger`, whatever the program does to handlers, levels of handlers and propagation.

What it relies on: `Logger.handle` asks `self.filter(record)` before it calls any handler (CPython Lib/logging, 3.0 to 3.14),
and `Logger` takes `filter` from `Filterer`. So `filter`, put on the class `Logger`, sees each record that has passed its
logger's level and filters, also of loggers with `propagate = False`, without handlers, or made later. Nothing that a program
configures replaces a class's attribute. `Handler.filter`, asked before a handler's `emit`, is the same for the console's echo.

Not wrapped: `callHandlers`, `handle`, `emit`. Whoever passes `logging` on to loguru counts the frames between its `emit` and
the log call (`depth=6`), or walks them while their file is `logging`'s; one frame of ours in between would change what the
program prints. A filter has returned before the handlers are called.

A record of another process (`logging.handlers.QueueListener`, `makeLogRecord`) comes to a logger again, or to handlers alone.
It is taken there unless that process has taken it (`kin.py`).

What a process pays: one Python call a record, and what `taker.py` does in it; one call for each handler that is asked.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from typing import Any

from skyrl_otel.capture import guard
from skyrl_otel.capture.console import Console
from skyrl_otel.capture.taker import Take

_installed: dict[str, Any] = {}
_received = threading.local()
_own_processes: set[int | None] = {None, os.getpid()}  # what `process` is in a record that was made here


def is_installed() -> bool:
    """Whether each record is taken already, before any handler sees it."""
    return bool(_installed)


def install(take: Take, console: Console) -> None:
    """Take from now on. A second call changes nothing."""
    if _installed:
        return
    # Under `run` somebody keeps this place for us: `inject/sitecustomize.py`.
    keeper: Any = logging.Logger.filter
    kept = getattr(keeper, "stands_for", None)
    _installed["logger"] = kept[0] if kept else logging.Logger.__dict__.get("filter")
    _installed["handler"] = logging.Handler.__dict__.get("filter")
    _installed["last"] = logging._StderrHandler.__dict__.get("stream")  # type: ignore[attr-defined]
    logger_filter = kept[1] if kept else logging.Logger.filter
    handler_filter = logging.Handler.filter
    failed = guard.failed
    is_plain = logger_filter is logging.Filterer.filter
    is_handlers_plain = handler_filter is logging.Filterer.filter
    own = _own_processes

    def filter_of_logger(self: logging.Logger, record: logging.LogRecord, /) -> Any:
        if is_plain and not self.filters:  # what `Filterer.filter` does then
            take(record)
            return True
        passed: Any = logger_filter(self, record)
        if passed:
            # Since 3.12 a filter may put another record in its place.
            take(passed if isinstance(passed, logging.LogRecord) else record)
        return passed

    def filter_of_handler(self: logging.Handler, record: logging.LogRecord, /) -> Any:
        passed = True if is_handlers_plain and not self.filters else handler_filter(self, record)
        if passed and record.process not in own and getattr(_received, "record", None) is not record:
            arrived(record)
            take(record)
        if passed and console.modes:
            try:
                fields = self.__dict__
                stream = fields.get("stream")
                if stream is not None:
                    instead = console.stand_in(stream)
                    if instead is None:
                        return passed if console.must_show(record) else False
                    if instead is not stream:
                        self.stream = instead  # type: ignore[attr-defined]
                elif "console" in fields:
                    return passed if _rich(self, console) or console.must_show(record) else False
                elif type(self) is last_type and console.stand_in(sys.stderr) is None:
                    return passed if console.must_show(record) else False
            except Exception as error:
                failed("takeover.console", error)
        return passed

    last_type = logging._StderrHandler  # type: ignore[attr-defined]
    logging.Logger.filter = filter_of_logger  # type: ignore[method-assign, assignment]
    logging.Handler.filter = filter_of_handler  # type: ignore[method-assign, assignment]
    if kept:
        keeper.taken_over = True
    last_type.stream = property(lambda self: console.stand_in(sys.stderr) or sys.stderr)


def remove() -> None:
    """Put back what was there, unless somebody has put something over it."""
    if not _installed:
        return
    for kind, key in ((logging.Logger, "logger"), (logging.Handler, "handler")):
        if getattr(kind.filter, "__module__", "") == __name__:
            if _installed[key] is None:
                del kind.filter
            else:
                kind.filter = _installed[key]  # type: ignore[method-assign]
    logging._StderrHandler.stream = _installed["last"]  # type: ignore[attr-defined]
    _installed.clear()


def arrived(record: logging.LogRecord) -> None:
    """A record of another process has come to a logger here, or to a first handler: further ones ask for nothing."""
    _received.record = record


def is_loguru_s(record: logging.LogRecord) -> bool:
    """Whether loguru makes this record of one of its own, which we have: for a `logging.Handler` that is its sink."""
    extra = record.__dict__.get("extra")
    if extra is None:
        return False
    tap = sys.modules.get("skyrl_otel.capture.loguru_tap")
    return tap is not None and tap.current_extra() is extra


def _rich(handler: Any, console: Console) -> bool:
    """Point a handler like rich's at where echoes go; False where it should not be called. It writes by `console.file`."""
    rich = handler.console
    file = getattr(rich, "file", None)
    if file is None:
        return True
    instead = console.stand_in(file)
    if instead is None:
        return False
    if instead is not file and hasattr(rich, "_file"):
        # A console of its own with everything else shared: others may print to this one.
        kind: Any = type(rich)
        own = kind.__new__(kind)
        own.__dict__.update(rich.__dict__)
        own._file = instead
        handler.console = own
    return True


def _in_child() -> None:
    _own_processes.clear()
    _own_processes.update((None, os.getpid()))


os.register_at_fork(after_in_child=_in_child)
