"""Who wrote a record: the OTLP resource, with the attributes that queries filter by at hand."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Resource:
    """Who wrote: all attributes as canonical JSON, and those that queries filter by."""

    attributes: str
    service: str
    role: str | None
    rank: int | None
    node: str | None
    node_id: str | None
    channel: str
    actor_id: str | None
    actor_name: str | None
    actor_class: str | None
    task: str | None
    pid: int | None
    writer: str | None


def read_resource(attributes: dict[str, Any]) -> Resource:
    """The resource of these attributes (JSON values)."""

    def text(key: str) -> str | None:
        value = attributes.get(key)
        return None if value is None or value == "" else str(value)

    def number(key: str) -> int | None:
        value = attributes.get(key)
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    return Resource(
        attributes=compact_json(dict(sorted(attributes.items()))),
        service=text("service.name") or "",
        role=text("skyrl.role"),
        rank=number("skyrl.rank"),
        node=text("host.name"),
        node_id=text("ray.node.id"),
        channel=text("skyrl.channel") or "infra",
        actor_id=text("ray.actor.id"),
        actor_name=text("ray.actor.name"),
        actor_class=text("ray.actor.class"),
        task=text("ray.task.name"),
        pid=number("process.pid"),
        writer=text("service.instance.id"),
    )


def compact_json(value: Any) -> str:
    """JSON without spaces; characters outside ASCII as they are."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
