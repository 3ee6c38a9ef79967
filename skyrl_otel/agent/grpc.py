"""OTLP/gRPC, where grpcio can be imported beside the agent's Python; nothing of ours depends on it.

Rules of answer: OpenTelemetry Protocol specification, "OTLP/gRPC Response". Bodies are made already, so no generated
classes are needed: the method is called with bytes and answers with bytes.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from skyrl_otel.agent.ship import CONNECTION_S, LOW_WATER_HEADER, Answer, partial_success, read_fields
from skyrl_otel.spool.token import Shipping

_METHOD = "/opentelemetry.proto.collector.logs.v1.LogsService/Export"
_DETAILS = "grpc-status-details-bin"
_RETRY_INFO = b"google.rpc.RetryInfo"
_NOT_HERE_S = 30.0

_RETRYABLE = {"CANCELLED", "ABORTED", "OUT_OF_RANGE", "UNAVAILABLE", "DATA_LOSS"}
_MISCONFIGURED = {"UNAUTHENTICATED", "PERMISSION_DENIED", "UNIMPLEMENTED"}
_TOO_LARGE = ("larger than max", "message too large", "message size exceeds")


class GrpcClient:
    """A channel that is opened when needed and dropped after a failure, so that each try asks the resolver again."""

    def __init__(self, shipping: Shipping) -> None:
        self._shipping = shipping
        url = urlsplit(shipping.endpoint)
        self._secure = url.scheme == "https"
        self._target = url.netloc.rpartition("@")[2] if url.port else f"{url.hostname}:4317"
        self._grpc: Any = None
        self._channel: Any = None
        self._export: Any = None
        self._opened_at = 0.0

    def post(self, body: bytes, low_water: str = "") -> Answer:
        """One attempt; never raises."""
        try:
            self._grpc = self._grpc or import_grpc()
        except ImportError as error:
            return Answer(
                "unauthorized",
                f"OTEL_EXPORTER_OTLP_PROTOCOL=grpc needs grpcio beside {sys.executable} ({error}); "
                "install it, or write http/protobuf and use the receiver's port 4318",
                wait_s=_NOT_HERE_S,
            )
        grpc = self._grpc
        metadata = [(key.lower(), value) for key, value in self._shipping.headers.items()]
        if low_water:
            metadata.append((LOW_WATER_HEADER, low_water))
        compression = grpc.Compression.Gzip if self._shipping.compression == "gzip" else grpc.Compression.NoCompression
        try:
            if time.monotonic() - self._opened_at > CONNECTION_S:
                self.close()
            if self._export is None:
                self._open()
            answer = self._export(body, timeout=self._shipping.timeout_s, metadata=metadata, compression=compression)
        except grpc.RpcError as error:
            self.close()
            trailers = dict(error.trailing_metadata() or ())
            return judge(error.code().name, error.details() or "", trailers.get(_DETAILS, b""), self._target)
        except (OSError, ValueError) as error:  # a certificate that cannot be read, a target that is none
            self.close()
            return Answer("unauthorized", f"{self._target}: {error}")
        rejected, message = partial_success(answer)
        return Answer(
            "accepted", f"{self._target} rejected {rejected} records: {message}" if rejected else "", rejected
        )

    def close(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = self._export = None

    def _open(self) -> None:
        self._opened_at = time.monotonic()
        grpc, shipping = self._grpc, self._shipping
        # Our own backoff decides when the next try is; a channel of its own must not sit in gRPC's global pool.
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]
        if self._secure:
            credentials = grpc.ssl_channel_credentials(
                _read(shipping.certificate), _read(shipping.client_key), _read(shipping.client_certificate)
            )
            self._channel = grpc.secure_channel(self._target, credentials, options)
        else:
            self._channel = grpc.insecure_channel(self._target, options)
        self._export = self._channel.unary_unary(_METHOD)


def judge(code: str, details: str, status: bytes, target: str) -> Answer:
    """What a gRPC status means for the batch; `status` is an encoded google.rpc.Status with a RetryInfo, perhaps."""
    said = f"{target} answered {code}: {details}".rstrip(": ")
    wait_s = retry_delay_s(status)
    if code == "DEADLINE_EXCEEDED":  # of ours: there is no other
        return Answer("unanswered", f"{said}{_advice(details)}", 0, wait_s or 0.0)
    if code in _RETRYABLE:
        return Answer("retry", f"{said}{_advice(details)}", 0, wait_s or 0.0)
    if code == "RESOURCE_EXHAUSTED":
        if any(words in details.lower() for words in _TOO_LARGE):
            return Answer("too_large", said)
        # Without RetryInfo the specification lets us give up; a full receiver is no reason to lose lines.
        return Answer("retry", said, 0, wait_s or 0.0)
    if code in _MISCONFIGURED:
        advice = "is this an OTLP/gRPC port (4317)?" if code == "UNIMPLEMENTED" else "check OTEL_EXPORTER_OTLP_HEADERS"
        return Answer("unauthorized", f"{said}; {advice}")
    return Answer("refused", said)


def _advice(details: str) -> str:
    lowered = details.lower()
    if "certificate" in lowered:
        return "; set OTEL_EXPORTER_OTLP_CERTIFICATE to its CA"
    if "handshake" in lowered or "wrong_version_number" in lowered:
        return "; is this a plain port? write http://"
    if "socket closed" in lowered or "connection reset" in lowered or "http2" in lowered:
        return "; is this a TLS or an HTTP port?"
    return ""


def retry_delay_s(status: bytes) -> float | None:
    """The delay of the RetryInfo in a google.rpc.Status (`details` is field 3, an Any; google/rpc/error_details.proto)."""
    try:
        for number, detail in read_fields(status):
            if number != 3 or not isinstance(detail, bytes):
                continue
            any_fields = dict(read_fields(detail))
            kind, value = any_fields.get(1, b""), any_fields.get(2, b"")
            if isinstance(kind, bytes) and kind.endswith(_RETRY_INFO) and isinstance(value, bytes):
                delay = dict(read_fields(value)).get(1, b"")
                parts = dict(read_fields(delay)) if isinstance(delay, bytes) else {}
                seconds, nanos = parts.get(1, 0), parts.get(2, 0)
                if isinstance(seconds, int) and isinstance(nanos, int):
                    return min(seconds + nanos / 1e9, 300.0)
    except (IndexError, ValueError):
        pass
    return None


def import_grpc() -> Any:
    """grpcio from the site-packages of the agent's interpreter, which the agent itself runs without (-I -S).

    The folder is put behind everything else, and its .pth files are not run.

    Raises:
        ImportError: it is not there, or does not fit this interpreter.
    """
    folder = str(site_packages())
    if folder not in sys.path:
        sys.path.append(folder)
    # gRPC's fork handlers are for programs that fork while they call; its log lines would go to the agent's log.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    return importlib.import_module("grpc")


def site_packages() -> Path:
    """Of a virtual environment where the interpreter lies in one (PEP 405: pyvenv.cfg beside or above it), else of its prefix."""
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    executable = Path(sys.executable)
    for home in (executable.parent.parent, executable.parent):
        if (home / "pyvenv.cfg").is_file():
            return home / "lib" / version / "site-packages"
    return Path(sys.prefix) / "lib" / version / "site-packages"


def _read(path: str) -> bytes | None:
    return Path(path).read_bytes() if path else None
