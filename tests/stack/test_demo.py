"""The demo's records in a store and in Loki at once: `logs` prints the same, and the dashboard's panels say the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from skyrl_otel.query.filters import Filter
from skyrl_otel.query.loki import Loki as LokiReader
from skyrl_otel.query.records import Record
from skyrl_otel.query.sources import StoreSource
from skyrl_otel.spool import locks
from tests.collector_process import Client, CollectorProcess, Line, request
from tests.deploy.dashboard_file import dashboard
from tests.stack.processes import CHECKOUT, HEADERS, TOKEN, Loki, Otelcol, get, wait_for
from tests.stack.proxy import Proxy

pytestmark = [pytest.mark.collector, pytest.mark.loki, pytest.mark.timeout(400)]

RUN = "demo"


class Both:
    """One run, delivered to the stock collector and, with each of its 2xx, to ours."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.loki = Loki(root / "loki")
        self.otelcol = Otelcol(root / "otelcol", self.loki)
        self.ours = CollectorProcess(root / "ours", root / "ours-logs", RUN)
        self.proxy = Proxy(self.otelcol.url, self._tee)
        self.records: list[Record] = []

    def _tee(self, headers: dict[str, str], body: bytes) -> bool:
        client = self.ours.client(self.ours.ready()["url"])  # type: ignore[index]
        answer = client.send("POST", "/v1/logs", body, headers | {"authorization": f"Bearer {self.ours.token}"})
        client.close()
        return answer.status == 200

    def play(self) -> None:
        self.loki.start()
        self.otelcol.start()
        self.ours.start()
        done = subprocess.run(
            [sys.executable, "-m", "skyrl_otel", "run", "--", sys.executable, CHECKOUT / "examples" / "rl_job.py"],
            env={
                **os.environ,
                "OTEL_EXPORTER_OTLP_ENDPOINT": self.proxy.url,
                "OTEL_EXPORTER_OTLP_HEADERS": HEADERS,
                "SKYRL_OTEL_SPOOL_DIR": str(self.root / "spool"),
                "SKYRL_OTEL_LOG_DIR": str(self.root / "logs"),
                "SKYRL_OTEL_RUN_ID": RUN,
                "SKYRL_OTEL_DRAIN_S": "60",
            },
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        self._add_what_the_demo_has_not()
        # Workers that Ray ends last are told of after `run` is over.
        agent = self.root / "spool" / RUN / "agent.lock"
        wait_for(lambda: not locks.is_held(agent), "the agent has nothing more to say")
        self.records = list(StoreSource(self.ours.store).read(Filter()))
        assert len(self.records) > 1000
        wait_for(lambda: self.loki.count(f'{{skyrl_run_id="{RUN}"}}').get("", 0) >= len(self.records), "Loki has all")

    def _add_what_the_demo_has_not(self) -> None:
        """Records that name their step, and a loss."""
        now = time.time_ns()
        resource = {
            "service.name": "policy",
            "service.instance.id": "f" * 32,
            "skyrl.run.id": RUN,
            "skyrl.channel": "infra",
        }
        lines = [
            Line(f"step {step}", (step, step + 1), f"{'f' * 32}/out/0", now + step, attributes={"skyrl.step": step})
            for step in (3, 4)
        ]
        event = {"event.name": "skyrl.loss", "skyrl.lost.bytes": 4096, "skyrl.lost.reason": "for the panel"}
        name = "skyrl.loss"
        lines.append(Line("lost", (9, 10), f"{'f' * 32}/decisions/0", now + 9, attributes=event, event_name=name))
        client = Client(self.proxy.url, TOKEN)
        assert client.post(request(lines, resource)).status == 200
        client.close()

    def logs(self, *options: str) -> tuple[str, str]:
        """What `logs` prints from the store and from Loki."""
        printed = []
        for more in ([], ["--loki", self.loki.url]):
            done = subprocess.run(
                [sys.executable, "-m", "skyrl_otel", "logs", "--run", RUN, *options, *more],
                env={"PATH": os.environ["PATH"], "SKYRL_OTEL_SPOOL_DIR": str(self.root / "ours")},
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, done.stderr
            printed.append(done.stdout)
        return printed[0], printed[1]

    def close(self) -> None:
        self.proxy.close()
        self.ours.close()
        self.otelcol.kill()
        self.loki.kill()


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    import shutil
    import tempfile

    root = Path(tempfile.mkdtemp(prefix="sk-", dir="/var/tmp"))
    made = Both(root)
    try:
        made.play()
        yield made
    finally:
        made.close()
        shutil.rmtree(root, ignore_errors=True)


FILTERS: list[list[str]] = [
    [],
    ["--channel", "progress"],
    ["--channel", "infra", "--stream", "stderr"],
    ["--role", "policy", "--rank", "1"],
    ["--role", "p*"],
    ["--actor", "*Engine*"],
    ["--actor", "[a-f]*"],
    ["--node", os.uname().nodename[:1] + "*"],
    ["--grep", "engine"],
    ["--grep", r"block \d+7 "],
    ["--since", "1h", "-n", "50"],
    ["-n", "7", "--role", "driver"],
]


@pytest.mark.parametrize("options", FILTERS, ids=" ".join)
def test_logs_from_loki_are_those_of_the_store(both: Both, options: list[str]) -> None:
    from_store, from_loki = both.logs(*options)
    assert from_store.splitlines() == from_loki.splitlines()
    if not options:
        assert from_store.count("\n") >= len(both.records)
        print(f"{len(both.records)} records, {len(from_store.splitlines())} lines, no difference")


def _errors(records: list[Record]) -> list[Record]:
    return [record for record in records if record.severity_number >= 17]


def _count(key: Callable[[Record], tuple[object, ...]]) -> Callable[[list[Record]], dict[str, float]]:
    return lambda records: {name: float(n) for name, n in Counter(_labels(*key(one)) for one in records).items()}


def _labels(*values: object) -> str:
    return "|".join("" if value is None else str(value) for value in values)


def _bytes_by_actor(records: list[Record]) -> dict[str, float]:
    found: Counter[str] = Counter()
    for record in records:
        if record.resource.actor_class:
            found[_labels(record.resource.actor_class, record.resource.actor_name)] += len(record.body.encode())
    return {name: float(n) for name, n in found.items()}


def _lost(records: list[Record]) -> dict[str, float]:
    lost = sum(record.attributes["skyrl.lost.bytes"] for record in records if record.event_name == "skyrl.loss")
    return {"": float(lost)} if lost else {}


def _ends(records: list[Record]) -> list[Record]:
    return [record for record in records if record.event_name == "skyrl.process.end"]


def _steps(records: list[Record]) -> dict[str, float]:
    steps = [record.attributes["skyrl.step"] for record in records if "skyrl.step" in record.attributes]
    return {"": float(max(steps))} if steps else {}


# What the store says to each metric panel, by the labels that the panel sums by, in the order they stand there.
METRICS: dict[str, Callable[[list[Record]], dict[str, float]]] = {
    "Lines": _count(lambda one: ()),
    "Errors": lambda records: _count(lambda one: ())(_errors(records)),
    "Processes that ended badly": lambda records: _count(lambda one: ())(_errors(_ends(records))),
    "Bytes lost": _lost,
    "Errors by node, component and rank": lambda records: _count(
        lambda one: (one.resource.node, one.resource.service, one.resource.rank)
    )(_errors(records)),
    "Volume by actor": _bytes_by_actor,
    "Lines by component": _count(lambda one: (one.resource.service, one.resource.channel)),
    "Step": _steps,
}
ACTOR, TEXT = "PolicyWorker.*|.*ngine.*", "engine|rank"
LOGS: dict[str, Callable[[list[Record]], list[Record]]] = {
    "How processes ended": _ends,
    "First errors": _errors,
    "One actor": lambda records: [one for one in records if _is_chosen(one)],
    "Live": lambda records: [one for one in records if "engine" in one.body or "rank" in one.body],
}


def _is_chosen(record: Record) -> bool:
    names = (record.resource.actor_name or "", record.resource.actor_class or "")
    return any(name.startswith("PolicyWorker") or "ngine" in name for name in names)


@pytest.mark.parametrize("panel", dashboard.PANELS, ids=lambda panel: panel.title)
def test_a_panel_says_what_the_store_says(both: Both, panel: Any) -> None:
    """The panel's own query with Grafana's variables put in; graphs over the whole run in one step."""
    query = panel.query.replace("$run", RUN).replace("$actor", ACTOR).replace("$text", TEXT)
    query = query.replace("$__range", "2h").replace("$__auto", "2h")
    assert "$" not in query
    if panel.kind.startswith("logs"):
        reader = LokiReader(both.loki.url)
        now = time.time_ns()
        found = reader.entries(query, now - 7200 * 10**9, now + 600 * 10**9, 10_000, newest_first=False)
        expected = LOGS[panel.title](both.records)
        assert expected
        assert [_uid(one) for one in found] == [_uid(one) for one in expected]
        return
    result = both.loki.query(query) if panel.kind == "stat" else _graph(both.loki, panel.query.replace("$run", RUN))
    names = panel.query.partition("sum by (")[2].partition(")")[0].split(", ") if "sum by" in panel.query else []
    said = {"|".join(one["metric"].get(name, "") for name in names): float(one["value"][1]) for one in result}
    assert said == METRICS[panel.title](both.records)
    assert said, "a panel that shows nothing shows nothing"
    print(f"{panel.title}: {len(said)} series, {sum(said.values()):.0f}")


def _graph(loki: Loki, query: str) -> list[dict[str, Any]]:
    """A graph's answer as Grafana asks for it, steps of ten minutes; of each series the sum over the steps, or the greatest."""
    step_s = 600
    end = (int(time.time()) // step_s + 1) * step_s
    answer = json.loads(
        get(
            f"{loki.url}/loki/api/v1/query_range",
            query=query.replace("$__auto", f"{step_s}s"),
            start=(end - 7200) * 10**9,
            end=end * 10**9,
            step=step_s,
        )
    )
    together = max if query.startswith("max") else sum
    return [
        {"metric": one["metric"], "value": [end, together(float(value) for _, value in one["values"])]}
        for one in answer["data"]["result"]
    ]


def test_the_variables_find_the_run(both: Both) -> None:
    """Grafana's label_values for the run picker; and what Logs Drilldown asks for: volume, levels, patterns."""
    values = json.loads(get(f"{both.loki.url}/loki/api/v1/label/skyrl_run_id/values"))["data"]
    assert values == [RUN]
    volume = json.loads(
        get(f"{both.loki.url}/loki/api/v1/index/volume", query='{service_name=~".+"}', targetLabels="service_name")
    )
    assert volume["data"]["result"]
    levels = both.loki.count(f'{{skyrl_run_id="{RUN}"}}', by="detected_level")
    assert {"info", "error"} <= set(levels) and sum(levels.values()) == len(both.records)
    patterns = json.loads(get(f"{both.loki.url}/loki/api/v1/patterns", query=f'{{skyrl_run_id="{RUN}"}}'))["data"]
    assert any("<_>" in found["pattern"] for found in patterns)
    # "fake" is the tenant where there are none; this one path asks for it all the same.
    config = json.loads(LokiReader(both.loki.url, tenant="fake").get("/loki/api/v1/drilldown-limits"))
    assert config["pattern_ingester_enabled"]


def test_doctor_sees_the_run(both: Both) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "skyrl_otel", "doctor", "--loki", both.loki.url],
        env={"PATH": os.environ["PATH"], "SKYRL_OTEL_SPOOL_DIR": str(both.root / "nothing")},
        capture_output=True,
        text=True,
    )
    assert f"holds 1 runs of the last 30 days: {RUN}" in done.stdout
    assert "has refused nothing" in done.stdout


def _uid(record: Record) -> str:
    return str(record.attributes["log.record.uid"])


def test_the_queries_of_the_docs_are_queries(both: Both) -> None:
    text = (CHECKOUT / "docs" / "operations.md").read_text()
    block = text.partition("```logql\n")[2].partition("```")[0]
    queries = [
        line.partition("   #")[0].strip().replace("night-7", RUN).replace('"3"', '"1"') for line in block.splitlines()
    ]
    assert len(queries) >= 5
    reader = LokiReader(both.loki.url)
    now = time.time_ns()
    for query in queries:
        if query.startswith("sum"):
            both.loki.query(query)
        elif "NCCL" not in query and "OOM" not in query:
            assert reader.entries(query, now - 7200 * 10**9, now + 600 * 10**9, 10, newest_first=False), query
