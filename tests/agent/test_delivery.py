"""What write(2) accepted is delivered once, or counted lost, whatever the receiver, the disk and the OOM killer do."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from skyrl_otel.spool import locks
from skyrl_otel.spool.checkpoint import Checkpoint
from skyrl_otel.spool.writer import WriterFolder
from tests.agent.conftest import Node, wait_for
from tests.receiver import OK, Receiver, Reply


def numbered(count: int, text: bytes = b"line") -> list[bytes]:
    return [b"%b %d\n" % (text, number) for number in range(count)]


def test_lines_arrive_with_who_wrote_them(node: Node) -> None:
    folder = node.writer(role="policy", rank=1, pid=os.getpid(), channel="infra", actor_id="ab12", world_size=2)
    node.ship()
    os.write(folder.fds["out"], b"hello\nworld\n")
    os.write(folder.fds["err"], b"caf\xc3\xa9 \xff\n")
    node.start()
    node.receiver.wait(lambda: len(node.receiver.lines()) == 3)
    first = next(record for record in node.receiver.lines() if record.body == "hello")
    assert first.resource == {
        "service.name": "policy",
        "service.instance.id": folder.writer_id,
        "skyrl.run.id": "run",
        "host.name": os.uname().nodename,
        "process.pid": os.getpid(),
        "skyrl.channel": "infra",
        "skyrl.role": "policy",
        "skyrl.rank": 1,
        "ray.actor.id": "ab12",
    }
    assert first.attributes == {"log.iostream": "stdout", "log.record.uid": f"{folder.writer_id}/out/0/0-6"}
    assert abs(first.observed - time.time_ns()) < 60e9
    assert {record.body for record in node.receiver.lines()} == {"hello", "world", "café \ufffd"}
    node.receiver.wait(lambda: bool(node.receiver.events("skyrl.identity")))
    assert node.receiver.events("skyrl.identity")[0].attributes["skyrl.identity.world_size"] == 2


def test_kills_of_child_and_parent_lose_and_repeat_nothing(node: Node) -> None:
    """Each kill comes right after the receiver took a batch and before the agent can know."""
    folders = [node.writer(role="r", rank=rank) for rank in range(3)]
    kills = 0

    def reply(receiver: Receiver, body: bytes) -> Reply:
        nonlocal kills
        if kills < 12 and receiver.requests % 2:
            kills += 1
            pids = node.pids()
            if pids:
                node.kill(random.choice(pids) if kills % 3 else node.status().get("pid", pids[-1]))
        return OK

    node.receiver.reply = reply
    node.ship()
    node.start()
    expected = 0
    deadline = time.monotonic() + 60
    while kills < 12 or expected < 30_000:
        for folder in folders:
            os.write(folder.fds["out"], b"".join(b"%d %d\n" % (expected + n, n) for n in range(200)))
            expected += 200
        if not locks.is_held(node.run.agent_lock):
            node.start()  # both processes at once: in a training process its watch thread does this
        time.sleep(0.02)
        assert time.monotonic() < deadline
    wait_for(lambda: locks.is_held(node.run.agent_lock) or node.start() is None)
    node.receiver.wait(lambda: len(node.receiver.lines()) >= expected, 30)
    assert sorted(node.receiver.bodies().values()) == [1] * expected
    assert len(node.receiver.records) > len(node.receiver.distinct()), "no kill fell between send and checkpoint"
    by_uid: dict[str, set[bytes]] = {}
    for record in node.receiver.records:
        by_uid.setdefault(record.uid, set()).add(record.raw)
    assert all(len(raws) == 1 for raws in by_uid.values()), "a resend differed"


def test_a_dead_receiver_costs_nothing_and_then_gets_all(node: Node) -> None:
    answers = iter([(503, {"retry-after": "0"}, b"full"), (429, {}, b""), (500, {}, b""), (408, {}, b"")])
    node.receiver.reply = lambda receiver, body: next(answers, OK)
    folder = node.writer(role="r")
    node.ship()
    os.write(folder.fds["out"], b"".join(numbered(1000)))
    node.start()
    node.receiver.wait(lambda: len(node.receiver.lines()) == 1000)
    assert node.receiver.attempts[0] == node.receiver.attempts[4], "a retry is byte for byte the same"
    wait_for(lambda: node.status().get("retries") == 4)


def test_without_a_token_the_agent_reads_and_waits(node: Node) -> None:
    folder = node.writer(role="r")
    before = time.time_ns()
    os.write(folder.fds["out"], b"early\n")
    node.start()
    wait_for(lambda: node.status().get("backlog_bytes") == 6)
    seen = time.time_ns()
    node.ship()
    node.receiver.wait(lambda: node.receiver.bodies() == {"early": 1})
    assert before < node.receiver.lines()[0].observed < seen, "the time is when it was seen, not when it was sent"


def test_wrong_token_is_said_and_waited_out(node: Node) -> None:
    node.receiver.reply = lambda receiver, body: (401, {}, b"bad token")
    folder = node.writer(role="r")
    node.ship()
    os.write(folder.fds["out"], b"kept\n")
    node.start()
    wait_for(lambda: "401" in (node.status().get("error") or ""))
    assert "OTEL_EXPORTER_OTLP_HEADERS" in node.status()["error"]
    node.receiver.reply = lambda receiver, body: OK
    node.ship(timeout_s=9.0)  # a new token file is tried at once
    node.receiver.wait(lambda: node.receiver.bodies() == {"kept": 1})


def test_a_batch_too_large_is_split(node: Node) -> None:
    node.receiver.reply = lambda receiver, body: (413, {}, b"") if len(body) > 100_000 else OK
    folder = node.writer(role="r")
    node.ship()
    os.write(folder.fds["out"], b"".join(numbered(10_000, b"x" * 50)))
    node.start()
    node.receiver.wait(lambda: len(node.receiver.lines()) == 10_000)
    assert node.status()["rejected_records"] == 0


def test_what_is_refused_for_ever_is_counted_and_the_rest_goes_on(node: Node) -> None:
    node.receiver.reply = lambda receiver, body: (400, {}, b"no") if b"poison" in body else OK
    folder = node.writer(role="r")
    node.ship()
    os.write(folder.fds["out"], b"poison\n")
    node.start()
    node.receiver.wait(lambda: bool(node.receiver.events("skyrl.loss")))
    os.write(folder.fds["out"], b"fine\n")
    node.receiver.wait(lambda: node.receiver.bodies() == {"fine": 1})
    loss = node.receiver.events("skyrl.loss")[0]
    assert loss.attributes["skyrl.lost.bytes"] == len(b"poison\n")
    assert "400" in loss.attributes["skyrl.lost.reason"]


def test_partial_success_is_counted_not_resent(node: Node) -> None:
    from opentelemetry.proto.collector.logs.v1 import logs_service_pb2 as pb

    partial = pb.ExportLogsPartialSuccess(rejected_log_records=3, error_message="too old")
    content = pb.ExportLogsServiceResponse(partial_success=partial).SerializeToString()
    node.receiver.reply = lambda receiver, body: (200, {}, content)
    folder = node.writer(role="r")
    node.ship()
    os.write(folder.fds["out"], b"".join(numbered(5)))
    node.start()
    wait_for(lambda: node.status().get("rejected_records") == 3)
    assert "too old" in node.status()["error"]


def test_a_partial_line_goes_out_after_a_second_and_is_continued(node: Node) -> None:
    folder = node.writer(role="r")
    node.ship()
    node.start()
    os.write(folder.fds["out"], b"loading... ")
    node.receiver.wait(lambda: node.receiver.bodies() == {"loading... ": 1})
    os.write(folder.fds["out"], b"done\n")
    node.receiver.wait(lambda: len(node.receiver.lines()) == 2)
    first, second = sorted(node.receiver.lines(), key=lambda record: record.time)
    assert first.attributes["skyrl.part"] == 0
    assert second.attributes["skyrl.part"] == 1
    assert second.attributes["skyrl.part.last"] is True
    assert first.uid.endswith("/0-11")
    assert second.uid.endswith("/11-16")


def test_a_truncated_file_is_a_new_generation_and_the_unread_is_counted(node: Node) -> None:
    folder = node.writer(role="r")
    os.write(folder.fds["out"], b"one\n")
    node.start()
    wait_for(lambda: node.status().get("backlog_bytes") == 4)
    os.truncate(folder.path / "out", 0)
    os.write(folder.fds["out"], b"2\n")
    node.ship()
    node.receiver.wait(lambda: node.receiver.bodies() == {"2": 1} and bool(node.receiver.events("skyrl.loss")))
    assert node.receiver.lines()[0].uid == f"{folder.writer_id}/out/1/0-2"
    assert node.receiver.events("skyrl.loss")[0].attributes["skyrl.lost.bytes"] == 4
    wait_for(lambda: node.status().get("lost_bytes") == 4)


def test_a_file_truncated_and_grown_again_is_noticed(node: Node) -> None:
    folder = node.writer(role="r")
    node.ship()
    os.write(folder.fds["out"], b"".join(numbered(10)))
    node.start()
    node.receiver.wait(lambda: len(node.receiver.lines()) == 10)
    for pid in node.pids():
        os.kill(pid, signal.SIGSTOP)
    os.truncate(folder.path / "out", 0)
    os.write(folder.fds["out"], b"".join(numbered(100, b"other")))
    for pid in node.pids():
        os.kill(pid, signal.SIGCONT)
    node.receiver.wait(lambda: len(node.receiver.lines()) == 110)
    assert set(node.receiver.bodies().values()) == {1}


def test_a_rotated_followed_file_is_read_to_its_end_first(node: Node, spool_root: Path) -> None:
    log = spool_root / "worker.out"
    log.write_bytes(b":job_id:01\nfirst\n")
    found = log.stat()
    follow = {"path": str(log), "dev": found.st_dev, "ino": found.st_ino, "offset": 0, "skip_markers": True}
    folder = WriterFolder.create(node.run, files=(), facts={"role": "r", "follow": {"out": follow}})
    node.folders.append(folder)
    node.ship()
    node.start()
    node.receiver.wait(lambda: node.receiver.bodies() == {"first": 1})
    for pid in node.pids():
        os.kill(pid, signal.SIGSTOP)
    with log.open("ab") as old:
        old.write(b"second\n")
    log.rename(spool_root / "worker.out.1")
    log.write_bytes(b"third\n")
    log.rename(spool_root / "worker.out.1x")
    (spool_root / "worker.out.1").rename(spool_root / "worker.out.2")
    (spool_root / "worker.out.1x").rename(spool_root / "worker.out.1")
    log.write_bytes(b"fourth\n")
    for pid in node.pids():
        os.kill(pid, signal.SIGCONT)
    node.receiver.wait(lambda: len(node.receiver.lines()) == 4)
    ordered = sorted(node.receiver.lines(), key=lambda record: record.uid)
    assert [record.body for record in ordered] == ["first", "second", "third", "fourth"]
    assert log.read_bytes() == b"fourth\n", "somebody else's file is not punched"


def test_space_is_given_back_behind_the_checkpoint(node: Node) -> None:
    folder = node.writer(role="r")
    node.ship()
    node.start()
    line = b"x" * 1023 + b"\n"
    for _ in range(16):
        os.write(folder.fds["out"], line * 1024)
    node.receiver.wait(lambda: len(node.receiver.lines()) == 16 * 1024, 40)
    out = folder.path / "out"
    wait_for(lambda: out.stat().st_blocks * 512 <= 3 << 20)
    assert out.stat().st_size == 16 << 20


def test_invariant_5_past_the_cap_the_oldest_go_and_are_counted(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SKYRL_OTEL_SPOOL_MAX", "4MB")
    folder = node.writer(role="r")
    line = b"y" * 1000
    for number in range(16):
        os.write(folder.fds["out"], b"".join(b"%06d %b\n" % (number * 1000 + n, line) for n in range(1000)))
    node.start()
    wait_for(lambda: node.status().get("lost_bytes", 0) > 8 << 20)
    assert (folder.path / "out").stat().st_blocks * 512 < 9 << 20
    node.ship()
    node.receiver.wait(lambda: any(r.body.startswith("015999") for r in node.receiver.lines()), 30)
    wait_for(lambda: node.status()["drained"])
    lost = sum(event.attributes["skyrl.lost.bytes"] for event in node.receiver.events("skyrl.loss"))
    assert lost + sum(len(record.body) + 1 for record in node.receiver.lines()) == (folder.path / "out").stat().st_size
    assert all(record.attributes.get("skyrl.part") is None for record in node.receiver.lines())


WRITER = """
import os, sys
from pathlib import Path
from skyrl_otel.spool import layout
from skyrl_otel.spool.writer import WriterFolder
folder = WriterFolder.create(layout.open_run(Path(sys.argv[1]), "run"), facts={"role": "r", "pid": os.getpid()})
os.write(folder.fds["out"], b"my last words\\n")
exec(sys.argv[2])
"""


@pytest.mark.parametrize(
    ("how", "body", "attributes"),
    [
        ("os.kill(os.getpid(), 9)", "killed by SIGKILL", {"skyrl.exit.signal": 9, "skyrl.exit.clean": False}),
        ("os._exit(3)", "exited with code 3", {"process.exit.code": 3, "skyrl.exit.clean": False}),
        (
            "folder.publish({'goodbye': {'code': 0}})",
            "exited with code 0",
            {"process.exit.code": 0, "skyrl.exit.clean": True},
        ),
    ],
)
def test_how_a_writer_ended(node: Node, how: str, body: str, attributes: dict[str, object]) -> None:
    if not _kernel_tells_exits() and "publish" not in how:
        pytest.skip("this kernel is older than 6.15 and does not tell how somebody else's child ended")
    node.ship()
    node.start()
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(node.run.path.parent), "input()\n" + how], stdin=-1)
    node.receiver.wait(lambda: bool(node.receiver.lines()))
    writer.communicate(b"\n")
    node.receiver.wait(lambda: bool(node.receiver.events("skyrl.process.end")))
    (end,) = node.receiver.events("skyrl.process.end")
    assert end.body == f"process {writer.pid} {body}"
    assert end.attributes.items() >= {**attributes, "skyrl.last_line": "my last words"}.items()
    wait_for(lambda: not list(node.run.writers()))


def _kernel_tells_exits() -> bool:
    major, minor = os.uname().release.split(".")[:2]
    return (int(major), int(minor)) >= (6, 15)


def test_an_agent_ends_when_all_is_delivered_and_comes_back_for_the_next(node: Node) -> None:
    node.ship()
    folder = WriterFolder.create(node.run, facts={"role": "r"})
    os.write(folder.fds["out"], b"first\n")
    node.start()
    node.receiver.wait(lambda: node.receiver.bodies() == {"first": 1})
    folder.close()
    wait_for(lambda: not locks.is_held(node.run.agent_lock), 30)
    assert not list(node.run.writers())
    assert not node.run.token.exists(), "who comes next brings it"
    node.ship()
    again = node.writer(role="r")
    os.write(again.fds["out"], b"second\n")
    node.start()
    node.receiver.wait(lambda: node.receiver.bodies() == {"first": 1, "second": 1})


def test_sigterm_flushes_and_keeps_the_rest(node: Node) -> None:
    node.ship()
    folder = node.writer(role="r")
    node.start()
    os.write(folder.fds["out"], b"before\n")
    os.kill(node.status().get("supervisor_pid") or min(node.pids()), signal.SIGTERM)
    wait_for(lambda: not locks.is_held(node.run.agent_lock))  # a process loses its argv before its locks
    os.write(folder.fds["out"], b"after\n")
    node.start()
    node.receiver.wait(lambda: node.receiver.bodies() == {"before": 1, "after": 1})


def test_the_low_water_mark_follows_the_checkpoint(node: Node) -> None:
    node.ship()
    folder = node.writer(role="r")
    node.start()
    for number in range(3):
        os.write(folder.fds["out"], b"%d\n" % number)
        node.receiver.wait(lambda number=number: len(node.receiver.lines()) == number + 1)
    marks = [
        item
        for headers in node.receiver.headers
        for item in headers["skyrl-otel-low-water"].split(",")
        if "/out/" in item
    ]
    assert marks == [f"{folder.writer_id}/out/0={offset}" for offset in (0, 2, 4)]
    wait_for(lambda: Checkpoint.read(folder.path / "checkpoint").files["out"].offset == 6)


def test_a_line_waits_for_its_rank_and_not_longer(node: Node) -> None:
    node.ship()
    known = node.writer(role="policy", awaits="rank")
    unknown = node.writer(role="env", awaits="rank")
    os.write(known.fds["out"], b"early\n")
    os.write(unknown.fds["out"], b"early too\n")
    node.start()
    time.sleep(0.3)
    assert not node.receiver.lines()
    known.publish({"rank": 7, "awaits": ""})
    node.receiver.wait(lambda: len(node.receiver.lines()) == 2)
    ranks = {record.body: record.resource.get("skyrl.rank") for record in node.receiver.lines()}
    assert ranks == {"early": 7, "early too": None}


def test_a_new_identity_holds_from_its_size_on(node: Node) -> None:
    folder = node.writer(role="task", channel="infra")
    os.write(folder.fds["out"], b"a\n")
    folder.publish({"channel": "progress"})
    os.write(folder.fds["out"], b"b\n")
    folder.publish({"channel": "infra"})
    os.write(folder.fds["out"], b"c\n")
    node.ship()
    node.start()
    node.receiver.wait(lambda: len(node.receiver.lines()) == 3)
    channels = {record.body: record.resource["skyrl.channel"] for record in node.receiver.lines()}
    assert channels == {"a": "infra", "b": "progress", "c": "infra"}
