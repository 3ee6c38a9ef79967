"""The demo (`make demo`) on a terminal: training progress, what died and why, and not one line of infra; all of it for DEBUG."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.stack.output import keep, output_below
from tests.terminal.conftest import Terminal

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
# What a terminal does not show any more: a line that was written over, and one that the cursor went up to and erased.
ERASED = re.compile(r"[^\n]*\r(?=[^\n])|[^\n]*\n(?:\x1b\[\?25h)?\r\x1b\[1A\x1b\[2K")
PROGRESS = (
    r"\(entrypoint pid=\d+\) starting 2 policy ranks, 1 reference rank, 1 rollout engine, 2 environments",
    r"\(entrypoint pid=\d+\) step 4: an environment worker died, going on with 1",
    *(rf"\(entrypoint pid=\d+\) step {n}/8  loss \d+\.\d{{4}}  reward \d\.\d\d  \d+\.\d s" for n in range(1, 9)),
    r"training done, loss \d+\.\d{4}",
)
# What has no clock, no chance and no pid in it: said by the reference rank, the engine's native child and the engine.
FIXED = re.compile(r"ref: step \d chunk \d+ scored|\[engine\] .+|rollout: step \d: 64 samples generated")


@dataclass(frozen=True)
class Shown:
    """What the terminal showed of the program, the block at the end, what was recorded, and how long it all took."""

    lines: list[str]
    summary: str
    records: list[dict[str, Any]]
    took_s: float

    def fixed(self) -> Counter[tuple[str, ...]]:
        """(actor, stream, channel, body) of lines that are the same in each run."""
        return Counter(
            (
                record["resource"].get("ray.actor.class", ""),
                record["attributes"].get("log.iostream", ""),
                record["resource"]["skyrl.channel"],
                record["body"],
            )
            for record in self.records
            if FIXED.fullmatch(record["body"])
        )

    def last_words(self) -> str:
        """The killed actor's last line, by what is recorded of it."""
        own = [
            record["body"]
            for record in self.records
            if record["body"].startswith("env 1: ") and record["resource"].get("ray.actor.class") == "EnvWorker"
        ]
        return str(max(own, key=lambda body: int(body.split()[3])))


@pytest.fixture(scope="module")
def debug() -> Iterator[Shown]:
    yield _play("demo-debug", SKYRL_LOG_LEVEL="DEBUG")


@pytest.fixture(scope="module")
def quiet(debug: Shown) -> Iterator[Shown]:
    """After the other one: what is timed is a second run, as everybody's but the first is."""
    yield _play("demo-quiet")


def _play(name: str, **settings: str) -> Shown:
    root = Path(tempfile.mkdtemp(prefix="sk-", dir="/var/tmp"))
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith(("OTEL_", "SKYRL_"))},
        "SKYRL_OTEL_SPOOL_DIR": str(root / "spool"),
        "SKYRL_OTEL_LOG_DIR": str(root / "logs"),
        "SKYRL_OTEL_RUN_ID": name,
        "SKYRL_OTEL_DRAIN_S": "60",
        "RAY_DEDUP_LOGS": "0",
        "TERM": "xterm-256color",
        **settings,
    }
    ours = [sys.executable, "-m", "skyrl_otel"]
    began = time.monotonic()
    command = [*ours, "run", "--", sys.executable, str(ROOT / "examples" / "rl_job.py")]
    terminal = Terminal(command, environment, ROOT, rows=50, columns=200)
    try:
        status = terminal.finish(240)
        took_s = time.monotonic() - began
        output = terminal.output.decode(errors="replace")
        assert os.WEXITSTATUS(status) == 0, output
        logs = subprocess.run(
            [*ours, "logs", "--run", name, "--json"], env=environment, capture_output=True, check=True
        )
        keep(name, output_below(root))
    finally:
        terminal.close()
        shutil.rmtree(root, ignore_errors=True)
    plain = ESCAPES.sub("", ERASED.sub("", output.replace("\r\n", "\n")))
    program, mark, summary = plain.partition("\nskyrl-otel  run ")
    assert mark, plain
    return Shown(
        [line for line in program.split("\n") if line],
        mark + summary,
        [json.loads(line) for line in logs.stdout.splitlines()],
        took_s,
    )


def test_the_terminal_has_progress_and_not_one_line_of_infra(quiet: Shown) -> None:
    unexpected = [line for line in quiet.lines if not any(re.fullmatch(pattern, line) for pattern in PROGRESS)]
    assert not unexpected
    for pattern in PROGRESS:
        assert sum(re.fullmatch(pattern, line) is not None for line in quiet.lines) == 1, pattern
    assert quiet.took_s < 90


@pytest.mark.parametrize("mode", ["quiet", "debug"])
def test_the_end_says_what_died_of_what_and_its_last_words(mode: str, request: pytest.FixtureRequest) -> None:
    shown: Shown = request.getfixturevalue(mode)
    [death] = re.findall(r"✗ (.+)\n\s+last words: (.+)\n", shown.summary)
    assert re.fullmatch(r"EnvWorker \(actor [0-9a-f]{8}, pid \d+, on \S+\) was killed by SIGKILL", death[0])
    assert death[1] == shown.last_words()
    counted = re.search(r"demo-\w+: ([\d,]+) records from (\d+) processes", shown.summary)
    assert counted is not None and int(counted[1].replace(",", "")) == len(shown.records)
    assert re.search(r"skyrl-otel logs --run demo-\w+ --actor EnvWorker\n", shown.summary)


def test_debug_shows_every_line_as_ray_prints_it(debug: Shown) -> None:
    shown = Counter(
        found[0] for line in debug.lines if (found := FIXED.search(line)) and re.match(r"\(\w+ pid=\d+\) ", line)
    )
    assert shown == Counter({body: count for (*_, body), count in debug.fixed().items()})
    for pattern in PROGRESS[:-1]:
        assert sum(re.search(pattern, line) is not None for line in debug.lines) == 1, pattern
    for words in ("rank 1 of 2 is ready", "env 1: episode 0 ", "INFO policy: step 8: loss"):
        assert any(words in line for line in debug.lines), words


def test_what_is_recorded_does_not_depend_on_what_is_shown(quiet: Shown, debug: Shown) -> None:
    assert sum(quiet.fixed().values()) == 8 * (20 + 2 * 200 + 1)
    assert quiet.fixed() == debug.fixed()
