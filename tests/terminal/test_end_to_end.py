"""From the command line to the store, with a real agent and a real collector."""

from __future__ import annotations

import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from skyrl_otel.spool import locks
from skyrl_otel.spool.layout import RunDir

from .conftest import Terminal, python, wait_until

CLI = str(Path(sys.executable).with_name("skyrl-otel"))
NAMESPACE = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")


class Site:
    """A spool, a log folder and the commands on them."""

    def __init__(self, root: Path, cwd: Path) -> None:
        self.root, self.cwd = root, cwd
        self._processes: list[subprocess.Popen[bytes]] = []
        self.env = {
            **os.environ,
            "SKYRL_OTEL_SPOOL_DIR": str(root),
            "SKYRL_OTEL_LOG_DIR": str(cwd / "logs"),
            "SKYRL_OTEL_NODE_IP": "127.0.0.1",
        }

    def start(self, *command: str, **env: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [CLI, "run", "--", *command], env=self.env | env, cwd=self.cwd, start_new_session=True
        )
        self._processes.append(process)
        return process

    def close(self) -> None:
        for process in self._processes:
            try:
                os.killpg(process.pid, signal.SIGKILL)  # its command too
            except ProcessLookupError:
                pass
            process.wait()
        for status in self.root.glob("*/status"):  # an agent that cannot deliver would stay for ten minutes
            try:
                os.kill(json.loads(status.read_text())["supervisor_pid"], signal.SIGTERM)
            except (OSError, ValueError):
                pass

        for entry in os.listdir(
            "/proc"
        ):  # collectors that `attach()` started: they wait for agents that may still come
            try:
                words = Path(f"/proc/{entry}/cmdline").read_bytes() if entry.isdigit() else b""
            except OSError:
                continue
            if b"skyrl_otel.terminal.detached" in words and os.fsencode(self.root) in words:
                os.kill(int(entry), signal.SIGTERM)

    def run(self, *command: str, prefix: tuple[str, ...] = (), **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*prefix, CLI, "run", "--", *command],
            env=self.env | env,
            cwd=self.cwd,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def logs(self, *options: str) -> list[dict[str, Any]]:
        done = subprocess.run(
            [CLI, "logs", "--json", *options], env=self.env, cwd=self.cwd, capture_output=True, text=True, check=True
        )
        return [json.loads(line) for line in done.stdout.splitlines()]

    def bodies(self) -> list[object]:
        return [record["body"] for record in self.logs() if record["scope"] == "skyrl_otel.text"]

    def run_dir(self) -> RunDir:
        (path,) = self.root.iterdir()
        return RunDir(path, path.name)


@pytest.fixture
def site(spool_root: Path, tmp_path: Path) -> Iterator[Site]:
    site = Site(spool_root, tmp_path)
    yield site
    site.close()


@pytest.mark.parametrize("ending", ["os._exit(3)", "raise ValueError('last')", "os.kill(os.getpid(), 9)"])
def test_every_line_is_stored_once_the_last_one_too(site: Site, ending: str) -> None:
    done = site.run(*python(f"import os, sys\nfor i in range(500): print('line', i, flush=True)\n{ending}"))
    code = {"raise ": 1, "os.kil": -9}.get(ending[:6], 3)
    assert done.returncode == code
    bodies = site.bodies()
    assert [body for body in bodies if str(body).startswith("line ")] == [f"line {i}" for i in range(500)]
    if code == 1:
        assert sum(str(body).endswith("\nValueError: last") for body in bodies) == 1
    assert "records from 1 process" in done.stderr
    assert done.stderr.count("skyrl-otel: ") == 1


def test_as_pid_1(site: Site) -> None:
    done = site.run(*python("import os; os.write(1, b'last words'); os._exit(7)"), prefix=NAMESPACE)
    assert (done.returncode, done.stdout) == (7, "last words")
    assert site.bodies() == ["last words"]


def test_a_driver_without_python(site: Site) -> None:
    site.run("sh", "-c", "echo out; echo err >&2")
    records = site.logs()
    texts = [record for record in records if record["scope"] == "skyrl_otel.text"]
    assert {(text["body"], text["attributes"]["log.iostream"]) for text in texts} == {
        ("out", "stdout"),
        ("err", "stderr"),
    }
    assert {record["resource"]["skyrl.role"] for record in records} == {"driver"}
    assert {record["resource"]["skyrl.channel"] for record in records} == {"progress"}
    logs = site.cwd / "logs"
    assert sorted(path.suffix for path in logs.iterdir()) == [".db", ".log", ".log"]
    assert {path.stat().st_mode & 0o077 for path in (logs, *logs.rglob("*"))} == {0}


def test_a_terminal_sees_the_summary(site: Site) -> None:
    terminal = Terminal([CLI, "run", "--", "echo", "hello"], site.env, site.cwd)
    try:
        assert terminal.finish() == 0
    finally:
        terminal.close()
    assert terminal.output.startswith(b"hello\r\n")
    assert b"records from 1 process" in terminal.output
    assert b"skyrl-otel logs --run" in terminal.output


def test_the_token_is_in_no_argument_and_no_environment(site: Site) -> None:
    look = (
        "import os, time\n"
        "token = os.path.join(os.environ['SKYRL_OTEL_SPOOL_DIR'], os.environ['SKYRL_OTEL_RUN_ID'], 'token')\n"
        "while not os.path.exists(token): time.sleep(.05)\n"
        "import json; secret = json.load(open(token))['headers']['authorization'].split()[1].encode()\n"
        "assert os.stat(token).st_mode & 0o777 == 0o600 and len(secret) > 20\n"
        "for pid in filter(str.isdigit, os.listdir('/proc')):\n"
        "    for name in ('cmdline', 'environ'):\n"
        "        try: assert secret not in open(f'/proc/{pid}/{name}', 'rb').read(), (pid, name)\n"
        "        except OSError: pass\n"
        "print('looked')\n"
    )
    done = site.run(*python(look))
    assert done.stdout == "looked\n", done.stderr


def test_a_second_ctrl_c_skips_the_wait(site: Site) -> None:
    env = site.env | {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", "SKYRL_OTEL_DRAIN_S": "60"}
    terminal = Terminal([CLI, "run", "--", "sh", "-c", "echo hello; exit 5"], env, site.cwd)
    try:
        terminal.read_until(b"to deliver")
        began = time.monotonic()
        terminal.send(b"\x03")
        status = terminal.finish()
    finally:
        terminal.close()
    assert os.WEXITSTATUS(status) == 5
    assert time.monotonic() - began < 10
    assert b"still holds" in terminal.output


def test_a_collector_that_is_killed_comes_back_where_it_was(site: Site) -> None:
    code = "import os, sys, time\nfor i in range(200): print('line', i, flush=True); time.sleep(.02)\n"
    process = site.start(*python(code))
    seen: list[tuple[str, int]] = []

    def ready_again() -> bool:
        try:
            ready = json.loads((site.run_dir().store / "ready").read_text())
        except (OSError, ValueError):
            return False
        if seen and seen[-1][1] == ready["pid"]:
            return False
        seen.append((ready["url"], ready["pid"]))
        return True

    for _ in range(3):
        wait_until(ready_again, "a collector")
        os.kill(seen[-1][1], signal.SIGKILL)
    assert process.wait(60) == 0
    assert len({url for url, _ in seen}) == 1
    assert site.bodies() == [f"line {i}" for i in range(200)]


def test_what_a_delivered_run_leaves_in_the_spool(site: Site) -> None:
    site.run("echo", "hello")
    run = site.run_dir()
    wait_until(lambda: not locks.is_held(run.agent_lock), "the agent's end")
    left = {str(path.relative_to(run.path)) for path in run.path.rglob("*")}
    assert left == {
        *("agent.lock", "agent.log", "launcher.lock", "run.json", "status", "store"),
        *(f"store/{name}" for name in ("collector.log", "copied", "lock", "ready", "secret")),
    }
    assert sum(path.stat().st_size for path in run.path.rglob("*")) < 20_000
    elsewhere = {"SKYRL_OTEL_LOG_DIR": str(site.cwd / "nothing here")}
    site.env |= elsewhere
    assert site.bodies() == ["hello"]
    for command in (("runs",), ("doctor",)):
        done = subprocess.run([CLI, *command], env=site.env, cwd=site.cwd, capture_output=True, text=True, check=True)
        assert run.run_id in done.stdout
    assert "records of 1 writers" in done.stdout  # the doctor's


def test_two_launchers_of_one_run_share_a_collector(site: Site) -> None:
    code = "import sys, time; print(sys.argv[1], flush=True); time.sleep(float(sys.argv[2]))"
    first = site.start(*python(code), "first", "1", SKYRL_OTEL_RUN_ID="shared")
    wait_until((site.root / "shared" / "store" / "ready").exists, "the first collector")
    second = site.start(*python(code), "second", "4", SKYRL_OTEL_RUN_ID="shared")
    assert (first.wait(60), second.wait(60)) == (0, 0)
    assert sorted(map(str, site.bodies())) == ["first", "second"]


def test_runs_of_one_job_one_after_the_other_are_runs_of_their_own(site: Site) -> None:
    for word in ("first", "second"):
        assert site.run("echo", word, SLURM_JOB_ID="77", SLURM_STEP_ID="0").returncode == 0
    assert sorted(path.name for path in site.root.iterdir()) == ["slurm-77-0", "slurm-77-0.2"]


def test_a_collector_of_a_launcher_that_was_killed_ends(site: Site) -> None:
    """Nobody is left to end it: it must do so itself, and is told to by its command line."""
    process = site.start("sleep", "60")
    wait_until(lambda: any(site.root.glob("*/store/ready")), "the collector")
    pid = json.loads((site.run_dir().store / "ready").read_text())["pid"]
    process.kill()
    process.wait()
    command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    os.kill(pid, signal.SIGTERM)
    assert b"--exit-when-drained" in command


def test_the_next_launcher_of_a_run_ends_the_collector_of_one_that_was_killed(site: Site) -> None:
    first = site.start("sleep", "60", SKYRL_OTEL_RUN_ID="again")
    ready = site.root / "again" / "store" / "ready"
    wait_until(ready.exists, "the first collector")
    first.kill()
    first.wait()
    site.run("echo", "second", SKYRL_OTEL_RUN_ID="again")
    assert "second" in site.bodies()
    assert not locks.is_held(site.root / "again" / "store" / "lock")


@pytest.mark.parametrize("kind", ["unreachable", "wrong token"])
def test_an_endpoint_that_takes_nothing_is_one_line_and_the_command_is_unharmed(site: Site, kind: str) -> None:
    class Refuses(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(401)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refuses) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port = server.server_port if kind == "wrong token" else 9
        done = site.run(
            *("sh", "-c", "echo out; exit 3"),
            OTEL_EXPORTER_OTLP_ENDPOINT=f"http://127.0.0.1:{port}",
            SKYRL_OTEL_DRAIN_S="2",
        )
        server.shutdown()
    assert (done.returncode, done.stdout) == (3, "out\n")
    why = {"unreachable": "Connection refused", "wrong token": "401 Unauthorized; check OTEL_EXPORTER_OTLP_HEADERS"}
    assert [line for line in done.stderr.splitlines() if why[kind] in line and "skyrl-otel replay" in line]
    assert done.stderr.count("skyrl-otel: ") == 2  # what was delivered, and why the rest was not


def test_torchrun_as_it_is(site: Site) -> None:
    program = site.cwd / "train.py"
    program.write_text(
        "import os\nfor i in range(50): print('rank', os.environ['RANK'], 'line', i, flush=True)\n", encoding="utf-8"
    )
    torchrun = str(Path(sys.executable).with_name("torchrun"))
    done = site.run(torchrun, "--standalone", "--nproc-per-node", "2", str(program))
    assert done.returncode == 0, done.stderr
    assert done.stdout == "".join(f"rank 0 line {i}\n" for i in range(50))
    found = [record for record in site.logs() if str(record["body"]).startswith("rank ")]
    assert sorted(str(record["body"]) for record in found) == sorted(
        f"rank {rank} line {i}" for rank in range(2) for i in range(50)
    )
    other = [record["resource"] for record in found if "rank 1 " in str(record["body"])]
    assert {(owner["skyrl.rank"], owner["skyrl.channel"]) for owner in other} == {(1, "infra")}


ALONE = """
import logging, sys, time
import skyrl_otel
skyrl_otel.attach(channel="infra")
log = logging.getLogger("alone")
for n in range(150):
    log.warning("line %d", n)
    time.sleep(0.02)
"""


def test_a_driver_alone_has_a_collector_that_survives_kills_and_reads_its_settings(site: Site) -> None:
    """`attach()` without launcher and endpoint; the settings file is named relative to the program's folder."""
    (site.cwd / "routes.toml").write_text('[[route]]\nmatch = { scope = "alone" }\nto = "alone.log"\n')
    program = subprocess.Popen([*python(ALONE)], env=site.env | {"SKYRL_OTEL_CONFIG": "routes.toml"}, cwd=site.cwd)
    killed: set[int] = set()

    def another() -> bool:
        for path in site.root.glob("*/store/ready"):
            ready = json.loads(path.read_text())
            if ready["pid"] not in killed:
                killed.add(ready["pid"])
                os.kill(ready["pid"], signal.SIGKILL)
                return True
        return False

    for _ in range(2):
        wait_until(another, "a collector")
    assert program.wait(60) == 0
    wait_until(lambda: len(site.logs("--grep", "^line ")) == 150, "all records")
    lines = (site.cwd / "logs" / "alone.log").read_text().splitlines()
    assert [line.split()[-1] for line in lines if " line " in line] == [str(n) for n in range(150)]


STAYS = """
import logging, os, sys, time
import skyrl_otel
skyrl_otel.attach(channel="infra")
count = 0
while not os.path.exists(sys.argv[1]):
    logging.warning("line %d", count)
    count += 1
    time.sleep(0.02)
open(sys.argv[1], "w").write(str(count))
"""


def test_a_driver_alone_has_a_collector_and_a_keeper_that_start_each_other(site: Site, tmp_path: Path) -> None:
    """SIGKILL for both while the driver lives; for the keeper, and then its collector, when it is gone. Always the same port."""
    stop = tmp_path / "stop"
    program = subprocess.Popen([*python(STAYS), str(stop)], env=site.env, cwd=site.cwd)
    wait_until(lambda: bool(list(site.root.glob("*/store/ready"))), "a collector")
    run = site.run_dir()

    def collector() -> dict[str, Any]:
        return read_json(run.store / "ready") or {}

    def keepers() -> set[int]:
        """Those that hold the run's launcher lock: one, or none."""
        found = set()
        inode = run.launcher_lock.stat().st_ino
        for line in Path("/proc/locks").read_text().splitlines():
            words = line.split()
            if words[1] == "FLOCK" and words[3] == "WRITE" and words[5].endswith(f":{inode}"):
                found.add(int(words[4]))
        return found

    def kill(*pids: int) -> None:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)

    def another(former: dict[str, Any]) -> dict[str, Any]:
        wait_until(lambda: collector().get("pid", former["pid"]) != former["pid"], "another collector")
        return collector()

    first = collector()
    kill(*keepers(), first["pid"])
    second = another(first)
    stop.touch()
    assert program.wait(60) == 0
    count = int(stop.read_text())
    wait_until(lambda: len(site.logs("--grep", "^line ")) == count, "all records, once each")

    [keeper] = keepers()
    kill(keeper)
    wait_until(lambda: bool(keepers() - {keeper}), "another keeper")
    assert collector() == second
    kill(second["pid"])
    third = another(second)
    assert first["url"] == second["url"] == third["url"]
    assert len(keepers()) == 1
    assert len(site.logs("--grep", "^line ")) == count


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None


def test_a_driver_alone_says_what_is_wrong_with_its_settings(site: Site) -> None:
    env = site.env | {"SKYRL_OTEL_CONFIG": "no such file.toml"}
    program = python("import skyrl_otel; skyrl_otel.attach(channel='infra'); print('shown', flush=True)")
    done = subprocess.run([*program], env=env, cwd=site.cwd, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert "SKYRL_OTEL_CONFIG='no such file.toml' cannot be read" in done.stderr
    wait_until(lambda: bool(list(site.root.glob("*/store/ready"))), "a collector all the same")


def test_two_runs_on_one_node_have_an_agent_and_a_store_each(site: Site) -> None:
    code = "import sys\nfor n in range(500): print(sys.argv[1], n)"
    runs = {name: site.start(*python(code), name, SKYRL_OTEL_RUN_ID=f"run-{name}") for name in ("one", "two")}
    assert [process.wait(60) for process in runs.values()] == [0, 0]
    for name in runs:
        bodies = [record["body"] for record in site.logs("--run", f"run-{name}", "--channel", "progress")]
        assert [body for body in bodies if body.startswith(("one ", "two "))] == [f"{name} {n}" for n in range(500)]
