"""Two hundred thousand lines, written in every way, with everything of ours killed again and again meanwhile."""

from __future__ import annotations

import http.client
import http.server
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from skyrl_otel.query.summary import summarize
from skyrl_otel.spool import layout, token
from tests.ray.programs import census

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

PROGRAM = Path(census.__file__)
AGENT_KILLS, COLLECTOR_KILLS = 20, 10
NATIVE = re.compile(r"\[\w+\.cc : \d+\] RAW: ")
"""What Ray's own C++ writes into a worker's stderr when the machine is slow."""


class Ledger:
    """Outside the job's tree: what the victim says that write(2) accepted."""

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        connection, _ = self._server.accept()
        with connection, connection.makefile("rb") as lines:
            try:
                for line in lines:
                    if line.endswith(b"\n"):
                        self.numbers.append(int(line))
            except ConnectionError:
                pass

    def close(self) -> None:
        self._server.close()


class Killer:
    """Stands between the agent and the collector: lets a batch arrive, and kills before the agent can hear of it."""

    def __init__(self, run: layout.RunDir, stage: Path) -> None:
        self.run = run
        self._stage = stage
        self.between = self.anywhere = self.collectors = 0
        self._accepted = 0
        shipping = token.read(run)
        assert shipping is not None
        self._target = urlsplit(shipping.endpoint)
        killer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                killer.forward(self, body)

            def log_message(self, *_: object) -> None:
                pass

            def handle(self) -> None:
                try:
                    super().handle()
                except ConnectionError:
                    pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self._endpoint = f"http://127.0.0.1:{self._server.server_address[1]}/v1/logs"
        self._stand_between()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._kill_anywhere, daemon=True)
        self._thread.start()

    def _stand_between(self) -> None:
        shipping = token.read(self.run)
        if shipping is not None and shipping.endpoint != self._endpoint:
            token.write(self.run, shipping._replace(endpoint=self._endpoint))

    @property
    def is_holding(self) -> bool:
        """Whether the program has asked that no answer comes, for a moment: see `census.Scribe.clobber`."""
        return (self._stage / "hold").exists() and not (self._stage / "over").exists()

    def forward(self, request: http.server.BaseHTTPRequestHandler, body: bytes) -> None:
        while self.is_holding:
            (self._stage / "held").touch()
            time.sleep(0.02)
        connection = http.client.HTTPConnection(self._target.hostname or "", self._target.port, timeout=30)
        try:
            connection.request("POST", self._target.path, body, dict(request.headers.items()))
            response = connection.getresponse()
            content = response.read()
        except (OSError, http.client.HTTPException):
            request.close_connection = True
            return
        finally:
            connection.close()
        if response.status == 200:
            self._accepted += 1
            if self._accepted % 3 == 1 and self.between < AGENT_KILLS // 2 + 2:
                pids = agent_pids(self.run)
                for pid in pids if self.between % 4 == 3 else pids[-1:]:  # the child is the younger one
                    kill(pid)
                    self.between += 1
                request.close_connection = True
                return
        request.send_response(response.status)
        request.send_header("content-length", str(len(content)))
        request.end_headers()
        request.wfile.write(content)

    def _kill_anywhere(self) -> None:
        while not self._stop.wait(random.uniform(0.2, 0.9)):
            self._stand_between()  # the launcher writes the true address whenever it has started a collector
            if self.is_holding:
                continue
            if self.anywhere < AGENT_KILLS // 2:
                pids = agent_pids(self.run)
                if pids:
                    kill(random.choice(pids))
                    self.anywhere += 1
            if self.collectors < COLLECTOR_KILLS and self._accepted > 2:
                pid = collector_pid(self.run)
                if pid:
                    kill(pid)
                    self.collectors += 1
                    self._stop.wait(1.0)

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()
        self._server.shutdown()
        self._server.server_close()

    @property
    def is_done(self) -> bool:
        return self.between + self.anywhere >= AGENT_KILLS and self.collectors >= COLLECTOR_KILLS


def kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def agent_pids(run: layout.RunDir) -> list[int]:
    """Parent and child of this run's agent, by age."""
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            words = Path(f"/proc/{entry}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if str(run.path).encode() in words and any(b"skyrl_otel.agent.supervise" in word for word in words):
            found.append(int(entry))
    return sorted(found)


def collector_pid(run: layout.RunDir) -> int | None:
    try:
        pid = int(json.loads((run.store / "ready").read_bytes())["pid"])
        return pid if b"skyrl_otel.collector" in Path(f"/proc/{pid}/cmdline").read_bytes() else None
    except (OSError, ValueError, KeyError):
        return None


class Census:
    """What came of it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        ledger = Ledger()
        facts_file = root / "facts.json"
        environment = {
            **os.environ,
            "SKYRL_OTEL_SPOOL_DIR": str(root / "spool"),
            "SKYRL_OTEL_LOG_DIR": str(root / "logs"),
            "SKYRL_OTEL_RUN_ID": "census",
            "SKYRL_OTEL_DRAIN_S": "120",
            "RAY_DEDUP_LOGS": "0",
        }
        command = [sys.executable, str(PROGRAM), str(ledger.port), str(facts_file)]
        process = subprocess.Popen(
            [sys.executable, "-m", "skyrl_otel", "run", "--", *command],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
        )
        self.run = layout.RunDir(root / "spool" / "census", "census")
        deadline = time.monotonic() + 60
        while token.read(self.run) is None:
            assert time.monotonic() < deadline and process.poll() is None, process.communicate()
            time.sleep(0.02)
        self.killer = Killer(self.run, root)
        self.stdout, self.stderr = process.communicate(timeout=500)
        self.killer.stop()
        self.returncode = process.returncode
        ledger.close()
        self.ledger = ledger.numbers
        self.facts = json.loads(facts_file.read_text())
        self.summary = summarize(root / "logs" / "census.db")
        logs = subprocess.run(
            [sys.executable, "-m", "skyrl_otel", "logs", "--run", "census", "--json"],
            env=environment,
            stdout=subprocess.PIPE,
            check=True,
        )
        self.records = [json.loads(line) for line in logs.stdout.splitlines()]

    def lines(self, actor: str) -> dict[str, list[dict[str, Any]]]:
        """An actor's text records by stream, in the order of the file; only of the actor's own folder."""
        found: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for record in self.records:
            stream = record["attributes"].get("log.iostream")
            if record["resource"].get("ray.actor.id") == actor and stream and "event.name" not in record["attributes"]:
                found[stream].append(record)
        for records in found.values():
            records.sort(key=place)
        return found

    def logged(self, actor: str) -> Counter[str]:
        """What an actor said by `logging`, which has a place in the source, with its severity and logger."""
        return Counter(
            f"{record['severity_text']}:{record['scope']}:{record['body']}"
            for record in self.records
            if record["resource"].get("ray.actor.id") == actor and "code.file.path" in record["attributes"]
        )


def place(record: dict[str, Any]) -> tuple[str, str, int, int]:
    writer, file, generation, offsets = record["attributes"]["log.record.uid"].split("/")
    return writer, file, int(generation), int(offsets.split("-")[0])


def end(record: dict[str, Any]) -> int:
    return int(record["attributes"]["log.record.uid"].rpartition("-")[2])


def written(record: dict[str, Any]) -> str:
    """The line as it was written: nothing of ours has a header of a known format, children have their prefix."""
    assert record["scope"] == "skyrl_otel.text" and not record["severity_text"], record
    attributes = record["attributes"]
    if "skyrl.child" not in attributes:
        return str(record["body"])
    return f"({attributes['skyrl.child']} pid={attributes['process.pid']}) {record['body']}"


def whole_lines(records: list[dict[str, Any]]) -> list[tuple[str, bool]]:
    """(body, torn) of each line, parts joined."""
    joined: list[tuple[str, bool]] = []
    begun = ""
    for record in records:
        attributes = record["attributes"]
        if NATIVE.match(record["body"]):
            continue
        body = begun + written(record)
        if "skyrl.part" in attributes and not attributes.get("skyrl.part.last"):
            begun = body
            continue
        begun = ""
        joined.append((body, bool(attributes.get("skyrl.torn"))))
    assert not begun
    return joined


@pytest.fixture(scope="module")
def result() -> Iterator[Census]:
    for name in [name for name in os.environ if name.startswith(("OTEL_", "SKYRL_"))]:
        del os.environ[name]
    root = Path(tempfile.mkdtemp(prefix="sk-", dir="/var/tmp"))
    yield Census(root)
    shutil.rmtree(root, ignore_errors=True)


def test_everything_of_ours_was_killed_often_enough(result: Census) -> None:
    assert result.returncode == 0, result.stderr
    assert "still holds" not in result.stderr, result.stderr
    assert result.killer.is_done, vars(result.killer)
    assert result.killer.between >= 10
    assert result.summary.repeats_dropped > 0, "no batch was sent twice, so nothing was tested"


def test_no_record_is_there_twice(result: Census) -> None:
    uids = Counter(record["attributes"]["log.record.uid"] for record in result.records)
    assert [uid for uid, count in uids.items() if count > 1] == []


def test_every_line_of_every_actor_is_there_once(result: Census) -> None:
    assert (
        sum(census.expected_out(0).values())
        + sum(census.expected_err(0).values())
        + sum(census.expected_records(0).values())
        + 2 * (census.BLOCKED + 1)
        == census.LINES
    )
    for facts in result.facts["scribes"]:
        rank = facts["rank"]
        streams = result.lines(facts["actor"])
        out = Counter(body for body, _ in whole_lines(streams["stdout"]))
        expected = census.expected_out(rank)
        assert out - expected == Counter(), f"rank {rank}: lines that nobody wrote"
        assert expected - out == Counter(), f"rank {rank}: lines are missing"
        assert result.logged(facts["actor"]) == census.expected_records(rank)
        if rank == census.CLOBBERED_RANK:
            continue
        err = [body for body, _ in whole_lines(streams["stderr"])]
        first = next(index for index, body in enumerate(err) if body.startswith("(Blocked"))
        assert Counter(err[:first]) == census.expected_err(rank)


def test_every_byte_of_every_file_is_in_one_record(result: Census) -> None:
    for facts in result.facts["scribes"]:
        for stream, records in result.lines(facts["actor"]).items():
            position, key = 0, None
            for record in records:
                writer, file, generation, start = place(record)
                if key != (writer, file, generation):
                    position, key = 0, (writer, file, generation)
                assert start == position, f"rank {facts['rank']} {stream}: a hole at {position}"
                position = end(record)


def test_lines_torn_by_block_buffering_children_are_marked(result: Census) -> None:
    torn = 0
    for facts in result.facts["scribes"][: census.CLOBBERED_RANK]:
        rank = facts["rank"]
        whole = {census.blocked(rank, child, n) for child in range(2) for n in range(census.BLOCKED)}
        whole |= {f"hello {rank}"}
        expected = census.expected_err(rank)
        evidence = False  # a first tear within both prefixes leaves none: see agent/assemble.py
        for body, marked in whole_lines(result.lines(facts["actor"])["stderr"]):
            torn += marked
            evidence = evidence or marked
            if evidence and not marked and body not in expected:
                assert body.startswith("(Blocked") and body.partition(") ")[2] in whole, f"not marked: {body!r}"
    assert torn > 0, "no line was torn, so nothing was tested"


def test_everybody_is_who_they_are(result: Census) -> None:
    for facts in result.facts["scribes"]:
        for records in result.lines(facts["actor"]).values():
            assert {record["resource"].get("skyrl.rank") for record in records} == {facts["rank"]}
            assert {record["resource"].get("process.pid") for record in records} == {facts["pid"]}
            assert {record["resource"].get("ray.actor.class") for record in records} == {"Scribe"}
            assert {record["resource"].get("skyrl.channel") for record in records} == {"infra"}


def test_what_a_reopened_file_destroyed_is_counted(result: Census) -> None:
    [clobbered] = [f for f in result.facts["scribes"] if f["rank"] == census.CLOBBERED_RANK]
    streams = result.lines(clobbered["actor"])
    before = [record for record in streams["stderr"] if place(record)[2] == 0]
    after = [record["body"] for record in streams["stderr"] if place(record)[2] == 1]
    assert after == ["clobbered", "after all"]
    assert not [record for record in before if record["body"].startswith("doomed")], (
        "nothing was unread, so nothing was tested"
    )
    losses = [
        record["attributes"]
        for record in result.records
        if record["attributes"].get("event.name") == "skyrl.loss"
        and record["resource"].get("ray.actor.id") == clobbered["actor"]
    ]
    delivered = max(map(end, before), default=0)
    certain = sum(loss["skyrl.lost.bytes"] for loss in losses if "may have sent" not in loss["skyrl.lost.reason"])
    at_most = sum(loss["skyrl.lost.bytes"] for loss in losses if "may have sent" in loss["skyrl.lost.reason"])
    # An agent that was killed between send and checkpoint, before the file was emptied, takes with it what it knew of.
    assert delivered + certain <= result.facts["clobbered_bytes"] <= delivered + certain + at_most
    assert certain >= result.facts["doomed_bytes"] > 0
    assert all(
        record["resource"].get("ray.actor.id") == clobbered["actor"]
        for record in result.records
        if record["attributes"].get("event.name") == "skyrl.loss"
    ), "something else was lost"


def test_the_killed_actor_lost_nothing_that_write_accepted(result: Census) -> None:
    victims = [r for r in result.records if r["resource"].get("process.pid") == result.facts["victim"]]
    said = [int(r["body"].split()[1]) for r in victims if r["body"].startswith("victim ")]
    assert sorted(said) == list(range(len(said)))
    assert len(result.ledger) > 1000
    assert set(result.ledger) <= set(said)
    assert len(said) - len(result.ledger) <= 1, "more than the write in which it died"
    [ending] = [r for r in victims if r["attributes"].get("event.name") == "skyrl.process.end"]
    assert ending["attributes"]["skyrl.exit.clean"] is False
    last = f"victim {max(said)} "
    assert ending["attributes"]["skyrl.last_line"] == next(
        r["body"].rstrip() for r in victims if r["body"].startswith(last)
    )


def test_the_terminal_had_progress_and_nothing_else(result: Census) -> None:
    assert result.stdout.splitlines() == [
        "census: all are here",
        "census: the victim is dead",
        "census: all have written",
    ]
