"""A private copy of this package in the run's folder, for the agent and for the launcher's children.

Ray deletes the package it shipped once the job is over, while an agent may still have to restart; and a path below Ray's
session folder would put Ray's words into the agent's command line, by which clean-up scripts choose whom to kill.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import time
from pathlib import Path

from skyrl_otel.spool.layout import RunDir

_PACKAGE = Path(__file__).resolve().parent.parent
_TRIES, _PAUSE_S = 20, 0.01

_kept: dict[Path, int] = {}


def ensure(run: RunDir) -> Path:
    """`<run>/lib`, made on first use: our package, and a `sitecustomize` beside it. Raises OSError."""
    if run.lib.is_dir():
        return run.lib
    scratch = run.path / f".lib.{secrets.token_hex(6)}"
    os.mkdir(scratch, 0o700)
    shutil.copytree(_PACKAGE, scratch / _PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    inject = _PACKAGE / "capture" / "inject" / "sitecustomize.py"
    if inject.exists():
        shutil.copy(inject, scratch / inject.name)
    try:
        os.rename(scratch, run.lib)
    except OSError:
        shutil.rmtree(scratch, ignore_errors=True)
        if not run.lib.is_dir():
            raise
    return run.lib


def keep(run: RunDir) -> Path:
    """`ensure`, and nobody removes it while this process lives: its path was given to others. Raises OSError."""
    for _ in range(_TRIES):
        lib = ensure(run)
        if lib in _kept:
            return lib
        opened = os.open(lib, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        # A launcher whose stdout is closed must find it closed: not under a number that means something.
        descriptor = fcntl.fcntl(opened, fcntl.F_DUPFD_CLOEXEC, 3)
        os.close(opened)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), os.stat(lib)):
                _kept[lib] = descriptor
                return lib
        except (BlockingIOError, FileNotFoundError):
            pass  # it is being removed at this moment
        os.close(descriptor)
        time.sleep(_PAUSE_S)
    return ensure(run)


def let_go(run: RunDir) -> None:
    """Take `keep` back."""
    descriptor = _kept.pop(run.lib, None)
    if descriptor is not None:
        os.close(descriptor)


def drop(run: RunDir) -> None:
    """Remove it, unless a process that keeps it lives. Raises OSError."""
    try:
        descriptor = os.open(run.lib, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        scratch = run.path / f".lib.{secrets.token_hex(6)}"
        os.rename(run.lib, scratch)  # in one step: nobody may find half a package
        shutil.rmtree(scratch, ignore_errors=True)
    except BlockingIOError:
        pass
    finally:
        os.close(descriptor)
