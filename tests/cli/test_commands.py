"""The commands as a user types them, in a process of their own."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from skyrl_otel import __version__
from skyrl_otel.collector.service import secret
from skyrl_otel.spool.layout import open_run
from skyrl_otel.spool.token import Shipping, write
from tests.collector_process import SECOND, START, WRITER, CollectorProcess, Line, request, wait_until
from tests.stores import make_store


class Shell:
    """Runs `skyrl-otel` with a spool and a log folder of its own."""

    def __init__(self, spool_root: Path, log_dir: Path) -> None:
        self.spool_root, self.log_dir = spool_root, log_dir
        self.environ = {"SKYRL_OTEL_SPOOL_DIR": str(spool_root), "SKYRL_OTEL_LOG_DIR": str(log_dir), "TZ": "UTC"}

    def start(self, *args: str, **environ: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-m", "skyrl_otel.cli", *args],
            env={**os.environ, **self.environ, **environ},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __call__(self, *args: str, **environ: str) -> tuple[int, str, str]:
        process = self.start(*args, **environ)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err


@pytest.fixture
def shell(spool_root: Path, tmp_path: Path) -> Shell:
    (tmp_path / "logs").mkdir()
    return Shell(spool_root, tmp_path / "logs")


@pytest.fixture
def run(shell: Shell) -> Iterator[CollectorProcess]:
    """A run with a live collector and an agent's token file."""
    collector = CollectorProcess(shell.spool_root, shell.log_dir, "night-7")
    client = collector.start()
    ready = collector.ready()
    assert ready is not None
    write(collector.run, Shipping(f"{ready['url']}/v1/logs", {"authorization": f"Bearer {client.token}"}))
    policy = {"service.name": "policy", "skyrl.role": "policy", "skyrl.rank": 1, "host.name": "n1", "process.pid": 7}
    lines = [
        Line("step 1", (0, 7), severity=9),
        Line("\x1b[31mboom\x1b[2J", (7, 20), time=START + SECOND, stream="stderr"),
    ]
    assert client.post(request(lines, policy)).status == 200
    yield collector
    collector.close()


def test_help_teaches_and_version_is_told(shell: Shell) -> None:
    code, out, _ = shell("--help")
    assert code == 0
    assert "skyrl-otel run -- python train.py" in out
    for command in ("run", "logs", "runs", "doctor", "config", "collector"):
        code, out, _ = shell(command, "--help")
        assert (code, "Example" in out) == (0, True)
    assert shell("--version")[1].strip() == f"skyrl-otel {__version__}"


def test_logs_of_the_newest_run(shell: Shell, run: CollectorProcess) -> None:
    code, out, err = shell("logs")

    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "2026-09-21 14:13:20.000 INFO  n1 policy/1 step 1",
        r"2026-09-21 14:13:21.000 -     n1 policy/1 boom\x1b[2J",
    ]


def test_logs_as_json(shell: Shell, run: CollectorProcess) -> None:
    code, out, _ = shell("logs", "--json", "--stream", "stderr", "--role", "policy", "--rank", "1")

    assert code == 0
    assert "\x1b" not in out
    assert [json.loads(line) for line in out.splitlines()] == [
        {
            "time_unix_nano": START + SECOND,
            "observed_time_unix_nano": 0,
            "severity_number": 0,
            "severity_text": "",
            "scope": "skyrl_otel.text",
            "body": "\x1b[31mboom\x1b[2J",
            "attributes": {"log.iostream": "stderr", "log.record.uid": f"{WRITER}/out/0/7-20"},
            "resource": {
                "service.name": "policy",
                "skyrl.role": "policy",
                "skyrl.rank": 1,
                "host.name": "n1",
                "process.pid": 7,
            },
        }
    ]


def test_logs_in_colour_on_a_terminal_only(shell: Shell, run: CollectorProcess) -> None:
    def on_a_terminal(**environ: str) -> str:
        ours, theirs = os.openpty()
        process = subprocess.Popen(
            [sys.executable, "-m", "skyrl_otel.cli", "logs", "-n", "1"],
            env={**os.environ, **shell.environ, "TERM": "xterm-256color", **environ},
            stdout=theirs,
        )
        os.close(theirs)
        shown = b""
        try:
            while piece := os.read(ours, 4096):
                shown += piece
        except OSError:  # EIO: the other side is closed
            pass
        assert process.wait(60) == 0
        os.close(ours)
        return shown.decode()

    coloured = on_a_terminal()
    assert re.search(r"\x1b\[[0-9;]+mpolicy/1\x1b\[0m boom\\x1b\[2J", coloured)
    assert "\x1b" not in on_a_terminal(NO_COLOR="1")


def test_logs_follow_until_ctrl_c(shell: Shell, run: CollectorProcess) -> None:
    process = shell.start("logs", "-f", "-n", "1")
    assert process.stdout is not None and process.stderr is not None
    assert "boom" in process.stdout.readline()
    ready = run.ready()
    assert ready is not None
    run.client(ready["url"]).post(request([Line("step 2", (20, 27), time=START + 2 * SECOND)]))

    assert process.stdout.readline().endswith("step 2\n")
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30) == ("", "")
    assert process.returncode == 130


def test_a_reader_that_goes_away_is_no_error(shell: Shell, tmp_path: Path) -> None:
    lines = [Line(f"{n} " + "x" * 200, (n, n + 1), time=START + n) for n in range(20_000)]
    make_store(shell.log_dir / "big.db", [request(lines)], "big")
    process = shell.start("logs")
    assert process.stdout is not None and process.stderr is not None

    process.stdout.readline()
    process.stdout.close()

    assert process.wait(60) == 141
    assert process.stderr.read() == ""
    process.stderr.close()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--run", "nope"], "run 'nope' is not recorded here; there are night-7"),
        (["--grep", "("], "--grep '(' is no regular expression"),
        (["--since", "soon"], "--since 'soon' is no time; write"),
        (["--channel", "x"], "--channel 'x' is none of infra, progress"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_code_2(
    shell: Shell, run: CollectorProcess, args: list[str], said: str
) -> None:
    code, out, err = shell("logs", *args)

    assert (code, out, err.count("\n")) == (2, "", 1)
    assert said in err


def test_runs_lists_live_and_finished_ones(shell: Shell, run: CollectorProcess) -> None:
    make_store(shell.log_dir / "older.db", [request([Line(severity=17)])], "older")
    code, out, _ = shell("runs")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == ["run", "older", "night-7"]
    assert "running" in out

    _, out, _ = shell("runs", "--json")

    rows = {row["run"]: row for row in map(json.loads, out.splitlines())}
    assert rows["night-7"].items() >= {"records": 2, "errors": 0, "live": True, "lost_bytes": 0}.items()
    assert rows["older"].items() >= {"records": 1, "errors": 1, "live": False}.items()
    assert Path(rows["night-7"]["texts"]["infra"]).parent == shell.log_dir


def test_no_run_at_all(shell: Shell) -> None:
    assert shell("runs") == (0, "", "no run is recorded here; start one with: skyrl-otel run -- python train.py\n")
    assert shell("logs")[0] == 2


def test_config_masks_secrets_and_names_what_is_wrong(shell: Shell) -> None:
    code, out, err = shell(
        "config",
        OTEL_EXPORTER_OTLP_HEADERS="authorization=Bearer%20hunter2",
        OTEL_EXPORTER_OTLP_ENDPOINT="localhost",
        SKYRL_OTEL_DRAIN_S="3",
    )

    assert code == 1
    assert "hunter2" not in out + err
    assert "authorization=***" in out
    assert re.search(r"SKYRL_OTEL_DRAIN_S\s+3.0\s+\[SKYRL_OTEL_DRAIN_S\]", out)
    assert "OTEL_EXPORTER_OTLP_ENDPOINT='localhost' has no scheme; write http://localhost" in err
    assert shell("config")[0] == 0


def test_doctor_finds_nothing_wrong_with_a_healthy_run(shell: Shell, run: CollectorProcess) -> None:
    code, out, _ = shell("doctor")

    assert (code, "WRONG" in out) == (0, False)
    assert "takes records, answered in" in out
    assert "2 records of 1 writers" in out
    assert secret(run.run) not in out


def test_doctor_names_a_wrong_token(shell: Shell, run: CollectorProcess) -> None:
    ready = run.ready()
    assert ready is not None
    write(run.run, Shipping(f"{ready['url']}/v1/logs", {"authorization": "Bearer wrong"}))

    code, out, _ = shell("doctor", "--json")

    wrong = [finding for finding in map(json.loads, out.splitlines()) if finding["level"] == "wrong"]
    assert code == 1
    assert [finding["area"] for finding in wrong] == ["run night-7"]
    assert "answered 401" in wrong[0]["text"] and "token is missing or wrong" in wrong[0]["text"]


def test_doctor_names_losses_backlog_and_an_endpoint_that_is_not_there(shell: Shell, run: CollectorProcess) -> None:
    ready = run.ready()
    assert ready is not None
    attributes = {"skyrl.lost.bytes": 5_000, "skyrl.lost.reason": "the spool reached its cap"}
    loss = Line("lost", event_name="skyrl.loss", attributes=attributes)
    run.client(ready["url"]).post(request([loss], {"service.name": "critic", "host.name": "n2"}))
    stranded = open_run(shell.spool_root, "stranded")
    writer = stranded.path / f"w-{WRITER}"
    writer.mkdir(mode=0o700)
    (writer / "out").write_bytes(b"x" * 1234)

    code, out, _ = shell("doctor", OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:9")

    assert code == 1
    assert "WRONG  endpoint: http://127.0.0.1:9/v1/logs: Connection refused" in out
    assert "lost 5.0 KB of stdout of critic on n2: the spool reached its cap" in out
    assert re.search(r"WRONG  run stranded: no agent; 1.2 KB not delivered by 1 of 1 writers, kept in .*stranded", out)


def test_doctor_names_settings_and_a_spool_that_cannot_be_used(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "open").mkdir(mode=0o755)

    code, out, _ = shell("doctor", SKYRL_OTEL_SPOOL_DIR=str(tmp_path / "open"), SKYRL_OTEL_SPOOL_MAX="lots")

    assert code == 1
    assert "WRONG  config: SKYRL_OTEL_SPOOL_MAX='lots' is not a size" in out
    assert "WRONG  spool:" in out and "open to others; chmod 0700" in out


def test_collector_by_hand(shell: Shell) -> None:
    process = shell.start("collector", "--run-id", "by-hand", "--host", "127.0.0.1")
    run = open_run(shell.spool_root, "by-hand")
    wait_until(lambda: (run.store / "ready").exists(), "ready")

    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)

    assert process.returncode == 0
    assert "run by-hand at http://127.0.0.1:" in said
    code, _, err = shell("collector")
    assert (code, "name it with --run-id" in err) == (2, True)
    code, _, err = shell("collector", "--run-id", "../x")
    assert (code, "no plain name" in err) == (2, True)


def test_run_hands_over_command_options_and_exit_code(shell: Shell, tmp_path: Path) -> None:
    code, out, _ = shell(
        "run", "--run-id", "r-1", "--log-dir", str(tmp_path / "here"), "--", "sh", "-c", "echo $0 -n; exit 3", "a"
    )

    assert (code, out) == (3, "a -n\n")
    assert list((tmp_path / "here").glob("*.db"))
    code, _, err = shell("run", "--run-id", "no/name", "--", "true")
    assert (code, "is no plain name" in err) == (2, True)
    assert shell("run", "sh", "-c", "exit 7")[0] == 7


def test_help_loads_nothing_that_it_does_not_need() -> None:
    """What makes a start slow is imports: 0.3 s with these left out, over a second with them."""
    script = """
import sys
sys.argv = ["skyrl-otel", "--help"]
from skyrl_otel.cli.main import main
try:
    main()
except SystemExit:
    pass
heavy = {"aiohttp", "opentelemetry", "sqlite3", "ray", "textual", "google.protobuf", "asyncio"}
print("LOADED", sorted(heavy & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "LOADED []"
