"""What a sender sees of the collector."""

import gzip
import random
import socket
import threading
import time
from pathlib import Path

import pytest
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceResponse

from tests.collector_process import SECOND, START, CollectorProcess, Line, joined, request, wait_until

PATHS = [("POST", "/v1/logs"), ("POST", "/v1/status"), ("GET", "/v1/agents"), ("GET", "/"), ("GET", "/no/such/path")]
WRONG = ["", "Bearer ", "Bearer wrong", "Basic {token}", "{token}", "Bearer {token}x", "bearer  {token}", "é"]


def test_invariant_8_every_path_needs_the_token(collector: CollectorProcess) -> None:
    client = collector.start()

    for method, path in PATHS:
        for given in WRONG:
            authorization = given.format(token=client.token).encode().decode("latin-1")
            answer = client.send(method, path, b"" if method == "POST" else None, {"authorization": authorization})

            assert (method, path, given, answer.status) == (method, path, given, 401)
            assert client.token.encode() not in answer.body
    assert collector.rows() == []


@pytest.mark.parametrize("compress", [False, True], ids=["identity", "gzip"])
def test_a_record_is_stored_with_all_it_says(collector: CollectorProcess, compress: bool) -> None:
    client = collector.start()
    line = Line(
        body="step 7 loss 0.3",
        span=(10, 26),
        time=START + 5,
        observed=START + 9,
        severity=9,
        severity_text="INFO",
        stream="stderr",
        attributes={
            "code.lineno": 12,
            "ratio": 0.5,
            "ok": True,
            "tags": ["a", {"b": b"\x00\xff"}],
            "nan": float("nan"),
        },
        event_name="skyrl.step",
    )

    answer = client.post(request([line], {"service.name": "policy", "skyrl.rank": 3}), compress=compress)

    assert (answer.status, answer.headers["content-type"]) == (200, "application/x-protobuf")
    assert not ExportLogsServiceResponse.FromString(answer.body).HasField("partial_success")
    columns = "time, observed, severity, severity_text, body, stream, attributes, event_name, start, end"
    assert collector.rows(columns) == [
        (
            START + 5,
            START + 9,
            9,
            "INFO",
            "step 7 loss 0.3",
            "stderr",
            '{"code.lineno":12,"ratio":0.5,"ok":true,"tags":["a",{"b":"AP8="}],"nan":"NaN"}',
            "skyrl.step",
            10,
            26,
        )
    ]


def test_a_body_that_is_no_string_and_a_time_beyond_all_clocks_are_kept(collector: CollectorProcess) -> None:
    client = collector.start()

    answer = client.post(request([Line({"a": [1, "x"]}, time=2**64 - 1), Line(7), Line(None), Line("")]))

    assert answer.status == 200
    assert collector.rows() == [b'{"a":[1,"x"]}', b"7", "", ""]
    assert collector.rows("time")[0] == 2**63 - 1


def test_a_record_without_any_time_gets_that_of_its_arrival(collector: CollectorProcess) -> None:
    client = collector.start()
    before = time.time_ns()

    client.post(request([Line(time=0), Line(time=0, observed=START)]))

    arrival, observed = collector.rows("time")
    assert before <= arrival <= time.time_ns()
    assert observed == START


GZIP = {"content-encoding": "gzip"}
BODIES = [
    (b"\xff\xff garbage", {}, 400),
    (b"\x0a\x05\x12\x03\x12\x0a", {}, 400),
    (b"not gzip", GZIP, 400),
    (gzip.compress(b"x" * 1000)[:-9], GZIP, 400),
    (b"", GZIP, 400),
    (b"{}", {"content-type": "application/json"}, 415),
    (b"", {"content-type": "text/plain"}, 415),
    (b"", {"content-encoding": "zstd"}, 415),
    (b"", {}, 200),
]


def test_bodies_that_are_not_otlp_are_refused_for_good(collector: CollectorProcess) -> None:
    client = collector.start()

    for body, headers, status in BODIES:
        assert (body, client.post(body, headers=headers).status) == (body, status)
    assert client.post(request([Line("still here")])).status == 200
    assert collector.rows() == ["still here"]


def test_gzip_in_several_members_is_one_body(collector: CollectorProcess) -> None:
    client = collector.start()
    first, second = (request([Line(word)]).SerializeToString() for word in ("one", "two"))

    answer = client.post(gzip.compress(first) + gzip.compress(second), headers={"content-encoding": "gzip"})

    assert answer.status == 200
    assert collector.rows() == ["one", "two"]


def test_a_bomb_and_an_oversized_body_are_told_to_come_in_parts_and_cost_no_memory(collector: CollectorProcess) -> None:
    client = collector.start(body_bytes=8 << 20)
    bomb = gzip.compress(b"\0" * (256 << 20), 1)
    assert len(bomb) < 2 << 20

    for body, headers in ((bomb, GZIP), (b"\0" * (9 << 20), {}), (random.randbytes(9 << 20), GZIP)):
        try:
            answer = client.post(body, headers=headers)
        except (BrokenPipeError, ConnectionResetError):
            continue  # refused before all of it was sent
        assert answer.status == 413

    peak_kb = int(Path(f"/proc/{collector.pid}/status").read_text().split("VmHWM:")[1].split()[0])
    assert peak_kb < 150_000
    assert client.post(request([Line()])).status == 200


def test_a_connection_that_sends_no_head_is_cut(collector: CollectorProcess) -> None:
    client = collector.start(head_s=0.5)
    host, port = client.host.split(":")
    slow = [socket.create_connection((host, int(port))) for _ in range(20)]
    try:
        for connection in slow:
            connection.sendall(b"POST /v1/logs HTTP/1.1\r\nHost: x\r\nX-A: ")
        assert client.post(request([Line()])).status == 200
        for connection in slow:
            connection.settimeout(20)
            assert connection.recv(1) == b""
    finally:
        for connection in slow:
            connection.close()


def test_many_senders_at_once(collector: CollectorProcess) -> None:
    client = collector.start()
    answers: list[int] = []

    def send(number: int) -> None:
        own = collector.client(f"http://{client.host}")
        for step in range(5):
            source = f"{number:032x}/out/0"
            lines = [Line(f"{number} {step} {n}", (step * 50 + n, step * 50 + n + 1), source) for n in range(50)]
            answers.append(own.post(request(lines, {"skyrl.rank": number})).status)

    threads = [threading.Thread(target=send, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert answers == [200] * 80
    assert sorted(collector.rows()) == sorted(f"{n} {s} {i}" for n in range(16) for s in range(5) for i in range(50))


def test_the_last_status_of_each_agent_is_kept_and_aged_over_restarts(collector: CollectorProcess) -> None:
    client = collector.start()
    assert client.agents() == []

    assert client.status({"agent": "a1", "node": "n1", "drained": False}).status == 204
    assert client.status({"agent": "a2", "node": "n2", "drained": True}).status == 204
    assert client.status({"agent": "a1", "node": "n1", "drained": True, "note": ["ü"]}).status == 204
    for bad in (b"", b"[]", b"{}", b'{"agent": 7}', b"\xff", b"[" * 100_000):
        assert client.send("POST", "/v1/status", bad).status in (400, 413)

    first, second = client.agents()
    assert (first["agent"], second["agent"]) == ("a2", "a1")
    assert second.items() >= {"node": "n1", "drained": True, "note": ["ü"]}.items()
    assert 0 <= second["age_s"] < 5

    assert client.post(request([Line()])).status == 200  # statuses are stored with the next transaction
    collector.kill()
    assert {report["agent"] for report in collector.start().agents()} == {"a1", "a2"}


def test_control_only_takes_statuses_and_nothing_else(collector: CollectorProcess) -> None:
    client = collector.start("--control-only")

    assert client.post(request([Line()])).status == 404
    assert client.status({"agent": "a1"}).status == 204
    assert len(client.agents()) == 1
    assert collector.stop()[0] == 0
    assert not collector.store.exists()
    assert not collector.log_dir.exists()
    ready = collector.ready()
    assert ready is not None and (ready["infra"], ready["progress"]) == (None, None)


def test_resources_are_told_apart_and_joined(collector: CollectorProcess) -> None:
    client = collector.start()
    one = request([Line("a")], {"service.name": "policy", "skyrl.rank": 0})
    same = request([Line("b")], {"skyrl.rank": 0, "service.name": "policy"})
    other = request([Line("c", time=START + SECOND)], {"service.name": "policy", "skyrl.rank": 1}, scope="trl")

    assert client.post(joined(one, same, other)).status == 200

    assert collector.rows("resource") == [1, 1, 2]
    assert collector.rows("scope") == [1, 1, 2]


def head_of_a_request(token: str) -> bytes:
    head = ["POST /v1/logs HTTP/1.1", "Host: x", "Content-Type: application/x-protobuf", "Content-Length: 99"]
    return "\r\n".join([*head, f"Authorization: Bearer {token}", "", ""]).encode()


def test_a_body_that_comes_too_slowly_is_cut(collector: CollectorProcess) -> None:
    client = collector.start(body_s=0.3)
    host, port = client.host.split(":")
    head = head_of_a_request(client.token)
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(head + b"\x0a")

        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 408 ")


def test_more_requests_than_slots_are_asked_to_come_again(collector: CollectorProcess) -> None:
    client = collector.start(requests=2, wait_s=0.1)
    host, port = client.host.split(":")
    head = head_of_a_request(client.token)
    holders = [socket.create_connection((host, int(port)), timeout=20) for _ in range(2)]
    try:
        for holder in holders:
            holder.sendall(head)
        wait_until(lambda: client.post(request([Line("late")])).status == 429, "a busy answer")
        answer = client.post(request([Line("late")]))
        assert (answer.status, answer.headers["retry-after"]) == (429, "1")
    finally:
        for holder in holders:
            holder.close()
    wait_until(lambda: client.post(request([Line("done")])).status == 200, "free slots")
    assert "done" in collector.rows()
