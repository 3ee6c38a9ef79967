"""OTLP/HTTP: one request in flight, on a kept connection, in a thread of its own.

Rules of answer: OpenTelemetry Protocol specification, "OTLP/HTTP Response". Nothing here decides what becomes of a batch;
it only says what the receiver said.
"""

from __future__ import annotations

import email.utils
import gzip
import http.client
import os
import random
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol
from urllib.parse import urlsplit

from skyrl_otel.spool.token import Shipping

Verdict = Literal["accepted", "retry", "unanswered", "refused", "unauthorized", "too_large"]

LOW_WATER_HEADER = "skyrl-otel-low-water"

_TOO_LARGE = "request body too large"  # what net/http's MaxBytesReader says; otelcol sends it with a 400
_TLS_PORT = "client sent an http request to an https server"  # net/http, with a 400 too

_TLS_SAID = "{} is a TLS port; write https://"

CONNECTION_S = 300.0
"""A connection is not kept longer: collectors that were added or moved since are found by asking the resolver again."""

_FIRST_BACKOFF_S, _LAST_BACKOFF_S, _LAST_UNANSWERED_S, _UNAUTHORIZED_S = 0.2, 15.0, 300.0, 5.0


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of one request. `rejected` counts records that an accepted request left out (partial success);
    `wait_s` is how long to wait before the next attempt; `reason` is one line for people."""

    verdict: Verdict
    reason: str = ""
    rejected: int = 0
    wait_s: float = 0.0


class Connection(Protocol):
    """One way to send: OTLP over HTTP (`Client`) or over gRPC (agent/grpc.py)."""

    def post(self, body: bytes, low_water: str = "") -> Answer:
        """One attempt; never raises."""

    def close(self) -> None: ...


class Sender:
    """Sends one body at a time. `wake_fd` becomes readable when an answer is there.

    The lock protects nothing but the hand-over of job and answer; the connection belongs to the thread alone.
    """

    def __init__(self, shipping: Shipping, connect: Callable[[Shipping], Connection]) -> None:
        self.shipping = shipping
        self._connect = connect
        self.wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._ready = threading.Condition()
        self._job: tuple[bytes, str] | None = None
        self._answer: Answer | None = None
        self._failures = 0
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="sender", daemon=True)
        self._thread.start()

    def submit(self, body: bytes, low_water: str) -> None:
        with self._ready:
            self._job = (body, low_water)
            self._ready.notify()

    def take_answer(self) -> Answer | None:
        """The answer to the last submit, once."""
        with self._ready:
            answer, self._answer = self._answer, None
        if answer is not None:
            os.eventfd_read(self.wake_fd)
        return answer

    def close(self) -> None:
        """Take nothing more; a request under way ends by itself."""
        with self._ready:
            self._closed = True
            self._ready.notify()

    def _run(self) -> None:
        client: Connection | None = None
        while True:
            with self._ready:
                while self._job is None and not self._closed:
                    self._ready.wait()
                if self._job is None:
                    if client is not None:
                        client.close()
                    os.close(self.wake_fd)  # nobody else reads it by now: `close` was called
                    return
                (body, low_water), self._job = self._job, None
            try:
                client = client or self._connect(self.shipping)
                answer = client.post(body, low_water)
            except Exception as error:  # a URL or header that no library takes: an answer, or nobody ever gets one
                answer = Answer("unauthorized", f"{self.shipping.endpoint}: {error}; check OTEL_EXPORTER_OTLP_ENDPOINT")
            if answer.verdict in ("retry", "unanswered", "unauthorized"):
                self._failures += 1
                answer = Answer(answer.verdict, answer.reason, 0, answer.wait_s or self._backoff(answer.verdict))
            else:
                self._failures = 0
            with self._ready:  # both or neither: `take_answer` reads the eventfd of an answer it found
                self._answer = answer
                os.eventfd_write(self.wake_fd, 1)

    def _backoff(self, verdict: Verdict) -> float:
        if verdict == "unauthorized":
            return _UNAUTHORIZED_S
        # A receiver that takes requests and never answers (a full queue behind it) may keep what it is sent, each time anew.
        longest = _LAST_UNANSWERED_S if verdict == "unanswered" else _LAST_BACKOFF_S
        # Full jitter: a thousand agents must not return to a restarted collector at the same moment.
        ceiling = min(longest, _FIRST_BACKOFF_S * (1 << min(self._failures, 12)))
        return ceiling * (0.5 + random.random() / 2)


class Client:
    """A connection to the receiver that is opened when needed; each new one asks the resolver again."""

    def __init__(self, shipping: Shipping) -> None:
        self._shipping = shipping
        url = urlsplit(shipping.endpoint)
        self._url = url
        self._path = (url.path or "/") + (f"?{url.query}" if url.query else "")
        self._connection: http.client.HTTPConnection | None = None
        self._opened_at = 0.0

    def post(self, body: bytes, low_water: str = "") -> Answer:
        """One attempt; never raises."""
        headers = {
            "content-type": "application/x-protobuf",
            "user-agent": "skyrl-otel",
            **self._shipping.headers,
        }
        if low_water:
            headers[LOW_WATER_HEADER] = low_water
        if self._shipping.compression == "gzip":
            body = gzip.compress(body, 1, mtime=0)
            headers["content-encoding"] = "gzip"
        if time.monotonic() - self._opened_at > CONNECTION_S:
            self.close()
        fresh = self._connection is None
        try:
            return self._attempt(body, headers)
        except (OSError, http.client.HTTPException, ValueError) as error:
            was_connected = self._connection is not None and self._connection.sock is not None
            self.close()
            if not fresh and isinstance(error, (ConnectionError, http.client.BadStatusLine)):
                # The receiver closed an idle kept connection: no failure, try a new one at once.
                return self.post(body if "content-encoding" not in headers else gzip.decompress(body), low_water)
            if isinstance(error, (ConnectionResetError, http.client.BadStatusLine)) and self._is_tls_port():
                return Answer("unauthorized", _TLS_SAID.format(self._shipping.endpoint))
            verdict: Verdict = "unanswered" if was_connected and isinstance(error, TimeoutError) else "retry"
            return Answer(verdict, f"{self._shipping.endpoint}: {_explain(error)}")

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _is_tls_port(self) -> bool:
        """Whether a plain request was cut off because the port speaks TLS: its answer, if it gave one, is lost in the reset."""
        if self._url.scheme == "https":
            return False
        try:
            import ssl

            context = ssl.create_default_context()
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            address = (self._url.hostname or "", self._url.port or 80)
            with socket.create_connection(address, self._shipping.timeout_s) as plain, context.wrap_socket(plain):
                return True
        except (ImportError, OSError, ValueError):
            return False

    def _attempt(self, body: bytes, headers: dict[str, str]) -> Answer:
        connection = self._connection or self._connect()
        try:
            connection.request("POST", self._path, body, headers)
        except (BrokenPipeError, ConnectionResetError):
            # A receiver that refuses a body (413, 401) may close before it has read all of it. Its answer is there to be
            # read; where it is not, getresponse() raises.
            pass
        response = connection.getresponse()
        content = response.read(1 << 20)
        if response.will_close:
            self.close()
        return judge(response.status, response.getheader("retry-after"), content, self._shipping.endpoint)

    def _connect(self) -> http.client.HTTPConnection:
        self._opened_at = time.monotonic()
        host, port, timeout = self._url.hostname or "", self._url.port, self._shipping.timeout_s
        if self._url.scheme == "https":
            import ssl  # only here: an interpreter without it still sends over http

            context = ssl.create_default_context(cafile=self._shipping.certificate or None)
            if self._shipping.client_certificate:
                context.load_cert_chain(self._shipping.client_certificate, self._shipping.client_key or None)
            self._connection = http.client.HTTPSConnection(host, port, timeout=timeout, context=context)
        else:
            self._connection = http.client.HTTPConnection(host, port, timeout=timeout)
        self._connection.connect()
        self._connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return self._connection


def judge(status: int, retry_after: str | None, content: bytes, endpoint: str) -> Answer:
    """What an HTTP answer means for the batch."""
    if 200 <= status < 300:
        rejected, message = partial_success(content)
        return Answer("accepted", f"{endpoint} rejected {rejected} records: {message}" if rejected else "", rejected)
    said = f"{endpoint} answered {status} {http.client.responses.get(status, '')}".rstrip()
    detail = _detail(content)
    if detail.isprintable() and detail:
        said = f"{said}: {detail}"
    if status in (401, 403):
        return Answer("unauthorized", f"{said}; check OTEL_EXPORTER_OTLP_HEADERS")
    if status == 404:
        return Answer("unauthorized", f"{said}; is this an OTLP/HTTP port (4318) and the path right?")
    if status == 400 and _TLS_PORT in detail.lower():
        return Answer("unauthorized", _TLS_SAID.format(endpoint))
    if status == 413 or (status == 400 and _TOO_LARGE in detail.lower()):
        return Answer("too_large", said)
    if status in (408, 429) or status >= 500:
        return Answer("retry", said, 0, _retry_after_s(retry_after))
    if 300 <= status < 400:
        return Answer("unauthorized", f"{said}: redirects are not followed, set the final URL")
    return Answer("refused", said)


def _detail(content: bytes) -> str:
    """What a refusal says: the message of a google.rpc.Status, as OTLP receivers answer, or plain text."""
    try:
        fields = dict(read_fields(content))
        message = fields.get(2)
        if set(fields) <= {1, 2, 3} and isinstance(message, bytes):
            content = message
    except (IndexError, ValueError):
        pass
    return " ".join(content[:300].decode("utf-8", "replace").split())  # one line, whatever it is


def _retry_after_s(text: str | None) -> float:
    if not text:
        return 0.0
    if text.strip().isdigit():
        return min(float(text), 300.0)
    try:
        return min(max(email.utils.parsedate_to_datetime(text).timestamp() - time.time(), 0.0), 300.0)
    except (TypeError, ValueError):
        return 0.0


def partial_success(content: bytes) -> tuple[int, str]:
    """(rejected_log_records, error_message) of an ExportLogsServiceResponse; (0, "") for anything else."""
    try:
        for number, value in read_fields(content):
            if number == 1 and isinstance(value, bytes):
                inner = dict(read_fields(value))
                rejected, message = inner.get(1, 0), inner.get(2, b"")
                if isinstance(rejected, int) and isinstance(message, bytes):
                    return rejected, message.decode("utf-8", "replace")
    except (IndexError, ValueError):
        pass
    return 0, ""


def read_fields(data: bytes) -> list[tuple[int, int | bytes]]:
    """(number, value) of each field of a message whose fields are varints or length-delimited.

    Raises:
        IndexError, ValueError: it is cut or has other fields.
    """
    found: list[tuple[int, int | bytes]] = []
    position = 0
    while position < len(data):
        tag, position = _varint(data, position)
        value: int | bytes
        value, position = _varint(data, position)
        if tag & 7 == 2:
            length = value
            value, position = data[position : position + length], position + length
        elif tag & 7 != 0:
            raise ValueError("unexpected wire type")
        found.append((tag >> 3, value))
    return found


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
        if shift > 63:
            raise ValueError("varint too long")


def _explain(error: Exception) -> str:
    ssl = sys.modules.get("ssl")  # not imported: then it is no error of TLS
    if ssl is not None and isinstance(error, ssl.SSLCertVerificationError):
        return f"certificate refused: {error.verify_message}; set OTEL_EXPORTER_OTLP_CERTIFICATE to its CA"
    if ssl is not None and isinstance(error, ssl.SSLError):
        return f"TLS failed ({error.reason or error}); is this a plain http port?"
    if isinstance(error, http.client.BadStatusLine | http.client.RemoteDisconnected):
        return "the other side does not answer in HTTP; is this a gRPC or TLS port?"
    if isinstance(error, socket.gaierror):
        return f"unknown host: {error.strerror}"
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
