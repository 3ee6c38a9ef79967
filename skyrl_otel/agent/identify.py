"""From identity keys to OTLP resource attributes.

The resource is kept small: Loki repeats every attribute of it on every entry. What is left of the identity goes out once per
writer, as the `skyrl.identity` event.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from skyrl_otel.agent.otlp import Value

# OTel's semantic name where there is one; `rl.*` is proposed upstream (semantic-conventions-genai#88) and not used yet.
_RESOURCE = (
    ("host", "host.name"),
    ("pid", "process.pid"),
    ("channel", "skyrl.channel"),
    ("role", "skyrl.role"),
    ("rank", "skyrl.rank"),
    ("job_id", "ray.job.id"),
    ("node_id", "ray.node.id"),
    ("actor_id", "ray.actor.id"),
    ("actor_name", "ray.actor.name"),
    ("actor_class", "ray.actor.class"),
    ("task_name", "ray.task.name"),
    ("child", "skyrl.child"),
)
_NOT_SHOWN = {key for key, _ in _RESOURCE} | {
    "awaits",
    "follow",
    "errors",
    "goodbye",
    "lost",
    "parent_pid",
    "project",
    "records_since",
    "service",
    "silent_end",
    "until_agent",
    "user_attributes",
}


def resource_attributes(facts: Mapping[str, Any], run_id: str, writer_id: str) -> dict[str, Value]:
    """The resource of a writer whose identity is `facts`."""
    attributes: dict[str, Value] = {}
    if facts.get("project"):
        attributes["service.namespace"] = str(facts["project"])
    attributes["service.name"] = str(facts.get("service") or facts.get("role") or "process")
    attributes["service.instance.id"] = writer_id
    attributes["skyrl.run.id"] = run_id
    for key, name in _RESOURCE:
        value = facts.get(key)
        if value not in (None, ""):
            attributes[name] = _value(value)
    attributes.setdefault("skyrl.channel", "infra")
    for name, value in (facts.get("user_attributes") or {}).items():
        attributes.setdefault(str(name), _value(value))
    return attributes


def event_attributes(facts: Mapping[str, Any]) -> dict[str, Value]:
    """What the identity event tells beyond the resource."""
    return {f"skyrl.identity.{key}": _value(value) for key, value in facts.items() if key not in _NOT_SHOWN}


def _value(value: Any) -> Value:
    return value if isinstance(value, str | bool | int | float) else str(value)
