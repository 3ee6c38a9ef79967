"""Records as a process left them in the spool, read with the official protobuf classes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.proto.logs.v1.logs_pb2 import LogRecord, ScopeLogs

from skyrl_otel.spool import frames


@dataclass(frozen=True)
class Taken:
    """One record: its logger, message, severity and attributes."""

    scope: str
    body: str
    severity: int
    level: str
    attributes: dict[str, Any]
    raw: LogRecord


def plain(value: AnyValue) -> Any:
    """An AnyValue as Python has it."""
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [plain(item) for item in value.array_value.values]
    if kind == "kvlist_value":
        return {pair.key: plain(pair.value) for pair in value.kvlist_value.values}
    return getattr(value, kind) if kind else None


def decode(payload: bytes) -> Taken:
    """The one record of a frame."""
    scope_logs = ScopeLogs.FromString(payload)
    [record] = scope_logs.log_records
    attributes = {pair.key: plain(pair.value) for pair in record.attributes}
    return Taken(
        scope_logs.scope.name,
        record.body.string_value,
        record.severity_number,
        record.severity_text,
        attributes,
        record,
    )


def taken(folder: Path) -> list[Taken]:
    """All records of one writer's folder, in the order of its segments. Fails for anything that is not a whole frame."""
    found = []
    for segment in sorted(folder.glob("records.*"), key=lambda path: int(path.name.rpartition(".")[2])):
        data = segment.read_bytes()
        end = 0
        for item in frames.scan(data):
            assert isinstance(item, frames.Frame), item
            end = item.end
            if item.payload[:1] != b"{":
                found.append(decode(item.payload))
        assert end == len(data)
    return found
