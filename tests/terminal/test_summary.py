"""The last words of a run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from skyrl_otel.query.summary import Loss, ProcessEnd, RunSummary, Writer
from skyrl_otel.terminal.drain import Node, Outcome
from skyrl_otel.terminal.summary import NO_COLOURS, Facts, block, plain

SECOND = 1_000_000_000
HERE = Node("node-1", 0.1, True, 0, 0, 1234, 0, 0, "")


def writer(role: str, pid: int, records: int, errors: int = 0, node: str = "node-1") -> Writer:
    return Writer(
        name=role,
        role=role,
        rank=None,
        actor_id=None,
        actor_name=None,
        actor_class=None,
        node=node,
        channel="infra",
        pid=pid,
        records=records,
        errors=errors,
        size_bytes=100,
        first_unix_nano=1,
        last_unix_nano=2,
    )


def end(name: str, at_s: float, **about: object) -> ProcessEnd:
    found = ProcessEnd(
        name=name,
        role="rollout",
        rank=None,
        actor_id="0123456789abcdef",
        actor_name=None,
        actor_class=name,
        node="node-2",
        pid=77,
        time_unix_nano=int(at_s * SECOND),
        clean=False,
        exit_code=None,
        signal="SIGKILL",
        oom_kill=False,
        last_line="generated 512 tokens",
    )
    return replace(found, **about)  # type: ignore[arg-type]


STORE = RunSummary(
    run_id="r1",
    path=Path("/logs/r1.db"),
    started_unix_nano=0,
    last_unix_nano=100 * SECOND,
    records=1234,
    errors=2,
    repeats_dropped=0,
    below_low_water_dropped=0,
    size_bytes=4096,
    texts={"infra": Path("/logs/infra-1.log"), "progress": Path("/logs/progress-1.log")},
    writers=(writer("policy", 1, 1000), writer("policy", 2, 200, errors=2, node="node-2"), writer("driver", 3, 34)),
    losses=(),
    ends=(),
)
GOOD = Facts(
    run_id="r1",
    endpoint=None,
    spool=Path("/spool/r1"),
    store=STORE,
    outcome=Outcome((HERE,), (), skipped=False),
    driver_pid=3,
    driver_failed=False,
    over_unix_nano=100 * SECOND,
)


def test_a_log_gets_one_line_when_all_is_well() -> None:
    assert plain(GOOD) == (
        "skyrl-otel: run r1: 1,234 records from 3 processes on 2 nodes, 2 errors in /logs/infra-1.log "
        "(skyrl-otel logs --run r1)\n"
    )


def test_a_terminal_gets_a_table_and_the_commands() -> None:
    assert block(GOOD, NO_COLOURS) == (
        "\nskyrl-otel  run r1: 1,234 records from 3 processes on 2 nodes, 2 errors\n"
        "\n"
        "  policy  2 processes  1,200 records  node-1, node-2  2 errors\n"
        "  driver    1 process     34 records  node-1\n"
        "\n"
        "  infra     /logs/infra-1.log\n"
        "  progress  /logs/progress-1.log\n"
        "  store     /logs/r1.db\n"
        "\n"
        "  skyrl-otel logs --run r1\n"
        "  skyrl-otel runs\n"
    )


def test_a_killed_actor_is_named_with_its_last_words() -> None:
    facts = replace(GOOD, store=replace(STORE, ends=(end("Rollout", 50),)))
    assert plain(facts).splitlines()[1] == (
        "skyrl-otel: Rollout (actor 01234567, pid 77, on node-2) was killed by SIGKILL: last words: generated 512 tokens"
    )
    assert "  ✗ Rollout (actor 01234567, pid 77, on node-2) was killed by SIGKILL\n" in block(facts, NO_COLOURS)
    assert "skyrl-otel logs --run r1 --actor Rollout\n" in block(facts, NO_COLOURS)


def test_what_a_shutdown_ends_is_no_failure() -> None:
    ends = (end("Killed", 90), end("Cleaned", 97, signal=None, exit_code=1), end("After", 101))
    facts = replace(GOOD, store=replace(STORE, ends=ends))
    assert [line.split()[1] for line in plain(facts).splitlines()[1:]] == ["Killed"]
    known = replace(facts, shutdown_unix_nano=98 * SECOND)
    assert [line.split()[1] for line in plain(known).splitlines()[1:]] == ["Killed", "Cleaned"]
    # The driver failed over an actor's death: that is the first of the ends just before its own.
    failed = replace(facts, driver_failed=True, store=replace(STORE, ends=(end("Later", 98), end("First", 97))))
    assert [line.split()[1] for line in plain(failed).splitlines()[1:]] == ["First"]


def test_what_is_missing_is_said() -> None:
    late = replace(
        HERE, name="node-3", drained=False, backlog_bytes=1_200_000, rejected_records=3, error="401 Unauthorized"
    )
    facts = replace(
        GOOD,
        store=replace(STORE, losses=(Loss("rollout/0", "node-1", "stdout", 5000, "disk full"),)),
        outcome=Outcome((HERE, late), (late,), skipped=True),
        unrecorded_bytes=100,
        remarks=("the store stays where it is",),
    )
    by_hand = "its agent goes on delivering; by hand, on node-3: skyrl-otel replay --run r1"
    assert plain(facts).splitlines()[1:] == [
        "skyrl-otel: 5.0 KB of rollout/0 (stdout) were lost: disk full",
        "skyrl-otel: 100 B of what was printed here are not recorded: the spool took no more",
        f"skyrl-otel: node-3 still holds 1.2 MB (401 Unauthorized): {by_hand}",
        "skyrl-otel: 3 records were rejected by the collector",
        "skyrl-otel: the store stays where it is",
    ]


def test_an_agent_that_could_not_start_is_quoted() -> None:
    facts = replace(GOOD, outcome=Outcome((), (), skipped=False), agent_said="ImportError: no module named zlib")
    said = [line for line in plain(facts).splitlines() if "this node's agent" in line]
    assert len(said) == 1
    assert said[0].startswith(
        "skyrl-otel: this node's agent has not reported: ImportError: no module named zlib: lines"
    )


def test_with_an_endpoint_of_the_users() -> None:
    facts = replace(GOOD, store=None, endpoint="https://user:geheim@gw:4318/v1/logs")
    assert plain(facts) == "skyrl-otel: run r1: 1,234 records delivered to https://gw:4318\n"


def test_invariant_6_what_a_model_prints_cannot_command_the_terminal() -> None:
    facts = replace(GOOD, store=replace(STORE, ends=(end("Rollout", 50, last_line="\x1b]0;owned\x07\x1b[2Jx"),)))
    assert "\x1b" not in block(facts, NO_COLOURS)
