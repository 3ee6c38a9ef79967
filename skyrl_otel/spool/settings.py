"""The user's settings file, named by SKYRL_OTEL_CONFIG: routes of the text files, redaction rules. TOML.

Read where a run is started; agents get the redaction rules with their token, so that no node needs the file.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any


class SettingsError(ValueError):
    """The file cannot be used; the message names file, key, value and what was expected."""


@dataclass(frozen=True, slots=True)
class RouteItem:
    """One `[[route]]`: `alternatives` are (key, globs) of which one must hold, none for a route that takes all."""

    alternatives: tuple[tuple[str, tuple[str, ...]], ...]
    to: str


@dataclass(frozen=True, slots=True)
class Settings:
    """`redact` has one [name, pattern, anchors] for each `[[redact]]`."""

    routes: tuple[RouteItem, ...] = ()
    redact: tuple[list[object], ...] = ()


def read(path: str) -> Settings:
    """The settings in a file; the defaults for an empty name. Raises SettingsError."""
    if not path:
        return Settings()
    toml = _toml_reader()
    if toml is None:
        raise SettingsError(f"SKYRL_OTEL_CONFIG={path!r}: this Python needs tomli to read it (pip install tomli)")
    try:
        content = toml.loads(Path(path).expanduser().read_text())
    except (OSError, ValueError) as error:  # what both readers raise is a ValueError
        raise SettingsError(f"SKYRL_OTEL_CONFIG={path!r} cannot be read: {error}") from None
    unknown = set(content) - {"route", "redact"}
    if unknown:
        raise SettingsError(f"{path}: {sorted(unknown)[0]!r} is no setting; there are [[route]] and [[redact]]")
    routes = tuple(_route(path, item) for item in _tables(path, content, "route"))
    return Settings(routes, tuple(_redact(path, item) for item in _tables(path, content, "redact")))


def _toml_reader() -> Any:
    for name in ("tomllib", "tomli"):  # the first since Python 3.11
        try:
            return import_module(name)
        except ModuleNotFoundError:
            continue
    return None


def _tables(path: str, content: dict[str, Any], key: str) -> list[dict[str, Any]]:
    items = content.get(key, [])
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise SettingsError(f"{path}: {key} is no list of tables; write [[{key}]]")
    return items


def _route(path: str, item: dict[str, Any]) -> RouteItem:
    to = item.get("to")
    if not isinstance(to, str) or not to:
        raise SettingsError(f"{path}: [[route]] has to={to!r}; write the file's name, for example to = 'vllm.log'")
    if to.startswith("/") or any(part in ("..", ".", "") for part in to.split("/")):
        raise SettingsError(f"{path}: [[route]] has to={to!r}; write a path below the log folder")
    match = item.get("match", {})
    if not isinstance(match, dict):
        raise SettingsError(f"{path}: [[route]] to={to!r} has match={match!r}; write match = {{ scope = 'vllm*' }}")
    alternatives = []
    for key, globs in _flat(match):
        listed = globs if isinstance(globs, list) else [globs]
        alternatives.append((key, tuple(str(glob) for glob in listed)))
    return RouteItem(tuple(alternatives), to)


def _flat(match: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """TOML reads `skyrl.role = "x"` as a table in a table."""
    found: list[tuple[str, Any]] = []
    for key, value in match.items():
        found += _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]
    return found


def _redact(path: str, item: dict[str, Any]) -> list[object]:
    name, pattern, anchors = item.get("name"), item.get("pattern"), item.get("anchors")
    if not isinstance(name, str) or not isinstance(pattern, str) or not isinstance(anchors, list) or not all(anchors):
        raise SettingsError(
            f"{path}: [[redact]] {name!r} needs name, pattern and anchors; write anchors = ['a text that each match contains']"
        )
    try:
        re.compile(pattern.encode())
    except re.error as error:
        raise SettingsError(f"{path}: [[redact]] {name!r} has pattern={pattern!r}: {error}") from None
    return [name, pattern, [str(anchor) for anchor in anchors]]
