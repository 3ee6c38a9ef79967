"""OTLP/gRPC against a real server in process: the same records, and the specification's answers."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import grpc
import pytest
from google.protobuf.any_pb2 import Any as Any_
from google.protobuf.duration_pb2 import Duration
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceResponse

from skyrl_otel.agent import grpc as ours
from skyrl_otel.agent.connect import connect
from skyrl_otel.agent.ship import Answer
from skyrl_otel.spool import token
from skyrl_otel.spool.token import Shipping
from tests.agent.conftest import Node, wait_for
from tests.receiver import Received, decode

Abort = tuple[grpc.StatusCode, str, bytes]


def _retry_info(seconds: int, nanos: int) -> bytes:
    """An encoded google.rpc.Status with one detail; the Status and the RetryInfo are wrapped by hand, the rest is Google's."""
    delay = Duration(seconds=seconds, nanos=nanos).SerializeToString()
    detail = Any_(type_url="type.googleapis.com/google.rpc.RetryInfo", value=b"\x0a" + bytes((len(delay),)) + delay)
    encoded = detail.SerializeToString()
    return b"\x08\x08\x1a" + bytes((len(encoded),)) + encoded


RETRY_INFO = _retry_info(2, 500_000_000)


class Server:
    """LogsService/Export; `abort` says how the next requests are refused."""

    def __init__(self, port: int = 0) -> None:
        self.records: list[Received] = []
        self.metadata: list[dict[str, Any]] = []
        self.abort: Callable[[bytes], Abort | None] = lambda body: None
        self.response = ExportLogsServiceResponse()
        self._lock = threading.Lock()
        self._server = grpc.server(futures.ThreadPoolExecutor(2), options=[("grpc.so_reuseport", 0)])
        handler = grpc.unary_unary_rpc_method_handler(self._export)
        service = "opentelemetry.proto.collector.logs.v1.LogsService"
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {"Export": handler}),))
        self.port = self._server.add_insecure_port(f"127.0.0.1:{port}")
        self.url = f"http://127.0.0.1:{self.port}"
        self._server.start()

    def _export(self, body: bytes, context: grpc.ServicerContext) -> bytes:
        with self._lock:
            self.metadata.append(dict(context.invocation_metadata()))
            refused = self.abort(body)
            if refused is not None:
                code, details, status = refused
                if status:
                    context.set_trailing_metadata((("grpc-status-details-bin", status),))
                context.abort(code, details)
            self.records += decode(body)
            return self.response.SerializeToString()

    def close(self) -> None:
        self._server.stop(None).wait()


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()


def _post(server: Server, body: bytes = b"", **settings: Any) -> Answer:
    connection = connect(Shipping(server.url, {"Authorization": "Bearer t"}, "grpc", **settings))
    try:
        return connection.post(body, "w/out/0=1")
    finally:
        connection.close()


def test_an_agent_delivers_over_grpc(node: Node, server: Server) -> None:
    refusals = iter(
        [(grpc.StatusCode.UNAVAILABLE, "later", b""), (grpc.StatusCode.RESOURCE_EXHAUSTED, "later", RETRY_INFO)]
    )
    server.abort = lambda body: next(refusals, None)
    folder = node.writer(role="policy")
    os.write(folder.fds["out"], b"".join(b"line %d\n" % n for n in range(1000)))
    token.write(node.run, Shipping(server.url, {"authorization": "Bearer t"}, "grpc", "gzip"))
    node.start()
    wait_for(lambda: len([one for one in server.records if not one.event]) == 1000)
    assert [one.body for one in server.records if not one.event] == [f"line {n}" for n in range(1000)]
    assert server.metadata[0]["authorization"] == "Bearer t"
    assert "/out/0=" in server.metadata[0]["skyrl-otel-low-water"]
    assert node.status()["retries"] == 2


def test_a_request_that_is_too_large_is_split(node: Node, server: Server) -> None:
    def abort(body: bytes) -> Abort | None:
        said = f"grpc: received message larger than max ({len(body)} vs. 100000)"
        return (grpc.StatusCode.RESOURCE_EXHAUSTED, said, b"") if len(body) > 100_000 else None

    server.abort = abort
    folder = node.writer(role="policy")
    os.write(folder.fds["out"], b"".join(b"line %d %b\n" % (n, b"x" * 100) for n in range(5000)))
    token.write(node.run, Shipping(server.url, {}, "grpc"))
    node.start()
    wait_for(lambda: len({one.uid for one in server.records if not one.event}) == 5000)
    assert node.status()["lost_bytes"] == 0


@pytest.mark.parametrize(
    ("code", "details", "status", "verdict", "wait_s"),
    [
        ("UNAVAILABLE", "", b"", "retry", 0.0),
        ("UNAVAILABLE", "", RETRY_INFO, "retry", 2.5),
        ("DEADLINE_EXCEEDED", "", b"", "unanswered", 0.0),
        ("RESOURCE_EXHAUSTED", "queue", RETRY_INFO, "retry", 2.5),
        ("RESOURCE_EXHAUSTED", "queue", b"\xff", "retry", 0.0),
        ("RESOURCE_EXHAUSTED", "received message larger than max (5 vs. 4)", b"", "too_large", 0.0),
        ("UNAUTHENTICATED", "", b"", "unauthorized", 0.0),
        ("UNIMPLEMENTED", "unknown service", b"", "unauthorized", 0.0),
        ("INVALID_ARGUMENT", "bad", b"", "refused", 0.0),
        ("INTERNAL", "bad", b"", "refused", 0.0),
    ],
)
def test_what_a_status_means(code: str, details: str, status: bytes, verdict: str, wait_s: float) -> None:
    answer = ours.judge(code, details, status, "host:4317")
    assert (answer.verdict, answer.wait_s) == (verdict, wait_s)
    assert code in answer.reason


def test_partial_success_is_counted(server: Server) -> None:
    server.response.partial_success.rejected_log_records = 3
    server.response.partial_success.error_message = "too old"
    answer = _post(server)
    assert (answer.verdict, answer.rejected) == ("accepted", 3)
    assert "rejected 3 records: too old" in answer.reason


def test_a_server_that_is_gone_and_back_is_found_again(server: Server) -> None:
    """Each try after a failure is a new channel, which asks the resolver anew; nothing waits for gRPC's own backoff."""
    connection = connect(Shipping(server.url, {}, "grpc", timeout_s=5.0))
    assert connection.post(b"").verdict == "accepted"
    server.close()
    assert connection.post(b"").verdict == "retry"
    again = Server(server.port)
    try:
        assert connection.post(b"").verdict == "accepted"
    finally:
        connection.close()
        again.close()


def test_without_grpcio_one_line_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "import_grpc", _no_grpc)
    answer = connect(Shipping("http://127.0.0.1:1", {}, "grpc")).post(b"")
    assert answer.verdict == "unauthorized" and answer.wait_s >= 10
    assert "needs grpcio" in answer.reason
    assert "http/protobuf" in answer.reason and "4318" in answer.reason


def _no_grpc() -> Any:
    raise ImportError("No module named 'grpc'")


def test_nobody_there_is_said_within_the_timeout() -> None:
    began = time.monotonic()
    answer = connect(Shipping("http://127.0.0.1:9", {}, "grpc", timeout_s=3.0)).post(b"")
    assert answer.verdict == "retry" and "127.0.0.1:9" in answer.reason
    assert time.monotonic() - began < 4
