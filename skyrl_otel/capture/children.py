"""Python processes that a redirected one starts anew, as vLLM does its EngineCore by multiprocessing's `spawn`.

They inherit descriptors 1 and 2, so their text is the parent's. So that their records are records, with their loggers, the
environment leads them to `inject/sitecustomize.py`, which waits there for the first one. It goes by where their
output leads: a child whose output its parent reads itself is none of ours. What every such child pays is that one file;
what the environment of this process gets are the folder of that file, in front, and a variable. Where our package cannot
be imported, as in a child with another environment's interpreter, nothing happens.
"""

from __future__ import annotations

import os
from pathlib import Path

from skyrl_otel.spool.layout import RunDir

VARIABLE = "SKYRL_OTEL_CHILD_OF"
_INJECT = str(Path(__file__).resolve().parent / "inject")


def equip(run: RunDir) -> None:
    """Have the records taken of Python processes started from now on whose output goes into the spool of `run`."""
    os.environ[VARIABLE] = os.path.realpath(run.path)
    path = os.environ.get("PYTHONPATH", "")
    if _INJECT not in path.split(os.pathsep):
        # What follows stays as it is: an empty entry (":/mine") is the folder the child starts in.
        os.environ["PYTHONPATH"] = f"{_INJECT}{os.pathsep}{path}" if path else _INJECT


def unequip() -> None:
    """Take `equip` back."""
    if os.environ.pop(VARIABLE, None) is None:
        return
    path = os.environ.get("PYTHONPATH", "")
    if path == _INJECT:
        del os.environ["PYTHONPATH"]
    elif path:
        os.environ["PYTHONPATH"] = path.removeprefix(f"{_INJECT}{os.pathsep}")
