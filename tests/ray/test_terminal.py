"""What the user sees during a Ray run, and that what is recorded does not depend on it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.ray.programs import fixed

pytestmark = [pytest.mark.ray, pytest.mark.timeout(150)]

PROGRAM = ("driver begins", "driver ends", "progress begins", "progress ends", "nested task", "talker")


def run(root: Path, **settings: str) -> tuple[subprocess.CompletedProcess[str], list[dict[str, Any]]]:
    """One run of the program, and its records."""
    environment = {
        **os.environ,
        "SKYRL_OTEL_SPOOL_DIR": str(root / "spool"),
        "SKYRL_OTEL_LOG_DIR": str(root / "logs"),
        "SKYRL_OTEL_RUN_ID": "run",
        "RAY_DEDUP_LOGS": "0",
        **settings,
    }
    ours = [sys.executable, "-m", "skyrl_otel"]
    done = subprocess.run(
        [*ours, "run", "--", sys.executable, fixed.__file__],
        env=environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    listed = subprocess.run([*ours, "logs", "--run", "run", "--json"], env=environment, capture_output=True, check=True)
    return done, [json.loads(line) for line in listed.stdout.splitlines()]


def shown(output: str) -> Counter[str]:
    """The program's own lines on a terminal, without Ray's prefix and colours."""
    plain = re.sub(r"\x1b\[\d+m", "", output)
    lines = (re.sub(r"^\(\S+ pid=\d+\) ", "", line) for line in plain.splitlines())
    return Counter(line for line in lines if line.startswith(PROGRAM))


def recorded(records: list[dict[str, Any]]) -> Counter[tuple[str, str, str, str]]:
    """(actor, stream, channel, body) of the program's own lines."""
    return Counter(
        (
            record["resource"].get("ray.actor.name", record["resource"].get("ray.task.name", "")),
            record["attributes"]["log.iostream"],
            record["resource"]["skyrl.channel"],
            record["body"],
        )
        for record in records
        if record["body"].startswith(PROGRAM)
    )


def expected() -> Counter[tuple[str, str, str, str]]:
    lines = Counter(
        {
            ("", "stdout", "progress", "driver begins"): 1,
            ("", "stdout", "progress", "driver ends"): 1,
            ("entrypoint", "stdout", "progress", "progress begins"): 1,
            ("entrypoint", "stderr", "progress", "progress ends"): 1,
            ("nested", "stdout", "infra", "nested task"): 1,
        }
    )
    for number in range(2):
        actor = f"talker-{number}"
        lines.update((actor, "stdout", "infra", f"talker {number} says {n}") for n in range(50))
        lines[actor, "stderr", "infra", f"talker {number} warns"] += 1
        lines[actor, "stdout", "infra", f"talker {number} writes"] += 1
        lines[actor, "stdout", "infra", f"talker {number} child"] += 1
    return lines


PROGRESS = Counter(("driver begins", "driver ends", "progress begins", "progress ends"))


@pytest.mark.parametrize(
    ("settings", "everything"),
    [
        ({}, False),
        ({"SKYRL_LOG_LEVEL": "DEBUG"}, True),
        ({"SKYRL_DUMP_INFRA_LOG_TO_STDOUT": "1"}, True),
        ({"SKYRL_OTEL_CAPTURE": "follow"}, False),
    ],
    ids=["progress", "debug", "dump", "follow"],
)
def test_the_terminal_shows_what_was_asked_for_and_the_record_is_the_same(
    spool_root: Path, settings: dict[str, str], everything: bool
) -> None:
    done, records = run(spool_root, **settings)
    on_terminal = shown(done.stdout + done.stderr)
    if everything:
        assert on_terminal == Counter(body for *_, body in expected().elements())
    else:
        assert on_terminal == PROGRESS
    assert recorded(records) == expected()
    assert "(raylet)" not in done.stdout
    assert "output of this actor is recorded" not in done.stdout + done.stderr


def test_without_the_launcher_a_runtime_env_records_the_workers(spool_root: Path) -> None:
    """``ray.init(runtime_env=skyrl_otel.runtime_env())`` in a plain python."""
    script = Path(fixed.__file__).read_text()
    script = script.replace("ray.init(num_cpus=1", "ray.init(runtime_env=skyrl_otel.runtime_env(), num_cpus=1")
    program = spool_root / "program.py"
    program.write_text("import skyrl_otel\nskyrl_otel.attach()\n" + script)
    environment = {
        **os.environ,
        "SKYRL_OTEL_SPOOL_DIR": str(spool_root / "spool"),
        "SKYRL_OTEL_LOG_DIR": str(spool_root / "logs"),
        "RAY_DEDUP_LOGS": "0",
    }
    done = subprocess.run([sys.executable, str(program)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert shown(done.stdout + done.stderr) == PROGRESS
    ours = [sys.executable, "-m", "skyrl_otel"]

    def records() -> list[dict[str, Any]]:
        listed = subprocess.run([*ours, "logs", "--json"], env=environment, capture_output=True, check=False)
        return [json.loads(line) for line in listed.stdout.splitlines()]

    from tests.agent.conftest import wait_for

    infra = Counter({line: count for line, count in expected().items() if line[0].startswith(("talker", "nested"))})
    wait_for(lambda: recorded(records()) & infra == infra, 30)
