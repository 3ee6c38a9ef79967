"""The text files: one line a record, and nothing in them that a terminal would obey or that looks like another line."""

import re
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skyrl_otel.collector.text import TextFile, message, severity_name, visible
from tests.collector_process import SECOND, START, CollectorProcess, Line, joined, request


@pytest.fixture
def utc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()


def test_lines_say_when_how_bad_where_who_and_what(collector: CollectorProcess, utc: None) -> None:
    client = collector.start()
    here = {"service.name": "policy", "host.name": "n1"}
    ray = {"service.name": "rollout", "host.name": "n2", "ray.actor.class": "Engine", "ray.actor.id": "0a1b2c3d4e5f"}
    bodies = [
        request([Line("step", severity=9), Line("two\nlines\n")], {**here, "skyrl.rank": 2}),
        request([Line("oom", severity=17, time=START + SECOND + 7_000_000)], ray),
        request([Line("named")], {**ray, "ray.actor.name": "engine 7"}),
        request([Line("late", severity_text="warning")], here),
        request([Line("bare")], {}),
        request([Line("shown")], {**here, "skyrl.channel": "progress"}),
    ]

    client.post(joined(*bodies))

    at = "2026-09-21 14:13:20.000"
    assert collector.text("infra").splitlines() == [
        f"{at} INFO  n1 policy/2 step",
        f"{at} -     n1 policy/2 two",
        "    lines",
        "2026-09-21 14:13:21.007 ERROR n2 Engine:0a1b2c3d oom",
        f"{at} -     n2 engine_7 named",
        f"{at} warning n1 policy late",
        f"{at} -     - process bare",
    ]
    assert collector.text("progress") == f"{at} -     n1 policy shown\n"


def test_a_model_can_neither_steer_the_terminal_nor_forge_a_line(collector: CollectorProcess) -> None:
    client = collector.start()
    forged = "ok\r2026-01-01 00:00:00.000 FATAL n1 policy/0 fake\n2026-01-01 00:00:00.000 FATAL n1 policy/0 fake"
    bodies = [
        forged,
        "\x1b[31mred\x1b[0m",
        "\x1b[2J\x1b]0;title\x07gone",
        "\x9b2J\u202eabc\u2028x\x00",
        "tab\tstays\r\n",
    ]

    client.post(request([Line(body) for body in bodies], {"host.name": "n\x1b[2J\nforged"}))

    lines = collector.text().split("\n")
    assert len([line for line in lines if re.match(r"\d{4}-", line)]) == len(bodies)
    assert [line.split(maxsplit=5)[-1] for line in lines if re.match(r"\d{4}-", line)] == [
        r"ok\r2026-01-01 00:00:00.000 FATAL n1 policy/0 fake",
        "red",
        r"\x1b[2Jgone",
        r"\x9b2J\u202eabc\u2028x\x00",
        "tab\tstays",
    ]
    assert lines[1] == "    2026-01-01 00:00:00.000 FATAL n1 policy/0 fake"
    assert collector.rows() == bodies  # the store has what was written


@given(st.text())
def test_whatever_is_written_no_control_character_is_shown(text: str) -> None:
    shown = message(text)

    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]", shown)
    assert all(line.startswith("    ") for line in shown.split("\n")[1:])


@given(st.text(st.characters(exclude_categories=["C", "Zl", "Zp"])))
def test_what_harms_nobody_is_shown_as_it_is(text: str) -> None:
    assert visible(text) == text


def test_severities_by_their_numbers() -> None:
    names = [severity_name(number) for number in (0, 1, 5, 9, 12, 13, 17, 21, 24, 99)]

    assert names == ["-", "TRACE", "DEBUG", "INFO", "INFO", "WARN", "ERROR", "FATAL", "FATAL", "FATAL"]


def test_a_file_that_somebody_removed_or_emptied_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "infra.log"
    file = TextFile(path, 0)
    file.append(b"one\n")
    file.settle()

    path.unlink()
    file.append(b"two\n")
    file.settle()
    assert (path.read_bytes(), file.length) == (b"two\n", 4)

    path.write_bytes(b"")
    file.append(b"three\n")
    file.append(b"four\n")
    assert path.read_bytes() == b"three\nfour\n"
    file.revert()
    assert (path.read_bytes(), file.length) == (b"", 0)
    file.close()


def test_a_link_in_the_place_of_the_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "infra.log").symlink_to(tmp_path / "elsewhere")

    with pytest.raises(OSError, match="symbolic link"):
        TextFile(tmp_path / "infra.log", 0)
    assert not (tmp_path / "elsewhere").exists()
