"""Which text file a record goes to: the user's `[[route]]` rules, in their order, the first that holds.

A rule holds if one of its keys does: `scope` (the logger), `process` (the child that a line's prefix names, as vLLM's
``(EngineCore pid=7)``; the actor's class or name, the task, the service), any other key as an attribute of the record or of its
resource. Values are globs. A line that no rule but a catch-all takes follows its writer: it goes where the writer's first
record went that a rule took.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from fnmatch import translate
from typing import TYPE_CHECKING, Any

from skyrl_otel.spool.settings import RouteItem

if TYPE_CHECKING:
    from skyrl_otel.collector.decode import Row
    from skyrl_otel.collector.resource import Resource

_CHILD = re.compile(r"\(([A-Za-z_][\w.-]{0,60}) pid=\d+\)")
_TEXT_SCOPES = ("", "skyrl_otel.text", "skyrl_otel.agent")
_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")
_MOST_FILES = 4096
_OVERFLOW = "other.log"


class _Rule:
    def __init__(self, item: RouteItem) -> None:
        self.to = item.to
        self.name = f"{item.alternatives} {item.to}"
        self.takes_all = not item.alternatives
        self.keys = [(key, re.compile("|".join(translate(glob) for glob in globs))) for key, globs in item.alternatives]
        self.placeholders = _PLACEHOLDER.findall(item.to)


class Router:
    """Remembers where writers go. `fresh` has what was decided since the owner last stored and cleared it: writer → rule."""

    def __init__(self, items: Sequence[RouteItem]) -> None:
        self._rules = [_Rule(item) for item in items]
        self.fresh: dict[str, str] = {}
        self._followed: dict[str, int] = {}
        self._resources: dict[str, dict[str, Any]] = {}
        self._files: set[str] = set()

    def __bool__(self) -> bool:
        return bool(self._rules)

    def restore(self, followed: Iterable[tuple[str, str]]) -> None:
        """Take over what an earlier life decided, as far as the rules are still the same."""
        numbers = {rule.name: number for number, rule in enumerate(self._rules)}
        self._followed |= {writer: numbers[name] for writer, name in followed if name in numbers}

    def route(self, row: Row, resource: Resource) -> str | None:
        """The file's path below the log folder; None where no rule takes the record."""
        facts = self._facts(resource)
        attributes: dict[str, Any] = json.loads(row.attributes) if row.attributes else {}
        number = self._decide(row, resource, facts, attributes)
        if number is None:
            return None
        return self._path(self._rules[number], facts, attributes)

    def _decide(self, row: Row, resource: Resource, facts: dict[str, Any], attributes: dict[str, Any]) -> int | None:
        writer = resource.writer or ""
        catch_all = None
        for number, rule in enumerate(self._rules):
            if rule.takes_all:
                catch_all = number
                break
            if any(_holds(key, globs, row, resource, facts, attributes) for key, globs in rule.keys):
                if writer and writer not in self._followed:
                    self._followed[writer] = number
                    self.fresh[writer] = rule.name
                return number
        if row.scope in _TEXT_SCOPES and writer in self._followed:
            return self._followed[writer]
        return catch_all

    def _facts(self, resource: Resource) -> dict[str, Any]:
        facts = self._resources.get(resource.attributes)
        if facts is None:
            facts = self._resources[resource.attributes] = json.loads(resource.attributes)
        return facts

    def _path(self, rule: _Rule, facts: dict[str, Any], attributes: dict[str, Any]) -> str:
        path = rule.to
        for key in rule.placeholders:
            value = attributes.get(key, facts.get(key))
            path = path.replace("{" + key + "}", safe(value))
        if path not in self._files:
            if len(self._files) >= _MOST_FILES:
                return _OVERFLOW
            self._files.add(path)
        return path


def safe(value: Any) -> str:
    """An attribute's value as a part of a file's name: a model may have chosen it."""
    text = _UNSAFE.sub("_", "" if value is None else str(value))[:80].lstrip(".")
    return text or "unknown"


def _holds(
    key: str, globs: re.Pattern[str], row: Row, resource: Resource, facts: dict[str, Any], attributes: dict[str, Any]
) -> bool:
    if key == "scope":
        return row.scope not in _TEXT_SCOPES and globs.match(row.scope) is not None
    if key == "process":
        return any(globs.match(name) for name in _processes(row, resource, attributes))
    value = attributes.get(key, facts.get(key))
    return value is not None and globs.match(str(value)) is not None


def _processes(row: Row, resource: Resource, attributes: dict[str, Any]) -> list[str]:
    if "skyrl.child" in attributes:
        return [str(attributes["skyrl.child"])]  # an actor's child is not the actor
    child = _CHILD.match(row.body) if isinstance(row.body, str) else None  # a line that was cut keeps its prefix
    if child is not None:
        return [child[1]]
    return [
        name
        for name in (resource.actor_class, resource.actor_name, resource.task, resource.role, resource.service)
        if name
    ]
