"""The text files people grep: one line for each record, and nothing in it that a terminal would obey.

A line is ``time severity node who message``. What a model prints must not be able to look like another line or to send
escape sequences: further lines of a body are indented, colours are taken out, other control characters are shown.
"""

from __future__ import annotations

import json
import os
import re
import stat
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # the reader's commands use this file, and need not wait for protobuf
    from skyrl_otel.collector.decode import Row
    from skyrl_otel.collector.resource import Resource
    from skyrl_otel.collector.routes import Router

_SEVERITIES = ("TRACE", "DEBUG", "INFO", "WARN", "ERROR", "FATAL")
# ECMA-48 SGR (colours), then OSC 8 style strings, which end in BEL or ST: both carry no text of their own.
_COLOUR = re.compile(r"\x1b\[[0-9;:]*m|\x1b\][^\x07\x1b\n]{0,2000}(?:\x07|\x1b\\)")
# C0 but tab and newline, DEL, C1, the Unicode line separators that editors break at, and the bidirectional overrides
# that make a line read as what it is not (CVE-2021-42574).
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
_INDENT = "\n    "


def severity_name(number: int) -> str:
    """OTLP's SeverityNumber as a word of at most five letters, "-" where it is not given."""
    return _SEVERITIES[min((number - 1) // 4, 5)] if number > 0 else "-"


def visible(text: str) -> str:
    """`text` without colours, with control characters shown as \\xNN or \\uNNNN. Tabs and newlines stay."""
    if text.isprintable():  # one pass in C, and true for nearly every line
        return text
    return _CONTROL.sub(_show, _COLOUR.sub("", text))


def _show(match: re.Match[str]) -> str:
    code = ord(match[0])
    if code == 0x0D:
        return "\\r"
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def message(body: str | bytes) -> str:
    """A body as it stands in the text file: further lines indented."""
    text = body if isinstance(body, str) else body.decode("utf-8", "replace")
    if text.isprintable():
        return text
    return visible(text.rstrip("\r\n").replace("\r\n", "\n")).replace("\n", _INDENT)


def who(resource: Resource) -> str:
    """Component and rank, or the actor, or the task: whatever names the writer best in one word."""
    component = resource.service or resource.role or "process"
    if resource.rank is not None:
        return f"{component}/{resource.rank}"
    if resource.actor_name:
        return resource.actor_name
    if resource.actor_class or resource.actor_id:
        return f"{resource.actor_class or 'actor'}:{(resource.actor_id or '')[:8]}".rstrip(":")
    return resource.task or component


class Clock:
    """Nanoseconds since 1970 as local time with milliseconds. Keeps the last second: lines come in bunches."""

    def __init__(self) -> None:
        self._second = -1
        self._shown = ""

    def show(self, unix_nano: int) -> str:
        second, rest = divmod(unix_nano, 1_000_000_000)
        if second != self._second:
            try:
                self._shown = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(second))
            except (OverflowError, ValueError, OSError):
                self._shown = "0000-00-00 00:00:00"
            self._second = second
        return f"{self._shown}.{rest // 1_000_000:03d}"


class Waiting(NamedTuple):
    """The key of lines that wait until their process is placed; `otherwise` is their file's key if it never is."""

    process: str
    otherwise: str


class LineFormat:
    """Rows to lines."""

    def __init__(self, router: Router | None = None) -> None:
        self._clock = Clock()
        self._router = router
        self._owners: dict[str, str] = {}

    def lines(self, rows: Iterable[Row], resources: Sequence[Resource]) -> dict[str | Waiting, list[str]]:
        """Lines by the key of their file (see `Texts`), newlines included."""
        if self._router:
            return self._routed(rows, resources, self._router)
        lines: dict[str | Waiting, list[str]] = {"infra": [], "progress": []}
        last: tuple[int, int, int, str | None] | None = None
        beginning = ""
        into = lines["infra"]
        for row in rows:
            facts = (row.time, row.resource, row.severity, row.severity_text)
            if facts != last:  # what a writer wrote at once has all of it in common
                last = facts
                resource = resources[row.resource]
                beginning = self._beginning(row, resource)
                into = lines["progress" if resource.channel == "progress" else "infra"]
            into.append(f"{beginning}{_child(row)}{message(row.body)}\n")
        return lines

    def _routed(
        self, rows: Iterable[Row], resources: Sequence[Resource], router: Router
    ) -> dict[str | Waiting, list[str]]:
        lines: dict[str | Waiting, list[str]] = {}
        now_s = time.monotonic()
        for row in rows:
            resource = resources[row.resource]
            path, process = router.route(row, resource, now_s)
            file = f"route:{path}" if path else "progress" if resource.channel == "progress" else "infra"
            key = Waiting(process, file) if process else file
            lines.setdefault(key, []).append(f"{self._beginning(row, resource)}{_child(row)}{message(row.body)}\n")
        return lines

    def _beginning(self, row: Row, resource: Resource) -> str:
        owner = self._owners.get(resource.attributes)
        if owner is None:
            owner = self._owners[resource.attributes] = _one_word(resource.node or "-") + " " + _one_word(who(resource))
        severity = row.severity_text if row.severity_text and len(row.severity_text) <= 8 else ""
        severity = _one_word(severity) if severity else severity_name(row.severity)
        return f"{self._clock.show(row.time)} {severity:<5} {owner} "


def _child(row: Row) -> str:
    """The prefix by which a child of the writer named itself, as it printed it: the agent made attributes of it."""
    if not row.attributes or '"skyrl.child"' not in row.attributes:
        return ""
    said = json.loads(row.attributes)
    return f"({visible(str(said.get('skyrl.child')))} pid={visible(str(said.get('process.pid', '?')))}) "


def _one_word(text: str) -> str:
    return re.sub(r"\s+", "_", visible(text))


class TextFile:
    """An append-only file whose length belongs to the store's transaction.

    `committed` is the length that the last commit knows; whatever is behind it goes at the next `revert`.
    """

    def __init__(self, path: Path, committed: int) -> None:
        """Open or make the file and cut it to `committed`. Raises OSError."""
        self.path = path
        self.committed = self._length = 0
        self._fd = -1
        self._dirty = False
        self._open(committed)

    @property
    def length(self) -> int:
        """The length to store with the rows."""
        return self._length

    def append(self, data: bytes) -> None:
        """Write behind what is there. Raises OSError, with nothing of `data` in the file."""
        if self._dirty:
            self.revert()
        found = os.fstat(self._fd)
        if found.st_nlink == 0:
            # Somebody removed the file; lines go on in a new one of that name rather than into the void.
            os.close(self._fd)
            self._open(0)
        elif found.st_size < self._length:  # somebody emptied it, as `> file` or a log rotation by copy does
            self.committed = self._length = found.st_size
        view = memoryview(data)
        try:
            while view:
                written = os.write(self._fd, view)
                self._length += written
                view = view[written:]
        except OSError:
            self._dirty = True
            self.revert()
            raise

    def settle(self) -> None:
        """The transaction is committed."""
        if not self._dirty:  # else what is behind the commit could not be cut off yet
            self.committed = self._length

    def revert(self) -> None:
        """The transaction failed: cut back to the committed length. Raises OSError."""
        self._dirty = True
        # Never longer than it is: ftruncate would fill up with zeros.
        self.committed = min(self.committed, os.fstat(self._fd).st_size)
        os.ftruncate(self._fd, self.committed)
        self._length, self._dirty = self.committed, False

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _open(self, committed: int) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        self._fd = os.open(self.path, flags, 0o600)
        found = os.fstat(self._fd)
        if not stat.S_ISREG(found.st_mode):
            os.close(self._fd)
            raise OSError(f"{self.path} is not a plain file")
        # Shorter than committed: somebody emptied it. What is gone is gone; the store has the rows.
        self.committed = self._length = min(committed, found.st_size)
        if found.st_size > committed:
            os.ftruncate(self._fd, committed)
