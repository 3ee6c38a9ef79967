"""Runs small host programs with our capture in them and reads what they left in the spool, without an agent."""

import fcntl
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
RUN = "test"


@dataclass
class Written:
    """One writer's folder."""

    path: Path
    facts: dict[str, Any] = field(default_factory=dict)
    lines: list[dict[str, Any]] = field(default_factory=list)

    def text(self, name: str = "out") -> bytes:
        found = self.path / name
        return found.read_bytes() if found.exists() else b""


def written(root: Path, run: str = RUN) -> list[Written]:
    """All writers of a run."""
    folders = []
    for path in sorted((root / run).glob("w-*")):
        folder = Written(path)
        for line in (path / "identity").read_bytes().splitlines():
            folder.lines.append(json.loads(line))
            folder.facts.update(folder.lines[-1]["set"])
        folders.append(folder)
    return folders


Host = Callable[..., subprocess.CompletedProcess[bytes]]


def environment(root: Path, **more: str) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "SKYRL_OTEL_RAISE": "1",
        "SKYRL_OTEL_RUN_ID": RUN,
        "SKYRL_OTEL_SPOOL_DIR": str(root),
        **more,
    }


@pytest.fixture
def spool(spool_root: Path) -> Iterator[Path]:
    """A spool whose agent's lock is taken, so that no agent starts and the files stay as their writers left them."""
    run = spool_root / RUN
    run.mkdir(mode=0o700)
    with open(run / "agent.lock", "w") as lock:
        os.chmod(lock.name, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield spool_root


@pytest.fixture
def host(spool: Path) -> Host:
    """Runs a script as a program of its own; stdout and stderr are pipes unless said otherwise."""

    def run(script: str, *, check: bool = True, **options: Any) -> subprocess.CompletedProcess[bytes]:
        env = environment(spool, **options.pop("env", {}))
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "timeout": 60, **options}
        done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], env=env, check=False, **options)
        assert not check or done.returncode == 0, done.stderr
        return done

    return run
