"""A record as readers see it, whatever source it comes from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from skyrl_otel.collector.resource import Resource, read_resource

OrderKey = tuple[int, str, str, int, int]


class Owner(Resource):
    """A resource whose attributes are parsed once; all its records share it."""

    @classmethod
    def of(cls, attributes: dict[str, Any]) -> Owner:
        found = read_resource(attributes)
        return cls(*(getattr(found, name) for name in Resource.__slots__))

    @cached_property
    def fields(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.attributes)
        return found


@dataclass(frozen=True, slots=True)
class Record:
    """One log record. `body` is a string but for structured records. `writer`, `file`, `generation`, `start`, `end` are
    the parts of `log.record.uid`; the writer is "" where the record has none of ours."""

    time_unix_nano: int
    observed_time_unix_nano: int
    severity_number: int
    severity_text: str
    scope: str
    body: Any
    stream: str | None
    attributes_json: str | None
    event_name: str | None
    resource: Owner
    writer: str
    file: str
    generation: int
    start: int
    end: int

    @property
    def order(self) -> OrderKey:
        """Records are shown in this order: by time, then as each writer wrote them."""
        return (self.time_unix_nano, self.writer, self.file, self.generation, self.start)

    @property
    def attributes(self) -> dict[str, Any]:
        """All attributes by name."""
        found: dict[str, Any] = json.loads(self.attributes_json) if self.attributes_json else {}
        if self.stream:
            found["log.iostream"] = self.stream
        if self.writer:
            found["log.record.uid"] = f"{self.writer}/{self.file}/{self.generation}/{self.start}-{self.end}"
        return found
