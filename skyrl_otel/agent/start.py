"""The launcher process: makes the agent a process of its own and exits.

It runs for some milliseconds below a training process, so it has the time, which that one has not, to copy the package.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
from pathlib import Path

from skyrl_otel.spool import library
from skyrl_otel.spool.layout import RunDir, open_file

BOOT = "import sys; sys.path.insert(0, sys.argv[1]); from skyrl_otel.agent.supervise import main; main(sys.argv[2:])"

_NICE = 5
_LOG_BYTES = 1 << 20


def main(run_path: str) -> None:
    """Daemonise and become the agent of the run in `run_path`. The calling process returns from here and may exit."""
    run = RunDir(Path(run_path), Path(run_path).name)
    lib = library.ensure(run)
    if os.fork():
        return
    os.setsid()
    if os.fork():
        os._exit(0)
    _detach(run)
    os.execv(sys.executable, command(lib, run))


def command(lib: Path, run: RunDir, *arguments: str) -> list[str]:
    """The agent's command line; it names neither Ray nor a path of Ray's, by which clean-up scripts choose."""
    return [sys.executable, "-I", "-S", "-c", BOOT, str(lib), str(run.path), *arguments]


def _detach(run: RunDir) -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, [])  # the launcher of a run starts us with its signals blocked
    os.umask(0o077)
    os.chdir("/")
    os.closerange(3, 65536)
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 0)
    try:
        path = run.path / "agent.log"
        if path.exists() and path.stat().st_size > _LOG_BYTES:
            path.unlink()
        log = open_file(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    except OSError:
        log = null
    os.dup2(log, 1)
    os.dup2(log, 2)
    # The training process may be pinned to the cores of its GPU; the agent must not run on those alone.
    with contextlib.suppress(OSError):
        os.sched_setaffinity(0, range(os.cpu_count() or 1))
    with contextlib.suppress(OSError):
        os.nice(_NICE)
    with contextlib.suppress(OSError, ValueError):
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
