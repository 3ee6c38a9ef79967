"""Waiting for delivery: whose word counts."""

from __future__ import annotations

import http.client
import time
from dataclasses import replace
from pathlib import Path

from skyrl_otel.terminal.drain import Node, Outcome, ask_collector, drain
from skyrl_otel.terminal.supervise import Ready
from tests.collector_process import CollectorProcess

HERE = Node("here", 0.0, True, 0, 0, 10, 0, 0, "")


def run(
    *answers: tuple[Node, ...] | Exception,
    timeout_s: float = 5.0,
    skip_after: int = 10**6,
    expected: tuple[str, ...] = (),
    place: str = "",
) -> tuple[Outcome, int]:
    """The outcome, and how often was asked. The last answer is repeated."""
    asked = 0

    def ask() -> tuple[Node, ...]:
        nonlocal asked
        answer = answers[min(asked, len(answers) - 1)]
        asked += 1
        if isinstance(answer, Exception):
            raise answer
        return answer

    outcome = drain(
        ask,
        here="here",
        place=place,
        ended_at=time.monotonic() - 1,
        timeout_s=timeout_s,
        is_skipped=lambda: asked > skip_after,
        expected=expected,
    )
    return outcome, asked


def test_a_report_from_before_the_end_does_not_count() -> None:
    outcome, asked = run((replace(HERE, age_s=3.0),), (HERE,))
    assert (outcome.complete, asked) == (True, 2)


def test_this_nodes_agent_must_have_spoken() -> None:
    outcome, asked = run(
        (), (replace(HERE, name="there"),), ConnectionRefusedError(), http.client.BadStatusLine(""), (HERE,)
    )
    assert (outcome.complete, asked) == (True, 5)


def test_an_agent_that_left_with_everything_delivered_is_not_waited_for() -> None:
    gone = replace(HERE, name="there", age_s=60.0)
    assert run((HERE, gone))[1] == 1


def test_a_node_that_does_not_answer_is_named() -> None:
    silent = replace(HERE, name="there", age_s=60.0, writers_alive=2)
    full = replace(HERE, name="full", drained=False, backlog_bytes=5)
    outcome, _ = run((HERE, silent, full), timeout_s=0.3)
    assert outcome.late == (silent, full)
    assert not outcome.skipped


def test_it_can_be_skipped() -> None:
    outcome, asked = run((replace(HERE, drained=False),), skip_after=2)
    assert outcome.skipped
    assert asked == 3


def test_a_node_that_had_workers_is_waited_for_before_it_has_ever_reported() -> None:
    there = replace(HERE, name="there")
    assert run((HERE,), (HERE,), (HERE, there), expected=("here", "there"))[1] == 3


def test_a_node_that_had_workers_and_never_reports_is_named() -> None:
    outcome, _ = run((HERE,), timeout_s=0.3, expected=("there",))
    assert [(node.name, node.error) for node in outcome.late] == [("there", "its agent has not reported")]
    assert not outcome.complete


def test_two_nodes_of_one_name_do_not_hide_each_others_backlog(spool_root: Path, tmp_path: Path) -> None:
    collector = CollectorProcess(spool_root, tmp_path / "logs")
    try:
        client = collector.start("--control-only")
        status = {"node": "here", "drained": True}
        client.status({**status, "agent": "1", "place": "a", "drained": False, "backlog_bytes": 7})
        client.status({**status, "agent": "2", "place": "b", "drained": False, "backlog_bytes": 9})
        client.status({**status, "agent": "3", "place": "b"})  # a later agent of the second one
        nodes = ask_collector(Ready(f"http://{client.host}", 0, "", "", "", client.token))
    finally:
        collector.close()
    assert {(node.place, node.backlog_bytes) for node in nodes} == {("a", 7), ("b", 0)}


def test_of_two_nodes_of_this_name_one_is_this_node() -> None:
    this, gone = replace(HERE, place="a"), replace(HERE, place="b", age_s=60.0)
    assert run((this, gone), place="a")[1] == 1
    outcome, _ = run((gone,), place="a", timeout_s=0.3)
    assert not outcome.late and not any(node.place == "a" for node in outcome.nodes)
    held = replace(HERE, place="b", drained=False, backlog_bytes=5)
    assert run((this, held), place="a", timeout_s=0.3)[0].late == (held,)
