"""The collector is killed right after its 2xx, ten times, while Loki is away: nothing is lost, nothing is shown twice.

Once the agent hears each 2xx; once it never hears every second one, as when the connection breaks with the process, and sends
the same bytes again. Loki drops such a repeat only where the first is in its open block; what it shows is measured then.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from skyrl_otel.query.explain import explain
from skyrl_otel.spool import token
from skyrl_otel.spool.token import Shipping
from tests.agent.conftest import Node
from tests.stack.processes import TOKEN, Loki, Otelcol, get, wait_for
from tests.stack.proxy import Proxy

pytestmark = [pytest.mark.collector, pytest.mark.loki, pytest.mark.timeout(600)]

KILLS, LOKI_AWAY_S = 10, 120.0
LINES_EACH, EVERY_S = 40, 0.1
QUERY = '{skyrl_run_id="run"} |= "crash-line"'


class Killer:
    """Kills the collector at an acceptance when it is due, and starts it again a second later."""

    def __init__(self, otelcol: Otelcol, *, unheard: bool) -> None:
        self.otelcol = otelcol
        self.unheard = unheard
        self.kills = 0
        self.due = threading.Event()

    def accepted(self, headers: dict[str, str], body: bytes) -> bool:
        if not self.due.is_set():
            return True
        self.due.clear()
        os.kill(self.otelcol.pid, 9)  # it has said yes; now it cannot do anything more
        self.kills += 1
        threading.Thread(target=self._start_again).start()
        return not self.unheard or self.kills % 2 == 0

    def _start_again(self) -> None:
        self.otelcol.kill()
        time.sleep(1.0)
        self.otelcol.start()


@pytest.fixture
def folder(spool_root: Path) -> Iterator[Path]:
    yield spool_root / "servers"


@pytest.mark.parametrize("unheard", [False, True], ids=["the 2xx arrives", "every second 2xx is lost"])
def test_nothing_is_lost_or_shown_twice(spool_root: Path, folder: Path, unheard: bool) -> None:
    loki = Loki(folder / "loki")
    otelcol = Otelcol(folder / "otelcol", loki)
    node = Node(spool_root)
    killer = Killer(otelcol, unheard=unheard)
    proxy = Proxy(otelcol.url, killer.accepted)
    try:
        loki.start()
        otelcol.start()
        token.write(
            node.run, Shipping(f"{proxy.url}/v1/logs", {"authorization": f"Bearer {TOKEN}"}, compression="gzip")
        )
        node.start()
        written = _write_through_the_outage(node, loki, killer)
        assert killer.kills == KILLS
        wait_for(lambda: loki.count(QUERY).get("", 0) >= written, "all lines are in Loki", 120, 2.0)
        wait_for(lambda: otelcol.metric("otelcol_exporter_queue_size") == 0, "the queue is empty", 120, 1.0)
        _check(loki, otelcol, written, unheard=unheard)
    finally:
        node.close()
        proxy.close()
        otelcol.kill()
        loki.kill()


def _write_through_the_outage(node: Node, loki: Loki, killer: Killer) -> int:
    """Steady lines before, during and after; returns how many."""
    writer = node.writer(role="policy", rank=0)
    began = time.monotonic()
    away_from, back_at = 5.0, 5.0 + LOKI_AWAY_S
    kill_at = [away_from + (n + 0.5) * LOKI_AWAY_S / KILLS for n in range(KILLS)]
    number = 0
    is_away = False
    starter: threading.Thread | None = None
    while (now := time.monotonic() - began) < back_at + 10.0 or killer.kills < KILLS:
        os.write(writer.fds["out"], b"".join(b"crash-line %d\n" % n for n in range(number, number + LINES_EACH)))
        number += LINES_EACH
        if not is_away and starter is None and now >= away_from:
            loki.kill()
            is_away = True
        if is_away and now >= back_at:
            starter = threading.Thread(target=loki.start)
            starter.start()
            is_away = False
        if kill_at and now >= kill_at[0]:
            kill_at.pop(0)
            killer.due.set()
        time.sleep(EVERY_S)
    assert starter is not None
    starter.join()
    return number


def _check(loki: Loki, otelcol: Otelcol, written: int, *, unheard: bool) -> None:
    expected = {f"crash-line {n}" for n in range(written)}
    shown = subprocess.run(
        [
            sys.executable,
            "-m",
            "skyrl_otel",
            "logs",
            "--loki",
            loki.url,
            "--run",
            "run",
            "--grep",
            "crash-line",
            "--json",
        ],
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=True,
    )
    records = [json.loads(line) for line in shown.stdout.splitlines()]
    assert [record["body"] for record in records] == [f"crash-line {n}" for n in range(written)], "once, and in order"
    # Loki's own answer, not ours.
    raw = _raw(loki)
    assert set(raw) == expected
    repeats = sum(raw.values()) - len(raw)
    # At most the requests whose answer was lost, of one write or two each.
    assert repeats <= (KILLS // 2 * 2 * LINES_EACH if unheard else 0)
    counted = loki.count(QUERY)[""]
    assert written <= counted <= written + repeats, "what it counts twice it shows twice"
    otelcol.stop()
    in_file = Counter(record["body"] for record in otelcol.recorded() if record["body"].startswith("crash-line"))
    print(
        json.dumps(
            {
                "lines": written,
                "kills_after_2xx": KILLS,
                "of_which_the_2xx_never_arrived": KILLS // 2 if unheard else 0,
                "loki_away_s": LOKI_AWAY_S,
                "lost": len(expected - set(raw)),
                "repeats_in_logs_from_loki": len(records) - len({record["body"] for record in records}),
                "repeats_in_lokis_own_log_queries": repeats,
                "count_over_time_inflation": round(counted / written - 1, 5),
                "file_repeats": sum(in_file.values()) - len(in_file),
                "file_missing": len(expected - set(in_file)),
            }
        )
    )


def _raw(loki: Loki) -> Counter[str]:
    """Bodies as a plain log query gives them."""
    found: Counter[str] = Counter()
    start, end = time.time_ns() - 3600 * 10**9, time.time_ns() + 600 * 10**9
    while True:
        answer = json.loads(
            get(
                f"{loki.url}/loki/api/v1/query_range",
                query=QUERY,
                start=start,
                end=end,
                limit=5000,
                direction="forward",
            )
        )
        values = [(int(value[0]), value[1]) for stream in answer["data"]["result"] for value in stream["values"]]
        found.update(line for _, line in values)
        if len(values) < 5000:
            return found
        start = max(time_ns for time_ns, _ in values) + 1


def test_a_full_queue_keeps_few_copies_and_loses_nothing(spool_root: Path, folder: Path) -> None:
    """Loki is away longer than the queue in front of it is large. A request that waits there is in the collector's file by
    then, once for each try of its agent: measured here, and few, because an agent that is not answered waits longer each time."""
    loki = Loki(folder / "loki")
    otelcol = Otelcol(folder / "otelcol", loki, OTELCOL_QUEUE_BYTES="1200000", OTELCOL_LOKI_CONSUMERS="1")
    node = Node(spool_root)
    headers = {"authorization": f"Bearer {TOKEN}"}
    try:
        otelcol.start()
        token.write(node.run, Shipping(f"{otelcol.url}/v1/logs", headers, compression="gzip", timeout_s=2.0))
        node.start()
        writer = node.writer(role="policy", rank=0)
        written = 60_000
        os.write(writer.fds["out"], b"".join(b"crash-line %d\n" % n for n in range(written)))
        wait_for(lambda: node.status().get("retries", 0) >= 5, "it waited for an answer in vain five times", 60)
        assert "no answer in time" in str(node.status()["error"])
        assert "sending_queue.queue_size" in (explain(str(node.status()["error"])) or "")
        tries = int(node.status()["retries"])
        loki.start()
        wait_for(lambda: loki.count(QUERY).get("", 0) >= written, "all lines are in Loki", 120, 1.0)
        assert set(_raw(loki)) == {f"crash-line {n}" for n in range(written)}
        otelcol.stop()
        in_file = Counter(record["body"] for record in otelcol.recorded() if record["body"].startswith("crash-line"))
        assert len(in_file) == written
        copies = max(in_file.values())
        print(json.dumps({"tries": tries, "copies_of_a_line_in_the_collectors_file": copies}))
        assert copies <= tries + 3
    finally:
        node.close()
        otelcol.kill()
        loki.kill()
