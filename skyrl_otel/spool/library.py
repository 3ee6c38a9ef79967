"""A private copy of this package in the run's folder, for the agent and for the launcher's children.

Ray deletes the package it shipped once the job is over, while an agent may still have to restart; and a path below Ray's
session folder would put Ray's words into the agent's command line, by which clean-up scripts choose whom to kill.
"""

from __future__ import annotations

import os
import secrets
import shutil
from pathlib import Path

from skyrl_otel.spool.layout import RunDir

_PACKAGE = Path(__file__).resolve().parent.parent


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
