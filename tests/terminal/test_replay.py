"""`skyrl-otel replay`: what a spool still holds after launcher, collector and agent were killed is delivered later, once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from skyrl_otel.spool import layout
from tests.agent.conftest import Node, wait_for

pytestmark = pytest.mark.timeout(120)

OURS = [sys.executable, "-m", "skyrl_otel"]


def test_what_a_killed_launcher_left_is_delivered_to_the_run_s_own_store(spool_root: Path) -> None:
    environment = {
        **os.environ,
        "SKYRL_OTEL_SPOOL_DIR": str(spool_root / "spool"),
        "SKYRL_OTEL_LOG_DIR": str(spool_root / "logs"),
        "SKYRL_OTEL_RUN_ID": "left",
    }
    script = "import time\nfor n in range(1000): print('line', n, flush=True)\ntime.sleep(60)"
    launcher = subprocess.Popen(
        [*OURS, "run", "--", sys.executable, "-c", script],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    run = layout.RunDir(spool_root / "spool" / "left", "left")
    # Recorded in the spool, and perhaps not yet delivered: from here on everything is killed at once.
    wait_for(lambda: any((f / "out").exists() and b"line 999\n" in (f / "out").read_bytes() for _, f in run.writers()))
    wait_for(lambda: (run.store / "ready").exists())
    collector = json.loads((run.store / "ready").read_bytes())["pid"]
    os.kill(collector, signal.SIGKILL)
    os.killpg(launcher.pid, signal.SIGKILL)
    launcher.wait()
    node = Node.__new__(Node)
    node.run = run
    for pid in node.pids():
        node.kill(pid)

    done = subprocess.run(
        [*OURS, "replay", "--run", "left"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    listed = subprocess.run(
        [*OURS, "logs", "--run", "left", "--json"], env=environment, capture_output=True, text=True, check=True
    )
    bodies = [json.loads(line)["body"] for line in listed.stdout.splitlines()]
    assert sorted(body for body in bodies if body.startswith("line ")) == sorted(f"line {n}" for n in range(1000))
    again = subprocess.run([*OURS, "replay"], env=environment, capture_output=True, text=True, check=False)
    assert again.returncode == 0
    assert "nothing is waiting" in again.stderr
