"""Runs first in every Python process under `skyrl-otel run`, and in children of a redirected one (`capture/children.py`).

By the PYTHONPATH entry that the launcher, or the parent, has set.
Cheap: nothing of ours is imported until the program imports ray or loguru, logs a first record, or is a rank of torchrun.
Ray's own processes are left alone, and the environment's own `sitecustomize`, which this file hides, is run at the end.
"""

from __future__ import annotations

import _thread
import os
import stat
import sys

TYPE_CHECKING = False  # typing's own costs its import
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType
    from typing import Any

_HERE = os.path.dirname(os.path.abspath(__file__))

# Parts of the paths and module names by which Ray starts its own Python processes: ray/_private/services.py.
_RAY_PROCESSES = ("/ray/_private/", "/ray/dashboard/", "/ray/autoscaler/", "/ray/core/", "ray.util.client.server")
_MOST_S = 5.0  # that a record may wait for another thread's first one


def _is_rays_own() -> bool:
    return any(part in argument for argument in sys.orig_argv[1:4] for part in _RAY_PROCESSES)


class _Before:
    """Answers for no module of its own. Waits for the imports after which there is something for us to do."""

    def __init__(self, modules: dict[str, str | None]) -> None:
        self.modules = modules  # name → function of `capture/attach.py` that finds it; None: `logging`, which is ours

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name not in self.modules:
            return None
        home = self.modules.pop(name)
        try:
            if home is None:
                return self._logging(name, path, target)
            from skyrl_otel.capture import attach

            return getattr(attach, home)(name, path, target)
        except Exception:
            if os.environ.get("SKYRL_OTEL_RAISE"):
                raise
            return None

    def _logging(self, name: str, path: Any, target: Any) -> Any:
        found = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec: Any = next(filter(None, found), None)
        if spec is None:
            return None
        loader, execute = spec.loader, spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            del loader.exec_module  # the loader is what it was
            execute(module)
            _try(_await_record)

        loader.exec_module = exec_module
        return spec


def _try(action: Callable[[], None]) -> None:
    try:
        action()
    except Exception:
        if os.environ.get("SKYRL_OTEL_RAISE"):
            raise


def _take_records() -> None:
    from skyrl_otel.capture.attach import take_records

    take_records()


def _await_record() -> None:
    """Stand where `capture/takeover.py` will, until the first record is logged: most processes never log one.

    The takeover takes this place over, so that no record of another thread falls between the two.
    """
    from logging import Logger

    before, own = Logger.filter, Logger.__dict__.get("filter")
    lock = _thread.RLock()
    is_over = is_busy = False

    def filter(self: Any, record: Any) -> Any:
        nonlocal is_over, is_busy
        # Other threads wait: the first record of each is to be taken too. Not so what is logged within our own imports.
        if not is_over and lock.acquire(timeout=_MOST_S):
            try:
                if not is_over and not is_busy:
                    is_busy = True
                    _try(_take_records)
                    is_over = True
                    if not filter.taken_over:  # type: ignore[attr-defined]
                        stop()
            finally:
                lock.release()
        take = Logger.filter if filter.taken_over else before  # type: ignore[attr-defined]
        return take(self, record)

    def stop() -> None:
        """Nothing is to be taken here. Whoever has put something over us in the meantime goes on calling us."""
        if Logger.__dict__.get("filter") is not filter:
            return
        if own is None:
            del Logger.filter
        else:
            Logger.filter = own  # type: ignore[method-assign]

    def in_child() -> None:
        nonlocal lock, is_over
        lock = _thread.RLock()  # a thread that is not here may have held the other
        if is_busy and not is_over:
            is_over = True  # it was within our imports, whose locks nobody opens here
            stop()

    filter.stands_for = own, before  # type: ignore[attr-defined]
    filter.taken_over = False  # type: ignore[attr-defined]
    Logger.filter = filter  # type: ignore[method-assign]
    os.register_at_fork(after_in_child=in_child)


def _drop_strange_terminal() -> None:
    # A parent that closed its descriptors (subprocess does) passes the number on, but not what was behind it.
    number = os.environ.get("SKYRL_OTEL_TERMINAL_FD", "")
    if number:
        try:
            mode = os.fstat(int(number)).st_mode
            if stat.S_ISFIFO(mode) or stat.S_ISCHR(mode) or stat.S_ISSOCK(mode):
                return
        except (OSError, ValueError):
            pass
        del os.environ["SKYRL_OTEL_TERMINAL_FD"]


def _is_recorded_child() -> bool:
    """Whether our output goes into the spool under a writer that is our parent, or its parent."""
    run = os.environ.get("SKYRL_OTEL_CHILD_OF", "")
    for number in (1, 2) if run else ():
        try:
            if os.readlink(f"/proc/self/fd/{number}").startswith(f"{run}/w-"):
                return True
        except OSError:
            pass
    return False


def _start() -> None:
    if _is_rays_own():
        return
    if os.environ.get("SKYRL_OTEL_LAUNCHER"):
        _start_launched()
    elif _is_recorded_child():
        _watch({"logging": None, "loguru": "watch_records"})


def _start_launched() -> None:
    _drop_strange_terminal()
    modules: dict[str, str | None] = {"ray": "watch_imports"}
    rank = os.environ.get("RANK", "")
    # Children of a rank inherit its descriptors, and with them its place in the spool; their records are their own.
    is_rank = rank.isdigit() and "SKYRL_OTEL_RANK_OF" not in os.environ
    is_silent = is_rank and rank != "0"  # its output is in the spool, under a writer of its own
    if not is_silent:
        modules |= {"logging": None, "loguru": "watch_records"}
    _watch(modules)
    if is_rank:
        os.environ["SKYRL_OTEL_RANK_OF"] = str(os.getpid())
        if is_silent:
            from skyrl_otel.capture.attach import attach

            attach()


def _watch(modules: dict[str, str | None]) -> None:
    sys.meta_path.insert(0, _Before(modules))
    if "logging" in sys.modules and modules.pop("logging", "") is None:
        _try(_await_record)
    if "loguru" in sys.modules and modules.pop("loguru", ""):
        _try(_take_records)


def _chain() -> None:
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec

    rest = [entry for entry in sys.path if os.path.abspath(entry or ".") != _HERE]
    spec = PathFinder.find_spec("sitecustomize", rest)
    if spec is not None and spec.loader is not None:
        module = module_from_spec(spec)
        sys.modules["sitecustomize"] = module
        spec.loader.exec_module(module)


try:
    _start()
except Exception:
    if os.environ.get("SKYRL_OTEL_RAISE"):
        raise
_chain()
