"""A real collector in a process of its own, and a client that speaks OTLP/HTTP to it with the official classes."""

import gzip
import http.client
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue

from skyrl_otel.spool.layout import RunDir, open_run, store_path

WRITER = "0123456789abcdef" * 2
SECOND = 1_000_000_000
START = 1_790_000_000 * SECOND
DEADLINE_S = 30.0


@dataclass(frozen=True)
class Line:
    """One record. `source` and `span` make its uid; without a span it has none."""

    body: Any = "hello"
    span: tuple[int, int] | None = None
    source: str = f"{WRITER}/out/0"
    time: int = START
    observed: int = 0
    severity: int = 0
    severity_text: str = ""
    stream: str = "stdout"
    attributes: Mapping[str, Any] = field(default_factory=dict)
    event_name: str = ""


def any_value(value: Any) -> AnyValue:
    made = AnyValue()
    if isinstance(value, bool):
        made.bool_value = value
    elif isinstance(value, str):
        made.string_value = value
    elif isinstance(value, int):
        made.int_value = value
    elif isinstance(value, float):
        made.double_value = value
    elif isinstance(value, bytes):
        made.bytes_value = value
    elif isinstance(value, list):
        made.array_value.values.extend(any_value(item) for item in value)
        made.array_value.SetInParent()
    elif isinstance(value, dict):
        made.kvlist_value.values.extend(pairs(value))
        made.kvlist_value.SetInParent()
    return made


def pairs(values: Mapping[str, Any]) -> list[KeyValue]:
    return [KeyValue(key=key, value=any_value(value)) for key, value in values.items()]


def request(
    lines: Iterable[Line], resource: Mapping[str, Any] | None = None, scope: str = "skyrl_otel.text"
) -> ExportLogsServiceRequest:
    """All lines under one resource and scope."""
    made = ExportLogsServiceRequest()
    logs = made.resource_logs.add()
    logs.resource.attributes.extend(pairs(resource if resource is not None else {"service.name": "policy"}))
    scope_logs = logs.scope_logs.add()
    scope_logs.scope.name = scope
    for line in lines:
        record = scope_logs.log_records.add()
        record.time_unix_nano = line.time
        record.observed_time_unix_nano = line.observed
        record.severity_number = line.severity
        record.severity_text = line.severity_text
        record.event_name = line.event_name
        record.body.CopyFrom(any_value(line.body))
        attributes = dict(line.attributes)
        if line.stream:
            attributes["log.iostream"] = line.stream
        if line.span is not None:
            attributes["log.record.uid"] = f"{line.source}/{line.span[0]}-{line.span[1]}"
        record.attributes.extend(pairs(attributes))
    return made


def joined(*requests: ExportLogsServiceRequest) -> ExportLogsServiceRequest:
    made = ExportLogsServiceRequest()
    for one in requests:
        made.MergeFrom(one)
    return made


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes


class Client:
    """One kept connection with the right token."""

    def __init__(self, url: str, token: str) -> None:
        self.token = token
        self.host = url.removeprefix("http://")
        self._connection = http.client.HTTPConnection(self.host, timeout=DEADLINE_S)

    def send(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> Answer:
        merged = {"authorization": f"Bearer {self.token}", **(headers or {})}
        try:
            self._connection.request(method, path, body, {key: value for key, value in merged.items() if value})
            response = self._connection.getresponse()
            return Answer(
                response.status, {key.lower(): value for key, value in response.getheaders()}, response.read()
            )
        except (http.client.HTTPException, OSError):
            self._connection.close()
            raise

    def post(
        self,
        content: ExportLogsServiceRequest | bytes,
        *,
        low_water: str = "",
        compress: bool = False,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        body = content if isinstance(content, bytes) else content.SerializeToString()
        merged = {"content-type": "application/x-protobuf", "skyrl-otel-low-water": low_water, **(headers or {})}
        if compress:
            body = gzip.compress(body, 1)
            merged["content-encoding"] = "gzip"
        return self.send("POST", "/v1/logs", body, merged)

    def status(self, fields: Mapping[str, Any]) -> Answer:
        return self.send("POST", "/v1/status", json.dumps(fields).encode(), {"content-type": "application/json"})

    def agents(self) -> list[dict[str, Any]]:
        answer = self.send("GET", "/v1/agents")
        assert answer.status == 200
        found: list[dict[str, Any]] = json.loads(answer.body)
        return found

    def close(self) -> None:
        self._connection.close()


_WITH_LIMITS = """
import dataclasses, sys
from skyrl_otel.collector import __main__ as command, receiver, service
settings = command.settings(sys.argv[1:])
sys.exit(service.main(dataclasses.replace(settings, limits=receiver.Limits(**{limits}))))
"""


class CollectorProcess:
    """``python -m skyrl_otel.collector`` for one run. `start` may be called again after `kill` or `stop`."""

    def __init__(self, spool_root: Path, log_dir: Path, run_id: str = "run-1") -> None:
        self.run: RunDir = open_run(spool_root, run_id)
        self.log_dir = log_dir
        self._process: subprocess.Popen[bytes] | None = None
        self._clients: list[Client] = []

    @property
    def store(self) -> Path:
        return store_path(self.run)

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def spawn(self, *options: str, **limits: float) -> "subprocess.Popen[bytes]":
        """Start it; `limits` are fields of `receiver.Limits` that are not to have their usual value."""
        command = [sys.executable, "-m", "skyrl_otel.collector"]
        if limits:
            command[1:] = ["-c", _WITH_LIMITS.format(limits=limits)]
        command += ["--run-dir", str(self.run.path), "--log-dir", str(self.log_dir), "--host", "127.0.0.1", *options]
        self._process = subprocess.Popen(command, stderr=subprocess.PIPE)
        return self._process

    def start(self, *options: str, **limits: float) -> Client:
        """Start it and wait until it is ready."""
        process = self.spawn(*options, **limits)
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline:
            ready = self.ready()
            if ready is not None and ready["pid"] == process.pid:
                return self.client(ready["url"])
            assert process.poll() is None, self.said()
            time.sleep(0.01)
        raise AssertionError("the collector did not become ready")

    def client(self, url: str) -> Client:
        """Another connection; closed with the collector."""
        self._clients.append(Client(url, self.token))
        return self._clients[-1]

    def ready(self) -> dict[str, Any] | None:
        try:
            found: dict[str, Any] = json.loads((self.run.store / "ready").read_text())
        except FileNotFoundError:
            return None
        return found

    @property
    def token(self) -> str:
        return (self.run.store / "secret").read_text().strip()

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.communicate()

    def stop(self) -> tuple[int, str]:
        """SIGTERM; exit code and what it said."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        _, said = self._process.communicate(timeout=DEADLINE_S)
        return self._process.returncode, said.decode()

    def wait(self) -> int:
        """Its exit code, when it ends by itself."""
        assert self._process is not None
        self._process.communicate(timeout=DEADLINE_S)
        return self._process.returncode

    def said(self) -> str:
        """What an ended process said on stderr."""
        assert self._process is not None and self._process.stderr is not None
        return self._process.communicate(timeout=DEADLINE_S)[1].decode()

    def close(self) -> None:
        for client in self._clients:
            client.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            if self._process.stderr is not None:
                self._process.stderr.close()

    def text(self, channel: str = "infra") -> str:
        """All text files of the channel, in order of their names."""
        return "".join(path.read_text() for path in sorted(self.log_dir.glob(f"{channel}-*.log")))

    def rows(self, columns: str = "body") -> list[Any]:
        """Of all records, in the order they were stored."""
        db = sqlite3.connect(f"file:{self.store}?mode=ro", uri=True)
        try:
            found = db.execute(f"SELECT {columns} FROM records ORDER BY id").fetchall()
        finally:
            db.close()
        return [row[0] if len(row) == 1 else row for row in found]

    def meta(self) -> dict[str, Any]:
        db = sqlite3.connect(f"file:{self.store}?mode=ro", uri=True)
        try:
            return dict(db.execute("SELECT key, value FROM meta"))
        finally:
            db.close()


def wait_until(condition: Any, what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"not in time: {what}"
        time.sleep(0.01)


def is_root() -> bool:
    return os.geteuid() == 0
