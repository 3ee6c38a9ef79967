"""Where nothing can be recorded: one line, and the command as if we were not there."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import Launcher, python


def test_a_spool_of_somebody_else(launch: Launcher) -> None:
    os.chown(launch.root, 12345, 12345)
    done = launch("sh", "-c", "echo out; exit 3")
    assert (done.returncode, done.stdout) == (3, b"out\n")
    assert (
        done.stderr
        == (
            f"skyrl-otel: nothing is recorded: {launch.root} belongs to uid 12345, not {os.geteuid()}; "
            "set SKYRL_OTEL_SPOOL_DIR\n"
        ).encode()
    )


def test_a_spool_in_memory(launch: Launcher) -> None:
    root = Path("/dev/shm") / f"skyrl-otel-test-{os.getpid()}"
    launch.env["SKYRL_OTEL_SPOOL_DIR"] = str(root)
    try:
        done = launch("sh", "-c", "echo out")
        assert done.stdout == b"out\n"
        assert b"is on tmpfs" in done.stderr and done.stderr.count(b"\n") == 1
        assert not list(root.iterdir())
    finally:
        root.rmdir()


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    mount = tmp_path / "small"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m,mode=0700", "tmpfs", str(mount)], check=True)
    yield mount
    subprocess.run(["umount", "-l", str(mount)], check=True)


def test_a_disk_that_is_full_from_the_start(launch: Launcher, full_disk: Path) -> None:
    with pytest.raises(OSError, match="No space"), (full_disk / "ballast").open("wb", buffering=0) as ballast:
        while True:
            ballast.write(b"x" * 4096)
    launch.env |= {"SKYRL_OTEL_SPOOL_DIR": str(full_disk / "spool"), "SKYRL_OTEL_ALLOW_TMPFS": "1"}
    done = launch("sh", "-c", "echo out; exit 3")
    assert (done.returncode, done.stdout) == (3, b"out\n")
    assert done.stderr.startswith(b"skyrl-otel: nothing is recorded: ") and done.stderr.count(b"\n") == 1


def test_a_disk_that_fills_up_on_the_way(launch: Launcher, full_disk: Path) -> None:
    """Output goes on; one line says at once that recording does not, the summary says how much is missing."""
    launch.env |= {"SKYRL_OTEL_SPOOL_DIR": str(full_disk / "spool"), "SKYRL_OTEL_ALLOW_TMPFS": "1"}
    done = launch(*python("import os\nfor i in range(8): os.write(1, b'x' * 999_999 + b'\\n')"))
    assert done.returncode == 0
    assert len(done.stdout) == 8_000_000
    assert done.stderr.count(b"the spool takes no more (No space left on device)") == 1


def test_a_log_dir_that_cannot_be_made(launch: Launcher) -> None:
    del launch.env["OTEL_EXPORTER_OTLP_ENDPOINT"]
    (launch.cwd / "file").touch()
    launch.env["SKYRL_OTEL_LOG_DIR"] = str(launch.cwd / "file" / "logs")
    done = launch("sh", "-c", "echo out; exit 3")
    assert (done.returncode, done.stdout) == (3, b"out\n")
    assert done.stderr.startswith(b"skyrl-otel: nothing is recorded: cannot make ")
    assert done.stderr.endswith(b"set SKYRL_OTEL_LOG_DIR\n") and done.stderr.count(b"\n") == 1


def test_a_log_dir_on_a_read_only_disk(launch: Launcher, full_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(full_disk)], check=True)
    del launch.env["OTEL_EXPORTER_OTLP_ENDPOINT"]
    launch.env["SKYRL_OTEL_LOG_DIR"] = str(full_disk)
    done = launch("sh", "-c", "echo out; exit 3")
    assert (done.returncode, done.stdout) == (3, b"out\n")
    assert (
        done.stderr
        == f"skyrl-otel: nothing is recorded: cannot write to {full_disk}; set SKYRL_OTEL_LOG_DIR\n".encode()
    )


def test_disabled_is_silent(launch: Launcher) -> None:
    launch.env["OTEL_SDK_DISABLED"] = "true"
    done = launch("sh", "-c", "echo out; env | grep -c SKYRL_OTEL_LAUNCHER; exit 3")
    assert (done.returncode, done.stdout, done.stderr) == (3, b"out\n0\n", b"")


def test_an_endpoint_without_scheme_is_named_and_the_run_goes_on(launch: Launcher) -> None:
    launch.env["OTEL_EXPORTER_OTLP_ENDPOINT"] = "localhost:4318"
    done = launch("sh", "-c", "echo out; exit 3")
    assert (done.returncode, done.stdout) == (3, b"out\n")
    assert done.stderr.count(b"OTEL_EXPORTER_OTLP_ENDPOINT='localhost:4318'") == 1
    assert launch.recorded() == b"out\n"


def test_a_collector_that_cannot_start_is_named_and_the_run_goes_on(launch: Launcher) -> None:
    launch.with_collector()
    launch.env["SKYRL_OTEL_NODE_IP"] = "203.0.113.1"  # not ours: bind(2) fails
    launch.env["SKYRL_OTEL_DRAIN_S"] = "60"  # it is settled long before, also on a busy machine
    done = launch("sh", "-c", "echo out; exit 3")
    assert (done.returncode, done.stdout) == (3, b"out\n")
    assert b"203.0.113.1" in done.stderr
    assert launch.recorded() == b"out\n"
