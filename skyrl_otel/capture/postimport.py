"""Code that has to run right after a module of somebody else's was imported, without importing it ourselves.

One finder at the head of `sys.meta_path` that answers only for the names it waits for, once each. Finder and loader are not
derived from `importlib.abc`, whose import takes 4 ms: the import system asks for their methods, not for their class.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from skyrl_otel.capture import guard

Action = Callable[[ModuleType], None]


def after_import(name: str, action: Action) -> None:
    """Call `action` with the module `name`: now if it is imported, else right after its import. Its errors are ours."""
    module = sys.modules.get(name)
    if module is not None and not getattr(getattr(module, "__spec__", None), "_initializing", False):
        with guard.guarded(f"postimport.{name}"):
            action(module)
        return
    finder = next((found for found in sys.meta_path if isinstance(found, _Finder)), None)
    if finder is None:
        finder = _Finder()
        sys.meta_path.insert(0, finder)
    finder.waiting.setdefault(name, []).append(action)


class _Finder:
    def __init__(self) -> None:
        self.waiting: dict[str, list[Action]] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        # Popped before the search, so that the search below does not come back here.
        actions = self.waiting.pop(fullname, None) if fullname in self.waiting else None
        if actions is None:
            return None
        spec = find_spec(fullname)
        if spec is None or spec.loader is None:
            self.waiting[fullname] = actions
            return None
        spec.loader = _Loader(spec.loader, actions)  # type: ignore[assignment]
        return spec


class _Loader:
    """The module's own loader, and our actions once it is done; then it takes itself out of the module again."""

    def __init__(self, loader: Any, actions: list[Action]) -> None:
        self._loader = loader
        self._actions = actions

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        created: ModuleType | None = self._loader.create_module(spec)
        return created

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        for action in self._actions:
            with guard.guarded(f"postimport.{module.__name__}"):
                action(module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)
