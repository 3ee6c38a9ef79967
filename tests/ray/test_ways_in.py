"""The ways a Ray program is started by: `run -- uv run …`, and a job that is submitted to a cluster that was there."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.ray.conftest import ray_environment

pytestmark = [pytest.mark.ray, pytest.mark.long, pytest.mark.timeout(240)]

BIN = Path(sys.executable).parent
TRAIN = """
import os
import ray
ray.init()

@ray.remote(num_cpus=0.1)
class Policy:
    def step(self):
        print("policy line, MINE is", os.environ.get("MINE"))

ray.get(Policy.remote().step.remote())
print("training done", flush=True)
"""
# Its agent's port is a fixed one, which another cluster of this machine may have: then no job can be submitted.
CLUSTER = """
import functools, sys, ray
import ray._private.parameter as parameter
parameter.RayParams = functools.partial(parameter.RayParams, dashboard_agent_listen_port=0)
ray.init(num_cpus=4, include_dashboard=True, dashboard_host="127.0.0.1", dashboard_port=int(sys.argv[2]), _temp_dir=sys.argv[1])
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def site() -> Iterator[Path]:
    root = Path(tempfile.mkdtemp(prefix="sk-", dir="/var/tmp"))
    (root / "spool").mkdir(mode=0o700)
    (root / "train.py").write_text(TRAIN)
    yield root
    shutil.rmtree(root, ignore_errors=True)


def settings(site: Path) -> dict[str, str]:
    return {"SKYRL_OTEL_SPOOL_DIR": str(site / "spool"), "SKYRL_OTEL_LOG_DIR": str(site / "logs")}


def recorded(site: Path) -> list[tuple[str, str | None]]:
    """(body, actor class) of the lines of ours in the store."""
    done = subprocess.run(
        [BIN / "skyrl-otel", "logs", "--json"],
        env={"PATH": os.environ["PATH"], **settings(site)},
        capture_output=True,
        text=True,
        check=True,
    )
    records: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines()]
    ours = [one for one in records if str(one["body"]).startswith(("policy line", "training done"))]
    return sorted((one["body"], one["resource"].get("ray.actor.class")) for one in ours)


def test_under_uv_run(site: Path) -> None:
    command = [BIN / "uv", "run", "--no-project", "--python", sys.executable, "--", "python", "train.py"]
    done = subprocess.run(
        [BIN / "skyrl-otel", "run", "--", *command],
        env=ray_environment(MINE="yes", UV_OFFLINE="1", **settings(site)),
        cwd=site,
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["training done"]
    assert recorded(site) == [("policy line, MINE is yes", "Policy"), ("training done", None)]


def test_as_a_submitted_job(site: Path) -> None:
    """The user's own env_vars are kept; the run is named after the job."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    temp = tempfile.mkdtemp(prefix="sk-ray-", dir="/tmp")
    cluster = subprocess.Popen(
        [sys.executable, "-c", CLUSTER, temp, str(port)],
        env=ray_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert cluster.stdin and cluster.stdout
    try:
        while cluster.stdout.readline().strip() != "ready":
            assert cluster.poll() is None, "the cluster did not start"
        variables = {"MINE": "from the job", **settings(site)}
        submit = ["job", "submit", "--address", f"http://127.0.0.1:{port}", "--submission-id", "night-7"]
        environment = ["--runtime-env-json", json.dumps({"env_vars": variables})]
        program = [BIN / "skyrl-otel", "run", "--", sys.executable, site / "train.py"]
        deadline = time.monotonic() + 60
        while True:
            done = subprocess.run(
                [BIN / "ray", *submit, *environment, "--", *map(str, program)],
                env=ray_environment(),
                capture_output=True,
                text=True,
                timeout=150,
            )
            # The head is ready some seconds before the agent is that starts jobs.
            if "No available agent" not in done.stderr or time.monotonic() > deadline:
                break
        assert done.returncode == 0, done.stdout + done.stderr
        assert "training done" in done.stdout.splitlines()
        assert recorded(site) == [("policy line, MINE is from the job", "Policy"), ("training done", None)]
        assert [path.name for path in (site / "logs").glob("*.db")] == ["night-7.db"]
    finally:
        cluster.stdin.close()
        cluster.wait(60)
        cluster.stdout.close()
        shutil.rmtree(temp, ignore_errors=True)
