"""What the handler could not do is told by `skyrl-otel doctor`, and by the agent as a loss; the program never hears of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from skyrl_otel.agent.batch import build
from skyrl_otel.agent.writer import Writer
from skyrl_otel.query.health import check_run
from skyrl_otel.spool.layout import RunDir
from tests.capture.conftest import environment, host, spool, written
from tests.receiver import decode

__all__ = ["host", "spool"]

PROGRAM = """
import logging, os, resource, shutil, signal, sys, time
import skyrl_otel; skyrl_otel.attach(role="policy", channel="infra")
from skyrl_otel.capture import runtime
running = runtime.current()
log = logging.getLogger("x"); log.setLevel(20)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
log.info("before")
{trouble}
log.info("after")
time.sleep(2.5)
log.info("last")
"""
FULL = """
resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
for number in range(50): log.info("lost %d", number)
resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
running.recording.records._not_before = 0
"""
REMOVED = """
shutil.rmtree(running.run.path)
for number in range(50): log.info("lost %d", number)
"""
FORBIDDEN = """
os.chmod(running.folder.path, 0)
running.recording.records.next_segment()
os.chmod(running.folder.path, 0o700)
"""


def run(trouble: str, root: Path) -> subprocess.CompletedProcess[bytes]:
    env = environment(root, SKYRL_OTEL_RAISE="")
    script = PROGRAM.replace("{trouble}", trouble)
    return subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, timeout=60, check=False)


def findings(root: Path) -> str:
    return "\n".join(finding.text for finding in check_run(RunDir(root / "test", "test"), is_newest=True))


def test_a_full_disk_is_counted_and_shown(spool: Path) -> None:
    done = run(FULL, spool)
    assert (done.returncode, done.stderr) == (0, b"")
    assert "could not record 50 records" in findings(spool) and "File too large" in findings(spool)
    [folder] = written(spool)
    agent = Writer("test", folder.path.name[2:], folder.path)
    events = []
    for now in range(1, 20):
        agent.observe(now * 10**9)
        batch = build([agent])
        events += [record for record in decode(batch.body) if record.event == "skyrl.loss"]
        for move in batch.moves:
            move.file.accept(move.to)
        for writer, count in batch.events:
            writer.accept_events(count)
    agent.close()
    [loss] = events
    assert "could not write 50 records" in loss.body and loss.attributes["skyrl.lost.bytes"] > 5000


def test_a_removed_spool_is_found_and_a_new_place_is_taken(spool_root: Path) -> None:
    done = run(REMOVED, spool_root)
    assert (done.returncode, done.stderr) == (0, b"")
    bodies = [path.read_bytes() for path in (spool_root / "test").glob("w-*/records.*")]
    assert any(b"last" in body for body in bodies), "records go on in a new folder"
    assert "the spool was removed" in findings(spool_root)
    _end_agents(spool_root)


def test_a_lost_permission_costs_nothing_and_raises_nothing(spool: Path) -> None:
    done = run(FORBIDDEN, spool)
    assert (done.returncode, done.stderr) == (0, b"")
    [folder] = written(spool)
    assert b"".join(path.read_bytes() for path in folder.path.glob("records.*")).count(b"after") == 1


def _end_agents(root: Path) -> None:
    """The agent that the program's watch thread started; it has nowhere to deliver to."""
    import json

    for status in root.glob("*/status"):
        try:
            os.kill(json.loads(status.read_text())["supervisor_pid"], signal.SIGTERM)
        except (OSError, ValueError):
            continue
