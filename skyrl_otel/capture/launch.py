"""Starts the node's agent from inside a user's process, and gets out of the way.

Ray ends a worker's direct children on a graceful exit, own session or not, so what is started here is a launcher that
exits within milliseconds after it has daemonised the agent (`agent/start.py`). Nothing of the agent is imported.
"""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from skyrl_otel.spool import locks
from skyrl_otel.spool.layout import RunDir

_PACKAGE_ROOT = Path(__file__).resolve().parent.parent.parent
_BOOT = "import sys; sys.path.insert(0, sys.argv[1]); from skyrl_otel.agent.start import main; main(sys.argv[2])"
_BOOT_COLLECTOR = (
    "import sys; sys.path[:1] = [sys.argv[1]]; from skyrl_otel.terminal.detached import main; main(*sys.argv[2:])"
)
_COLLECTOR_NEEDS = ("aiohttp", "opentelemetry.proto")

# What the agent may see of the environment. Everything else may hold secrets, and LD_PRELOAD and friends are for training.
_ALLOWED = (
    "HOME",
    "LANG",
    "LC_ALL",
    "LD_LIBRARY_PATH",
    "PATH",
    "SKYRL_OTEL_SPOOL_MAX",
    "SSL_CERT_DIR",
    "SSL_CERT_FILE",
    "TZ",
)


class _Started(subprocess.Popen[bytes]):
    """One that says nothing when the host ends before it was reaped: `-X dev` would warn of it on the program's stderr."""

    def __del__(self) -> None:
        pass


_launchers: list[_Started] = []
_collectors: list[_Started] = []


def ensure_agent(run: RunDir) -> bool:
    """Start the agent of `run` on this node if nobody holds its lock; returns at once.

    Also reaps the launchers of earlier calls. Two callers at once are harmless: the agents elect one by the lock.

    Returns:
        Whether a launcher was started.

    Raises:
        OSError: no process could be started.
    """
    _collectors[:] = [launcher for launcher in _collectors if launcher.poll() is None]
    _launchers[:] = [launcher for launcher in _launchers if launcher.poll() is None]
    if _launchers or locks.is_held(run.agent_lock):
        return False
    _launchers.append(
        _Started(
            # -I -S: no user site, no PYTHON* variables, no site-packages; the agent needs the standard library only.
            [_interpreter(), "-I", "-S", "-c", _BOOT, str(_PACKAGE_ROOT), str(run.path)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env={name: os.environ[name] for name in _ALLOWED if name in os.environ},
            start_new_session=True,
        )
    )
    return True


def await_launchers(timeout_s: float) -> None:
    """Wait until the launchers started here have let go of their agents, or so long.

    Ray ends a worker's children when it ends the worker: a launcher of a job that is over in a moment, too.
    """
    for launcher in list(_launchers):
        with suppress(subprocess.TimeoutExpired):
            launcher.wait(timeout_s)


def start_collector(run: RunDir, log_dir: Path, settings_file: str) -> bool:
    """Start the run's embedded collector as a process of its own; returns at once. Two at once elect one by lock.

    Args:
        settings_file: what SKYRL_OTEL_CONFIG names, relative to here; "" for none, whatever the environment says.

    Returns:
        False where its libraries are not installed here.

    Raises:
        OSError: no process could be started.
    """
    try:
        if any(find_spec(name) is None for name in _COLLECTOR_NEEDS):
            return False
    except ModuleNotFoundError:  # the parent of one
        return False
    env = {**os.environ, "SKYRL_OTEL_CONFIG": _absolute(settings_file)}
    _collectors.append(
        _Started(
            [_interpreter(), "-c", _BOOT_COLLECTOR, str(_PACKAGE_ROOT), str(run.path), str(log_dir)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=env,
            start_new_session=True,
        )
    )
    return True


class CollectorWatch:
    """A task for the watch thread of a driver that started the collector: start it again where nobody keeps it alive.

    It and its keeper restart each other, so this is for the day on which both were killed. Each start doubles the time to
    the next look: one that cannot run here, for a log folder that is not writable say, must not cost a core.
    """

    def __init__(self, run: RunDir, log_dir: Path, settings_file: str) -> None:
        # Absolute now: the program may change its folder.
        self._start = partial(start_collector, run, log_dir, _absolute(settings_file))
        self._lock = run.launcher_lock
        self._pause_s = 2.0

    def __call__(self) -> float | None:
        if not locks.is_held(self._lock):
            self._start()
            self._pause_s = min(self._pause_s * 2, 600.0)
        return self._pause_s


def _absolute(path: str) -> str:
    return path and os.path.abspath(os.path.expanduser(path))


def _interpreter() -> str:
    return sys.executable or os.path.realpath("/proc/self/exe")
