"""A real cluster, shared by the tests of a module; each test runs a driver of its own on it and reads the spool."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.capture.conftest import ROOT, Written, spool, written  # noqa: F401  (a fixture)

POINTER_TEXT = "skyrl-otel: output of this actor is recorded"

Driver = Callable[..., "Ran"]

START = """
import sys, time, ray
ray.init(num_cpus=8, include_dashboard=False, configure_logging=False, _temp_dir=sys.argv[1])
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""


@dataclass
class Cluster:
    """A session that no run of ours started; drivers join it by its address."""

    address: str
    temp: Path

    @property
    def logs(self) -> Path:
        return (self.temp / "session_latest").resolve() / "logs"


@dataclass
class Ran:
    """One driver's end, and what its run left in the spool."""

    returncode: int
    stdout: str
    stderr: str
    run: Path
    writers: list[Written] = field(default_factory=list)

    def actor(self, name: str) -> Written:
        """The redirected folder of the actor of this name or class."""
        [found] = [w for w in self.writers if "follow" not in w.facts and name in _names(w)]
        return found

    def followed(self, name: str) -> list[Written]:
        return [w for w in self.writers if "follow" in w.facts and name in _names(w)]

    def channels(self, task: str) -> set[str]:
        """What the workers that ran a task said of its channel meanwhile."""
        found = set()
        for writer in self.followed(task):
            facts: dict[str, Any] = {}
            for line in writer.lines:
                facts.update(line["set"])
                if facts.get("task_name") == task:
                    found.add(facts["channel"])
        return found

    def result(self) -> Any:
        """What the driver printed as JSON; Ray may print something of its own behind it."""
        return json.loads(next(line for line in reversed(self.stdout.splitlines()) if line[:1] in ("[", "{", '"')))


def _names(writer: Written) -> set[Any]:
    said = {line["set"].get("task_name") for line in writer.lines}
    return {writer.facts.get("actor_name"), writer.facts.get("actor_class"), *said} - {None}


def ray_environment(**more: str) -> dict[str, str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith(("OTEL_", "SKYRL_", "RAY_"))}
    return {**env, "RAY_AUTH_MODE": "disabled", "RAY_DEDUP_LOGS": "0", "PYTHONPATH": str(ROOT), **more}


@pytest.fixture(scope="package")
def cluster() -> Iterator[Cluster]:
    with tempfile.TemporaryDirectory(prefix="sk-ray-", dir="/tmp", ignore_cleanup_errors=True) as temp:
        process = subprocess.Popen(
            [sys.executable, "-c", START, temp],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=ray_environment(),
            text=True,
        )
        assert process.stdin and process.stdout
        address = process.stdout.readline().strip()
        assert address, "the cluster did not start"
        yield Cluster(address, Path(temp))
        process.stdin.close()
        process.wait(60)
        process.stdout.close()


@pytest.fixture(scope="module")
def driver(cluster: Cluster) -> Iterator[Driver]:
    """Runs a script as a driver under what `skyrl-otel run` sets up, and reads its spool."""
    count = iter(range(100))
    locks = []
    spool_root = Path(tempfile.mkdtemp(prefix="sk-", dir="/var/tmp"))

    def run(script: str, *, env: dict[str, str] | None = None, check: bool = True, timeout: float = 90) -> Ran:
        name = f"run{next(count)}"
        folder = spool_root / name
        folder.mkdir(mode=0o700)
        lock = open(folder / "agent.lock", "w")  # no agent: the files stay as their writers left them
        os.chmod(lock.name, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
        locks.append(lock)
        variables = ray_environment(
            SKYRL_OTEL_RUN_ID=name,
            SKYRL_OTEL_SPOOL_DIR=str(spool_root),
            SKYRL_OTEL_RAISE="1",
            SKYRL_OTEL_LAUNCHER="1",
            RAY_ADDRESS=cluster.address,
        )
        variables["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "skyrl_otel" / "capture" / "inject")])
        variables |= env or {}
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(script)],
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        assert not check or process.returncode == 0, err
        return Ran(process.returncode, out, err, folder, written(spool_root, name))

    yield run
    for lock in locks:
        lock.close()
    shutil.rmtree(spool_root, ignore_errors=True)


def wait_for(condition: Callable[[], Any], timeout_s: float = 20) -> Any:
    """The first true value of `condition`, or a failure after the deadline."""
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.05)
    return found
