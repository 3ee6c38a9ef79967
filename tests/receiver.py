"""A real OTLP/HTTP receiver in the test's own process, which can answer as badly as receivers do."""

from __future__ import annotations

import gzip
import http.server
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue

Reply = tuple[int, dict[str, str], bytes]
OK: Reply = (200, {}, b"")


@dataclass(frozen=True, slots=True)
class Received:
    """One record, flat."""

    uid: str
    body: str
    attributes: dict[str, Any]
    resource: dict[str, Any]
    time: int
    observed: int
    severity: int
    event: str
    severity_text: str
    logger: str
    raw: bytes = field(repr=False)


def value_of(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    return getattr(value, kind) if kind else None


def attributes_of(pairs: Any) -> dict[str, Any]:
    return {pair.key: value_of(pair.value) for pair in pairs}


def decode(body: bytes) -> list[Received]:
    """All records of an ExportLogsServiceRequest."""
    found = []
    for resource_logs in ExportLogsServiceRequest.FromString(body).resource_logs:
        resource = attributes_of(resource_logs.resource.attributes)
        for scope_logs in resource_logs.scope_logs:
            for record in scope_logs.log_records:
                attributes = attributes_of(record.attributes)
                found.append(
                    Received(
                        attributes.get("log.record.uid", ""),
                        value_of(record.body),
                        attributes,
                        resource,
                        record.time_unix_nano,
                        record.observed_time_unix_nano,
                        record.severity_number,
                        record.event_name,
                        record.severity_text,
                        scope_logs.scope.name,
                        record.SerializeToString(deterministic=True)
                        + resource_logs.resource.SerializeToString(deterministic=True),
                    )
                )
    return found


class Receiver:
    """Listens on 127.0.0.1; keeps what it answered 2xx to, and asks `reply` what to answer."""

    def __init__(self, reply: Callable[[Receiver, bytes], Reply] | None = None) -> None:
        self.reply = reply or (lambda receiver, body: OK)
        self.requests = 0
        self.headers: list[dict[str, str]] = []
        self.records: list[Received] = []
        self.attempts: list[bytes] = []
        self._changed = threading.Condition()
        receiver = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                status, headers, content = receiver._take(body, dict(self.headers.items()))
                self.send_response(status)
                for name, value in {"content-length": str(len(content)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

            def handle(self) -> None:
                try:
                    super().handle()
                except ConnectionError:
                    pass  # the agent was killed in the middle of a request

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/v1/logs"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def _take(self, body: bytes, headers: dict[str, str]) -> Reply:
        with self._changed:
            self.requests += 1
            self.headers.append(headers)
            self.attempts.append(body)
            reply = self.reply(self, body)
            if 200 <= reply[0] < 300:
                self.records += decode(body)
            self._changed.notify_all()
        return reply

    def distinct(self) -> dict[str, Received]:
        """By uid, the first of each."""
        with self._changed:
            found: dict[str, Received] = {}
            for record in self.records:
                found.setdefault(record.uid, record)
            return found

    def lines(self) -> list[Received]:
        """Text records, once each."""
        return [record for record in self.distinct().values() if not record.event]

    def bodies(self) -> Counter[str]:
        return Counter(record.body for record in self.lines())

    def events(self, name: str) -> list[Received]:
        return [record for record in self.distinct().values() if record.event == name]

    def wait(self, condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
        """Until `condition` holds; looks after each request."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            with self._changed:
                self._changed.wait(0.05)
            assert time.monotonic() < deadline, f"not within {timeout_s} s; {len(self.records)} records so far"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
