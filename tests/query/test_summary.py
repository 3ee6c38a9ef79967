"""What a run comes to."""

from pathlib import Path

from skyrl_otel.query.summary import Loss, ProcessEnd, Writer, summarize
from tests.collector_process import SECOND, START, Line, request
from tests.stores import LiveStore

ENGINE = {
    "service.name": "rollout",
    "skyrl.role": "rollout",
    "host.name": "n1",
    "ray.actor.id": "0a1b2c3d4e",
    "ray.actor.class": "Engine",
    "skyrl.channel": "infra",
    "process.pid": 77,
}


def test_a_summary_says_who_what_was_lost_and_how_each_ended(tmp_path: Path) -> None:
    live = LiveStore(tmp_path / "store.db", "night-7")
    lines = request([Line("ok", (0, 3)), Line("bad", (3, 7), severity=17, time=START + SECOND)], ENGINE)
    loss = Line(
        "lost", severity=13, event_name="skyrl.loss", attributes={"skyrl.lost.bytes": 4096, "skyrl.lost.reason": "cap"}
    )
    killed = Line(
        "process 77 was killed",
        severity=17,
        time=START + 2 * SECOND,
        stream="",
        attributes={
            "event.name": "skyrl.process.end",
            "skyrl.exit.clean": False,
            "skyrl.exit.signal": 9,
            "skyrl.last_line": "bad",
        },
    )
    clean = Line(
        event_name="skyrl.process.end",
        time=START + 3 * SECOND,
        attributes={"skyrl.exit.clean": True, "process.exit.code": 0},
    )
    live.add(lines, lines, request([loss, killed], ENGINE, "skyrl_otel.agent"))
    live.add(request([clean], {"service.name": "driver", "skyrl.role": "driver", "skyrl.channel": "progress"}))

    summary = summarize(live.path)
    live.close()

    assert (summary.run_id, summary.records, summary.errors, summary.repeats_dropped) == ("night-7", 5, 2, 2)
    assert summary.last_unix_nano == START + 3 * SECOND
    assert summary.texts == {name: tmp_path / f"{name}.log" for name in ("infra", "progress")}
    assert summary.writers[0] == Writer(
        name="Engine:0a1b2c3d",
        role="rollout",
        rank=None,
        actor_id="0a1b2c3d4e",
        actor_name=None,
        actor_class="Engine",
        node="n1",
        channel="infra",
        pid=77,
        records=4,
        errors=2,
        size_bytes=len("okbadlostprocess 77 was killed"),
        first_unix_nano=START,
        last_unix_nano=START + 2 * SECOND,
    )
    assert [(writer.name, writer.channel, writer.records) for writer in summary.writers[1:]] == [
        ("driver", "progress", 1)
    ]
    assert summary.losses == (Loss("Engine:0a1b2c3d", "n1", "stdout", 4096, "cap"),)
    assert summary.lost_bytes == 4096
    end = summary.ends[0]
    assert isinstance(end, ProcessEnd)
    assert (end.name, end.pid, end.clean, end.exit_code, end.signal, end.last_line, end.failed) == (
        "Engine:0a1b2c3d",
        77,
        False,
        None,
        "SIGKILL",
        "bad",
        True,
    )
    assert (summary.ends[1].exit_code, summary.ends[1].failed) == (0, False)
