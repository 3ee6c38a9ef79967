"""What the handler could not do is told by `skyrl-otel doctor`, and by the agent as a loss; the program never hears of it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from skyrl_otel.agent.batch import build
from skyrl_otel.agent.writer import Writer
from skyrl_otel.query.health import check_run
from skyrl_otel.spool import frames, layout
from skyrl_otel.spool.layout import RunDir
from skyrl_otel.spool.writer import WriterFolder
from tests.agent.test_frames import Bench as Desk
from tests.capture.conftest import environment, host, spool, written
from tests.capture.frames import taken
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
# As a user for whom modes count: root may write where nobody may.
FORBIDDEN = """
folder, records = running.folder.path, running.recording.records
if os.geteuid() == 0:
    for path in (folder.parent.parent, *folder.parent.parent.rglob("*")):
        os.chown(path, 65534, 65534)
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
os.chmod(folder, 0o500)
try:
    open(folder / "probe", "w")
except PermissionError:
    pass
else:
    sys.exit("modes do not count here")
records.next_segment()                      # full: the present one goes on
log.info("in the segment that is full")
resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
for number in range(30): log.info("lost %d", number)
resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
os.chmod(folder, 0o700)
os.chmod(folder.parent, 0o500)
pid = os.fork()
if pid == 0:                                # cannot make a place of its own
    for number in range(20): log.info("lost by the child %d", number)
    os.chmod(folder.parent, 0o700)
    time.sleep(1.1)                         # when it tries again
    log.info("by the child")
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
"""
ON_A_SMALL_DISK = """
set -e
mount -t tmpfs -o size=256k,mode=700 tmpfs "$1"
mkdir -m 700 "$1/test"
(umask 077; touch "$1/test/agent.lock")
flock --nonblock "$1/test/agent.lock" "$2" -c "$3"
"$2" -c "$4" "$1"
cat "$1"/test/w-*/records.* >&2
"""
FULL_DISK = """
filler = open(running.run.path.parent / "filler", "wb", buffering=0)
for size in (4096, 1):
    try:
        while filler.write(b"x" * size): pass
    except OSError:
        pass
for number in range(200): log.info("full %d", number)
os.truncate(filler.name, 0)
"""
TELL = "import sys; from tests.cli.test_handler_errors import findings, Path; print(findings(Path(sys.argv[1])))"


@pytest.fixture
def desk(spool_root: Path) -> Iterator[Desk]:
    desk = Desk(spool_root)
    yield desk
    desk.agent.close()


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
        batch.accept()
    agent.close()
    [loss] = events
    assert "could not write 50 records" in loss.body and loss.attributes["skyrl.lost.bytes"] > 5000


def test_a_removed_spool_is_found_and_a_new_place_is_taken(spool_root: Path) -> None:
    done = run(REMOVED, spool_root)
    assert (done.returncode, done.stderr) == (0, b"")
    bodies = [path.read_bytes() for path in (spool_root / "test").glob("w-*/records.*")]
    assert any(b"last" in body for body in bodies), "records go on in a new folder"
    # All that was in it, for nothing of it was delivered: "before", the 50 and "after".
    assert "could not record 52 records" in findings(spool_root)
    assert "the spool was removed" in findings(spool_root)
    _end_agents(spool_root)


def test_what_was_delivered_is_not_lost_with_its_spool(desk: Desk, spool_root: Path) -> None:
    new = WriterFolder.create(layout.open_run(spool_root, "run"))
    desk.records._place = lambda: new
    for number in range(3):
        desk.log(f"delivered {number}")
    assert len(desk.collect()) == 3
    desk.records.look_after()
    for number in range(2):
        desk.log(f"lost {number}")
    shutil.rmtree(desk.folder.path)
    desk.log("lost too")
    desk.records.look_after()
    desk.log("in the new place")
    desk.records.look_after()
    assert desk.records.lost == {"the spool was removed": 3}
    assert [record.body for record in taken(new.path)] == ["in the new place"]


def test_a_lost_permission_is_counted_and_shown(spool: Path) -> None:
    done = run(FORBIDDEN, spool)
    assert (done.returncode, done.stderr) == (0, b"")
    bodies = b"".join(path.read_bytes() for folder in written(spool) for path in folder.path.glob("records.*"))
    for body in (b"before", b"in the segment that is full", b"after", b"by the child", b"last"):
        assert bodies.count(b"\x0a" + bytes((len(body),)) + body) == 1
    assert b"lost" not in bodies
    shown = findings(spool)
    assert "could not record 30 records" in shown and "File too large" in shown
    [child] = [line for line in shown.splitlines() if "could not record 20 records" in line]
    assert child.endswith("Permission denied")
    assert "records.next_segment (Permission denied) 1" in shown


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs needs root")
def test_a_disk_that_is_really_full_is_counted_and_shown(spool_root: Path) -> None:
    env = environment(spool_root, SKYRL_OTEL_RAISE="", SKYRL_OTEL_ALLOW_TMPFS="1")
    script = PROGRAM.replace("{trouble}", FULL_DISK)
    command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", ON_A_SMALL_DISK, "sh"]
    command += [str(spool_root), sys.executable, script, TELL]
    done = subprocess.run(command, env=env, capture_output=True, timeout=60, check=True)
    bodies = [item.payload for item in frames.scan(done.stderr) if isinstance(item, frames.Frame)]
    told = [f"full {number}".encode() for number in range(200)]
    lost = [body for body in told if not any(b"\x0a" + bytes((len(body),)) + body in payload for payload in bodies)]
    assert len(bodies) == 3 + 200 - len(lost) and 100 < len(lost) <= 200
    assert f"could not record {len(lost)} records" in done.stdout.decode()
    assert "No space left on device" in done.stdout.decode() or "a short write" in done.stdout.decode()


def _end_agents(root: Path) -> None:
    """The agent that the program's watch thread started; it has nowhere to deliver to."""
    import json

    for status in root.glob("*/status"):
        try:
            os.kill(json.loads(status.read_text())["supervisor_pid"], signal.SIGTERM)
        except (OSError, ValueError):
            continue
