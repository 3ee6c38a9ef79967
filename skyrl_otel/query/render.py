"""Records as people or programs read them: the text file's line, coloured on a terminal, or one JSON object a line."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable

from skyrl_otel.collector.text import Clock, message, severity_name, visible, who
from skyrl_otel.query.records import Owner, Record

Paint = Callable[[str], str]

_WHO_COLOURS = ("cyan", "green", "magenta", "blue", "bright_cyan", "bright_green", "bright_magenta", "bright_blue")
_SEVERITY_STYLES = {"ERROR": "bold red", "FATAL": "bold red", "WARN": "yellow", "DEBUG": "dim", "TRACE": "dim"}


class Lines:
    """Records to lines: ``time severity node who message``.

    Args:
        colour: with terminal colours.
    """

    def __init__(self, *, colour: bool) -> None:
        self._clock = Clock()
        self._owners: dict[str, str] = {}
        self._paint = _painter() if colour else _plain

    def line(self, record: Record) -> str:
        """One line for each record (more if its body has more), newline included, safe on a terminal."""
        owner = self._owners.get(record.resource.attributes)
        if owner is None:
            owner = self._owners[record.resource.attributes] = self._owner(record.resource)
        name = severity_name(record.severity_number)
        text = record.severity_text if 0 < len(record.severity_text) <= 8 else name
        severity = self._paint(_SEVERITY_STYLES.get(name, ""), f"{visible(text):<5}")
        body = record.body if isinstance(record.body, str) else json.dumps(record.body, ensure_ascii=False)
        time = self._paint("dim", self._clock.show(record.time_unix_nano))
        return f"{time} {severity} {owner} {message(body)}\n"

    def _owner(self, resource: Owner) -> str:
        name = visible(who(resource))
        # The same colour for the same writer in every run of this command, which Python's own hash does not give.
        colour = _WHO_COLOURS[zlib.crc32(name.encode("utf-8", "replace")) % len(_WHO_COLOURS)]
        return f"{visible(resource.node or '-')} {self._paint(colour, name)}"


def json_line(record: Record) -> str:
    """One JSON object, newline included. ASCII only, so that no terminal obeys what a body holds."""
    return (
        json.dumps(
            {
                "time_unix_nano": record.time_unix_nano,
                "observed_time_unix_nano": record.observed_time_unix_nano,
                "severity_number": record.severity_number,
                "severity_text": record.severity_text,
                "scope": record.scope,
                "body": record.body,
                "attributes": record.attributes,
                "resource": record.resource.fields,
            }
        )
        + "\n"
    )


def _plain(style: str, text: str) -> str:
    return text


def _painter() -> Callable[[str, str], str]:
    # Imported here: a pipe, the usual reader of long outputs, needs none of it.
    from rich.color import ColorSystem
    from rich.style import Style

    styles: dict[str, Style] = {}

    def paint(style: str, text: str) -> str:
        if not style:
            return text
        if style not in styles:
            styles[style] = Style.parse(style)
        return styles[style].render(text, color_system=ColorSystem.STANDARD)

    return paint
