"""A writer's folder: seen only when it is whole, alive as long as anybody holds its files."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from skyrl_otel.spool import identity, layout, locks
from skyrl_otel.spool.identity import IdentityLine
from skyrl_otel.spool.writer import WriterFolder

CHILD = """
import os, signal, subprocess, sys, time
from pathlib import Path
from skyrl_otel.spool import layout
from skyrl_otel.spool.writer import WriterFolder
run = layout.open_run(Path(sys.argv[1]), "r")
folder = WriterFolder.create(run, facts={"role": "policy", "pid": os.getpid()})
os.dup2(folder.fds["out"], 1)
os.dup2(folder.fds["err"], 2)
child = subprocess.Popen(["sleep", "60"])
os.write(3, f"{folder.path} {child.pid}\\n".encode())
time.sleep(60)
"""


def test_a_child_keeps_the_lock_after_its_parent_was_killed(spool_root: Path) -> None:
    read, write = os.pipe()
    parent = subprocess.Popen(
        [sys.executable, "-c", f"import os; os.dup2({write}, 3)\n{CHILD}", str(spool_root)], pass_fds=[write]
    )
    os.close(write)
    with os.fdopen(read) as answer:
        path, child = answer.readline().split()
    out = Path(path) / "out"
    assert locks.is_held(out)
    parent.kill()
    parent.wait()
    assert locks.is_held(out)
    os.kill(int(child), signal.SIGKILL)
    while locks.is_held(out):
        pass
    assert locks.is_held(Path(path) / "missing") is False


def test_the_lock_is_one_and_asking_does_not_disturb(spool_root: Path) -> None:
    path = spool_root / "agent.lock"
    first = locks.take(path)
    assert first is not None
    assert locks.take(path) is None
    assert locks.is_held(path)
    os.close(first)
    assert not locks.is_held(path)


def test_identity_grows_line_by_line(spool_root: Path) -> None:
    run = layout.open_run(spool_root, "r")
    folder = WriterFolder.create(run, facts={"role": "policy", "awaits": "rank"})
    os.write(folder.fds["out"], b"12345")
    folder.publish({"rank": 3, "awaits": None})
    lines = identity.parse((folder.path / "identity").read_bytes())
    assert lines == [
        IdentityLine(0, {"out": (0, 0), "err": (0, 0), "records": (0, 0)}, {"role": "policy", "awaits": "rank"}),
        IdentityLine(1, {"out": (0, 5), "err": (0, 0), "records": (0, 0)}, {"rank": 3, "awaits": None}),
    ]
    assert identity.in_force(lines, 0) == {"role": "policy", "awaits": "rank"}
    assert identity.in_force(lines, 1) == {"role": "policy", "rank": 3}
    folder.close()


def test_a_followed_writer_has_a_lock_and_no_streams(spool_root: Path) -> None:
    folder = WriterFolder.create(layout.open_run(spool_root, "r"), files=(), facts={})
    assert sorted(path.name for path in folder.path.iterdir()) == ["identity", "records.0"]
    assert locks.is_held(folder.path / "records.0")
    folder.close()


@given(st.binary(max_size=400))
def test_a_strangers_identity_is_passed_over(noise: bytes) -> None:
    good = identity.encode(IdentityLine(0, {}, {"role": "x"}))
    parsed = identity.parse(noise.replace(b"\n", b"") + b"\n" + good)
    assert parsed[-1] == IdentityLine(0, {}, {"role": "x"})
