"""What is sent to Loki, and what becomes of its refusals; what it answers is tested on a real one (tests/stack)."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator

import pytest

from skyrl_otel.query.filters import Filter
from skyrl_otel.query.loki import Loki, LokiError, LokiSource
from skyrl_otel.query.loki_health import check_loki
from skyrl_otel.query.loki_records import record_of
from skyrl_otel.query.runs import UnknownRun


class Answers:
    """An HTTP server that says what it is told to, and keeps what it was asked."""

    def __init__(self) -> None:
        self.status, self.content = 200, b'{"data": []}'
        self.asked: list[tuple[str, dict[str, str]]] = []
        answers = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                answers.asked.append((self.path, {key.lower(): value for key, value in self.headers.items()}))
                self.send_response(answers.status)
                self.send_header("content-length", str(len(answers.content)))
                self.end_headers()
                self.wfile.write(answers.content)

            def log_message(self, *_: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def answers() -> Iterator[Answers]:
    made = Answers()
    yield made
    made.close()


def test_tenant_and_headers_go_with_every_request(answers: Answers) -> None:
    assert Loki(answers.url + "/", {"authorization": "Bearer t"}, "team-a").runs() == []
    path, headers = answers.asked[0]
    assert path.startswith("/loki/api/v1/label/skyrl_run_id/values?")
    assert headers["x-scope-orgid"] == "team-a"
    assert headers["authorization"] == "Bearer t"


@pytest.mark.parametrize(
    ("status", "content", "words"),
    [
        (401, b"no org id\n", "--loki-tenant"),
        (401, b"", "the token is wrong or missing"),
        (429, b"too many outstanding requests", "agents wait"),
        (200, b"<html>a proxy</html>", "is this its address?"),
    ],
)
def test_a_refusal_is_said_in_one_line_with_what_to_do(
    answers: Answers, status: int, content: bytes, words: str
) -> None:
    answers.status, answers.content = status, content
    with pytest.raises(LokiError, match=words) as caught:
        Loki(answers.url).runs()
    assert "\n" not in str(caught.value)
    (finding,) = check_loki(Loki(answers.url))
    assert finding.level == "wrong" and words in finding.text


def test_a_run_that_is_not_there_names_those_that_are(answers: Answers) -> None:
    answers.content = json.dumps({"data": ["night-1", "night-2"]}).encode()
    assert Loki(answers.url).choose_run("night-2") == "night-2"
    with pytest.raises(UnknownRun, match="night-1, night-2"):
        Loki(answers.url).choose_run("day")


def test_a_line_that_came_twice_is_read_once(answers: Answers) -> None:
    """Until Loki has flushed the chunk it may show both."""
    metadata = {"log_record_uid": "w/out/0/0-6", "service_instance_id": "w"}
    entries = [["5", "line", {"structuredMetadata": metadata}]] * 2 + [["6", "other", {}]]
    answers.content = json.dumps({"data": {"result": [{"stream": {"skyrl_run_id": "r"}, "values": entries}]}}).encode()
    assert [record.body for record in LokiSource(Loki(answers.url), "r").read(Filter())] == ["line", "other"]


def test_names_and_types_come_back() -> None:
    metadata = {
        "process_pid": "7",
        "skyrl_rank": "3",
        "log_record_uid": "w/out/1/5-9",
        "log_iostream": "stderr",
        "severity_number": "17",
        "severity_text": "ERROR",
        "observed_timestamp": "11",
        "skyrl_part_last": "true",
        "detected_level": "error",
        "my_own": "1",
    }
    record = record_of({"skyrl_run_id": "r", "service_name": "policy"}, 10, "body", metadata)
    assert record.resource.rank == 3 and record.resource.pid == 7
    assert record.attributes == {
        "log.iostream": "stderr",
        "log.record.uid": "w/out/1/5-9",
        "my_own": "1",
        "skyrl.part.last": True,
    }
    assert (record.severity_number, record.observed_time_unix_nano, record.order) == (17, 11, (10, "w", "out", 1, 5))
