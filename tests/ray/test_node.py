"""Ray's own files of a node: followed once per run, and handed on when whoever follows them dies."""

import subprocess
import sys
from pathlib import Path

from skyrl_otel.spool import locks
from tests.capture.conftest import environment, written
from tests.ray.conftest import wait_for

FOLLOWER = """
import sys, time
from skyrl_otel.capture.watch import Watch
from skyrl_otel.integrations.ray.node import SessionFiles
from skyrl_otel.spool.layout import RunDir
from pathlib import Path
watch = Watch()
run = RunDir(Path(sys.argv[1]), "test")
facts = {"channel": "infra", "role": "ray"}
SessionFiles(run, sys.argv[2], "05000000", from_start=sys.argv[3] == "own", facts=facts).start(watch)
sys.stdin.read()
"""


def follower(spool: Path, session: Path, whose: str) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-c", FOLLOWER, str(spool / "test"), str(session), whose]
    return subprocess.Popen(command, env=environment(spool), stdin=subprocess.PIPE)


def end(process: "subprocess.Popen[bytes]") -> None:
    assert process.stdin
    process.kill()
    process.wait()
    process.stdin.close()


def services(spool: Path) -> dict[str, int]:
    return {w.facts["service"]: w.facts["follow"]["out"]["offset"] for w in written(spool)}


def test_they_are_followed_once_and_handed_on(spool: Path, tmp_path: Path) -> None:
    session = tmp_path / "session_x"
    logs = session / "logs"
    logs.mkdir(parents=True)
    for name in ("raylet.out", "raylet.err", "gcs_server.out", "worker-ab-01000000-7.out", "python-core-worker-1.log"):
        (logs / name).write_text("old\n")
    first = follower(spool, session, "joined")
    wait_for(lambda: services(spool) == {"raylet": 4, "gcs_server": 4})
    others = [follower(spool, session, "joined") for _ in range(3)]
    # What appears while the run is there is read from its start.
    (logs / "monitor.out").write_text("new\n")
    wait_for(lambda: services(spool) == {"raylet": 4, "gcs_server": 4, "monitor": 0})
    end(first)
    folders = [w.path for w in written(spool)]
    wait_for(lambda: all(locks.is_held(path / "records.0") for path in folders))
    end(others[0])
    wait_for(lambda: all(locks.is_held(path / "records.0") for path in folders))
    assert [w.path for w in written(spool)] == folders, "the same folders, by another process"
    for process in others[1:]:
        end(process)
    wait_for(lambda: not any(locks.is_held(path / "records.0") for path in folders))


def test_a_session_of_our_own_is_read_from_its_start(spool: Path, tmp_path: Path) -> None:
    logs = tmp_path / "session_y" / "logs"
    logs.mkdir(parents=True)
    (logs / "raylet.out").write_text("started\n")
    process = follower(spool, logs.parent, "own")
    wait_for(lambda: services(spool) == {"raylet": 0})
    end(process)


def test_of_a_clusters_jobs_only_those_of_this_run_are_followed(spool: Path, tmp_path: Path) -> None:
    logs = tmp_path / "session_z" / "logs"
    logs.mkdir(parents=True)
    for job in range(1, 300):  # the cluster is older than the run
        (logs / f"runtime_env_setup-{job:02x}000000.log").write_text("setting up\n")
    (logs / "raylet.out").write_text("old\n")
    process = follower(spool, logs.parent, "joined")
    wait_for(lambda: services(spool) == {"raylet": 4, "runtime_env_setup": 11})
    (spool / "test" / "job-06000000").touch()  # a second job of the run
    wait_for(lambda: len(written(spool)) == 3)
    followed = {Path(w.facts["follow"]["out"]["path"]).name for w in written(spool)}
    assert followed == {"raylet.out", *(f"runtime_env_setup-{job}.log" for job in ("05000000", "06000000"))}
    assert len(list(Path(f"/proc/{process.pid}/fd").iterdir())) < 20
    end(process)
