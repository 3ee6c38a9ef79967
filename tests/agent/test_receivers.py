"""How real receivers answer where the specification would have them answer otherwise, and receivers that change."""

from __future__ import annotations

import os
import socket
import threading
import time
from typing import Any

import pytest

from skyrl_otel.agent import ship
from skyrl_otel.agent.connect import connect
from skyrl_otel.agent.ship import Client, Sender, judge
from skyrl_otel.spool.token import Shipping
from tests.agent.conftest import Node
from tests.receiver import OK, Receiver, Reply


def test_a_token_written_again_does_not_send_again_what_is_under_way(node: Node) -> None:
    """A stock collector's own file has no uids to drop a repeat by."""
    here, go_on = threading.Event(), threading.Event()

    def reply(receiver: Receiver, body: bytes) -> Reply:
        here.set()
        assert go_on.wait(10)
        return OK

    node.receiver.reply = reply
    folder = node.writer(role="r")
    os.write(folder.fds["out"], b"one\n")
    node.ship()
    node.start()
    assert here.wait(10)
    node.ship(timeout_s=11.0)
    os.write(folder.fds["out"], b"two\n")
    threading.Timer(1.5, go_on.set).start()
    node.receiver.wait(lambda: node.receiver.bodies() == {"one": 1, "two": 1})
    assert len(node.receiver.attempts) == len(set(node.receiver.attempts))
    assert sorted(record.body for record in node.receiver.records if not record.event) == ["one", "two"]


def test_a_400_that_says_too_large_splits_the_batch(node: Node) -> None:
    def reply(receiver: Receiver, body: bytes) -> Reply:
        # What otelcol 0.161 answers: a google.rpc.Status in a 400.
        return OK if len(body) < 50_000 else (400, {}, b"\x08\x03\x12\x1ehttp: request body too large\x00\x00")

    node.receiver.reply = reply
    folder = node.writer(role="r")
    os.write(folder.fds["out"], b"".join(b"line %d %b\n" % (n, b"x" * 100) for n in range(2000)))
    node.ship()
    node.start()
    node.receiver.wait(lambda: len(node.receiver.lines()) == 2000)
    assert node.status()["lost_bytes"] == 0


@pytest.mark.parametrize(
    ("status", "content", "verdict"),
    [
        (400, b"http: request body too large\n", "too_large"),
        (400, b"\x08\x03\x12\x1chttp: request body too large", "too_large"),
        (413, b"", "too_large"),
        (400, b"Client sent an HTTP request to an HTTPS server.\n", "unauthorized"),
        (400, b"proto: cannot parse", "refused"),
        (401, b"\x08\x10\x12\x05wrong", "unauthorized"),
        (503, b"\x08\x0e\x12\x21data refused due to high memory us", "retry"),
    ],
)
def test_what_an_answer_means(status: int, content: bytes, verdict: str) -> None:
    answer = judge(status, None, content, "http://c:4318/v1/logs")
    assert answer.verdict == verdict
    assert answer.reason.isprintable()


def test_a_connection_is_renewed_and_the_resolver_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = Receiver(), Receiver()
    ports = [first.port, second.port]
    resolve = socket.getaddrinfo

    def moved(host: Any, port: Any, *arguments: Any, **more: Any) -> Any:
        return resolve("127.0.0.1", ports[0] if host == "collector.test" else port, *arguments, **more)

    monkeypatch.setattr(socket, "getaddrinfo", moved)
    client = Client(Shipping("http://collector.test:4318/v1/logs", {}))
    assert client.post(b"").verdict == "accepted"
    ports.reverse()
    assert client.post(b"").verdict == "accepted"
    assert (first.requests, second.requests) == (2, 0)
    monkeypatch.setattr(ship, "CONNECTION_S", -1.0)
    assert client.post(b"").verdict == "accepted"
    assert (first.requests, second.requests) == (2, 1)
    client.close()
    first.close()
    second.close()


def test_a_receiver_that_takes_and_never_answers_is_asked_less_and_less_often() -> None:
    """Behind a full queue each try may be kept, and be one more copy in the receiver's own file."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}/v1/logs"
        answer = Client(Shipping(address, {}, timeout_s=0.2)).post(b"")
    assert answer.verdict == "unanswered" and "no answer in time" in answer.reason
    sender = ship.Sender(Shipping("http://127.0.0.1:9", {}), Client)
    try:
        sender._failures = 30
        assert 150.0 <= sender._backoff("unanswered") <= 300.0
        assert sender._backoff("retry") <= 15.0
    finally:
        sender.close()


def test_a_receiver_that_refuses_before_it_has_read_all_is_understood() -> None:
    """As otelcol and nginx do with a body over their limit: answer, close, the rest of the body meets a reset."""
    listener = socket.create_server(("127.0.0.1", 0))

    def refuse() -> None:
        connection, _ = listener.accept()
        connection.recv(1024)
        connection.sendall(b"HTTP/1.1 413 Request Entity Too Large\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
        connection.shutdown(socket.SHUT_WR)
        time.sleep(0.5)
        connection.close()

    thread = threading.Thread(target=refuse)
    thread.start()
    try:
        endpoint = f"http://127.0.0.1:{listener.getsockname()[1]}/v1/logs"
        answer = Client(Shipping(endpoint, {}, compression="none", timeout_s=5)).post(os.urandom(32 << 20))
    finally:
        thread.join()
        listener.close()
    assert answer.verdict == "too_large"


@pytest.mark.parametrize(
    "endpoint", ["http://127.0.0.1:port/v1/logs", "http://[::1/v1/logs", "http://127.0.0.1:99999/"]
)
def test_a_url_that_no_library_takes_is_said_and_waited_out(endpoint: str) -> None:
    sender = Sender(Shipping(endpoint, {}), connect)
    try:
        sender.submit(b"", "")
        deadline = time.monotonic() + 10
        while (answer := sender.take_answer()) is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        sender.close()
    assert answer.verdict in ("retry", "unauthorized")
    assert endpoint in answer.reason
    assert answer.wait_s > 0
