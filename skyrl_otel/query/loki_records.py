"""Loki's entries as records.

Loki keeps labels and metadata as strings whose names have underscores for dots, so what we know by name gets its name and
type back; anything else keeps the name that Loki gave it. Needs the response encoding `categorize-labels`.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from skyrl_otel.collector.resource import compact_json
from skyrl_otel.query.records import Owner, Record

_RESOURCE = (
    "service.namespace",
    "service.name",
    "service.instance.id",
    "host.name",
    "process.pid",
    "skyrl.run.id",
    "skyrl.channel",
    "skyrl.role",
    "skyrl.rank",
    "ray.job.id",
    "ray.node.id",
    "ray.actor.id",
    "ray.actor.name",
    "ray.actor.class",
    "ray.task.name",
)
_RECORD = (
    "event.name",
    "code.file.path",
    "code.function.name",
    "code.line.number",
    "exception.message",
    "exception.stacktrace",
    "exception.type",
    "process.exit.code",
    "skyrl.exit.clean",
    "skyrl.exit.signal",
    "skyrl.last_line",
    "skyrl.lost.bytes",
    "skyrl.lost.reason",
    "skyrl.oom_kill",
    "skyrl.part",
    "skyrl.part.last",
    "skyrl.step",
    "skyrl.torn",
)
_NUMBERS = frozenset(
    ("process.pid", "skyrl.rank", "code.line.number", "process.exit.code", "skyrl.exit.signal", "skyrl.lost.bytes")
) | {"skyrl.part", "skyrl.step"}
_FLAGS = frozenset(("skyrl.exit.clean", "skyrl.oom_kill", "skyrl.part.last", "skyrl.torn"))

_RESOURCE_NAMES = {name.replace(".", "_"): name for name in _RESOURCE}
_RECORD_NAMES = {name.replace(".", "_"): name for name in _RECORD}
_OWN = frozenset(
    ("observed_timestamp", "severity_number", "severity_text", "scope_name", "detected_level", "log_iostream")
) | {"log_record_uid"}
_UID = re.compile(r"([^/]+)/([^/]+)/(\d{1,18})/(\d{1,18})-(\d{1,18})")


def record_of(labels: dict[str, str], time_unix_nano: int, line: str, metadata: dict[str, str]) -> Record:
    """One entry of a stream with these labels."""
    fields = {**labels, **metadata}
    owner = _owner(tuple(sorted((key, value) for key, value in fields.items() if key in _RESOURCE_NAMES)))
    attributes = {
        _RECORD_NAMES.get(key, key): _typed(_RECORD_NAMES.get(key, key), value)
        for key, value in fields.items()
        if key not in _RESOURCE_NAMES and key not in _OWN
    }
    uid = _UID.fullmatch(fields.get("log_record_uid", ""))
    writer, file, generation, start, end = uid.groups() if uid else ("", "", 0, 0, 0)
    return Record(
        time_unix_nano=time_unix_nano,
        observed_time_unix_nano=_number(fields.get("observed_timestamp")),
        severity_number=_number(fields.get("severity_number")),
        severity_text=fields.get("severity_text", ""),
        scope=fields.get("scope_name", ""),
        body=line,
        stream=fields.get("log_iostream"),
        attributes_json=compact_json(attributes) if attributes else None,
        event_name=fields.get("event_name"),
        resource=owner,
        writer=writer,
        file=file,
        generation=int(generation),
        start=int(start),
        end=int(end),
    )


@lru_cache(4096)
def _owner(fields: tuple[tuple[str, str], ...]) -> Owner:
    return Owner.of({_RESOURCE_NAMES[key]: _typed(_RESOURCE_NAMES[key], value) for key, value in fields})


def _typed(name: str, value: str) -> Any:
    if name in _NUMBERS and re.fullmatch(r"-?\d{1,19}", value):
        return int(value)
    if name in _FLAGS and value in ("true", "false"):
        return value == "true"
    return value


def _number(text: str | None) -> int:
    return int(text) if text and text.isascii() and text.isdigit() else 0
