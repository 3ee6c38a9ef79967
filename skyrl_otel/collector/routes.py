"""Which text file a record goes to: the user's `[[route]]` rules, in their order, the first that holds.

A rule holds if one of its keys does: `scope` (the logger), `process` (the child that took its own records, or that a line's
prefix names, as vLLM's ``(EngineCore pid=7)``; the actor's class or name, the task, the service), any other key as an attribute
of the record or of its resource. Values are globs. A printed line that no rule but a catch-all takes follows the process that
printed it: it goes where the first record of that process went that a rule took. Until there is one the process's lines wait: an
engine prints for a minute before its library logs a word. They go on when there is one, and to the catch-all when the process has
ended, after `WAIT_S`, or at the end of the run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from fnmatch import translate
from typing import TYPE_CHECKING, Any, NamedTuple

from skyrl_otel.spool.settings import RouteItem

if TYPE_CHECKING:
    from skyrl_otel.collector.decode import Row
    from skyrl_otel.collector.resource import Resource

WAIT_S = 300.0
"""How long the lines of a process wait to be placed. An engine's import alone takes two minutes on a cold disk."""

_END = "skyrl.process.end"
_CHILD = re.compile(r"\(([A-Za-z_][\w.-]{0,60}) pid=\d+\)")
_TEXT_SCOPES = ("", "skyrl_otel.text", "skyrl_otel.agent")
_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")
_MOST_FILES = 4096
_OVERFLOW = "other.log"


class Placed(NamedTuple):
    """Where a line goes.

    Attributes:
        path: below the log folder; None for its channel's own file.
        waits_for: the process that must be placed first, "" for none. `path` is for the case that it never is.
    """

    path: str | None
    waits_for: str = ""


class _Rule:
    def __init__(self, item: RouteItem) -> None:
        self.to = item.to
        self.name = f"{item.alternatives} {item.to}"
        self.takes_all = not item.alternatives
        self.keys = [(key, re.compile("|".join(translate(glob) for glob in globs))) for key, globs in item.alternatives]
        self.placeholders = _PLACEHOLDER.findall(item.to)


class Router:
    """Remembers where processes go; one for each life of a collector.

    `released`: processes whose lines wait no longer, with the path these go to, None for each line's own.
    `fresh`: what was decided, process → rule. Who has moved the lines and stored the decisions says so by `settle`.
    """

    def __init__(self, items: Sequence[RouteItem]) -> None:
        self._rules = [_Rule(item) for item in items]
        # Rules by attributes alone hold from a process's first line on, or never: then nothing needs to wait.
        self._may_wait = any(key in ("scope", "process") for rule in self._rules for key, _ in rule.keys)
        self._followed: dict[str, int] = {}
        self._waiting: dict[str, float] = {}
        self._given_up: set[str] = set()
        self.released: dict[str, str | None] = {}
        self.fresh: dict[str, str] = {}
        self._resources: dict[str, dict[str, Any]] = {}
        self._files: set[str] = set()

    def __bool__(self) -> bool:
        return bool(self._rules)

    def route(self, row: Row, resource: Resource, now_s: float = 0.0) -> Placed:
        """Where a record goes. `now_s` is any clock that only goes forward, the one of `give_up`."""
        facts = self._facts(resource)
        attributes: dict[str, Any] = json.loads(row.attributes) if row.attributes else {}
        process = _process_of(resource)
        number = self._match(row, resource, facts, attributes)
        if number is not None and not self._rules[number].takes_all:
            found = self._path(self._rules[number], facts, attributes)
            if process:
                if process not in self._followed:
                    self._followed[process] = number
                    self.fresh[process] = self._rules[number].name
                if process in self._waiting:
                    self.released.setdefault(process, found)
            return Placed(found)
        follows = process != "" and (row.stream is not None or row.scope in _TEXT_SCOPES)
        if follows and process in self._followed:
            number = self._followed[process]
        path = None if number is None else self._path(self._rules[number], facts, attributes)
        if not follows or process in self._followed or process in self._given_up or not self._may_wait:
            return Placed(path)
        self._waiting.setdefault(process, now_s)
        if row.event_name == _END:
            self.released.setdefault(process, None)
        return Placed(path, process)

    def give_up(self, before_s: float) -> None:
        """Release what has waited since before that time."""
        for process, since_s in self._waiting.items():
            if since_s < before_s:
                self.released.setdefault(process, None)

    def settle(self) -> None:
        """What was released has moved, what was decided is stored."""
        self.fresh = {}
        for process, path in self.released.items():
            self._waiting.pop(process, None)
            if path is None:
                self._given_up.add(process)
        self.released = {}

    def follow(self, decided: Iterable[tuple[str, str]]) -> None:
        """Take over what an earlier life decided, as far as the rules are still the same."""
        numbers = {rule.name: number for number, rule in enumerate(self._rules)}
        self._followed |= {process: numbers[name] for process, name in decided if name in numbers}

    def restore(self, waiting: Iterable[str], now_s: float) -> None:
        """What waits is this: at a start, and where what was released has not moved after all."""
        self._waiting = {process: self._waiting.get(process, now_s) for process in waiting}
        self.released = {}

    def _match(self, row: Row, resource: Resource, facts: dict[str, Any], attributes: dict[str, Any]) -> int | None:
        for number, rule in enumerate(self._rules):
            if rule.takes_all or any(_holds(key, globs, row, resource, facts, attributes) for key, globs in rule.keys):
                return number
        return None

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


def _process_of(resource: Resource) -> str:
    """One process has several folders in the spool, and so several writer ids: a worker's first lines, the actor it becomes."""
    if resource.pid is None:
        return resource.writer or ""
    return f"{resource.node_id or resource.node or ''}/{resource.pid}"


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
        return any(globs.match(name) for name in _processes(row, resource, {**facts, **attributes}))
    value = attributes.get(key, facts.get(key))
    return value is not None and globs.match(str(value)) is not None


def _processes(row: Row, resource: Resource, attributes: dict[str, Any]) -> list[str]:
    if "skyrl.child" in attributes:  # by a line's prefix, or of who takes its own records
        return [str(attributes["skyrl.child"])]  # an actor's child is not the actor
    child = _CHILD.match(row.body) if isinstance(row.body, str) else None  # a line that was cut keeps its prefix
    if child is not None:
        return [child[1]]
    return [
        name
        for name in (resource.actor_class, resource.actor_name, resource.task, resource.role, resource.service)
        if name
    ]
