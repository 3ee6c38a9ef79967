"""`skyrl-otel replay`: what a spool still holds after launcher, collector and agent were killed is delivered later, once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from skyrl_otel.agent.writer import Writer
from skyrl_otel.query.backlog import oldest_unix_nano
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


def test_what_a_loki_would_refuse_is_said_before(spool_root: Path) -> None:
    """A line that an agent saw long ago and could not deliver."""
    node = Node(spool_root / "spool")
    try:
        writer = node.writer(role="policy")
        agent = Writer("run", writer.writer_id, writer.path)
        os.write(writer.fds["out"], b"old\n")
        agent.observe(time.time_ns() - 5 * 3600 * 10**9)
        agent.flush()
        agent.close()
        assert oldest_unix_nano(node.run) is not None
        environment = {
            **os.environ,
            "SKYRL_OTEL_SPOOL_DIR": str(spool_root / "spool"),
            "OTEL_EXPORTER_OTLP_ENDPOINT": node.receiver.url.removesuffix("/v1/logs"),
        }
        done = subprocess.run([*OURS, "replay"], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "the oldest line is 5.0 h old; a Loki of stock settings refuses" in done.stderr
        assert node.receiver.bodies() == {"old": 1}
        assert oldest_unix_nano(node.run) is None
    finally:
        node.close()
