"""Whatever a real collector answers: one clear line on the agent's side, waiting, and recovery by itself, nothing lost."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from skyrl_otel.agent.connect import connect
from skyrl_otel.spool import token
from skyrl_otel.spool.token import Shipping
from tests.agent.conftest import Node
from tests.stack.processes import TOKEN, Otelcol, wait_for

pytestmark = [pytest.mark.collector, pytest.mark.timeout(240)]

GOOD = {"authorization": f"Bearer {TOKEN}"}
PROTOCOLS = ["http/protobuf", "grpc"]


class Bench:
    """One agent, one writer, one collector without Loki."""

    def __init__(self, root: Path, otelcol: Otelcol, protocol: str = "http/protobuf") -> None:
        self.otelcol = otelcol
        self.protocol = protocol
        self.node = Node(root)
        self.written = 0
        self.ca = ""
        self.writer = self.node.writer(role="policy", rank=0)

    def write(self, count: int = 100, width: int = 20) -> None:
        first, self.written = self.written, self.written + count
        data = b"".join(b"refusal-line %d %b\n" % (n, b"x" * width) for n in range(first, self.written))
        os.write(self.writer.fds["out"], data)

    def ship(self, headers: dict[str, str] = GOOD, url: str = "") -> None:
        base = url or (self.otelcol.url if self.protocol == "http/protobuf" else self.otelcol.grpc_url)
        path = "/v1/logs" if self.protocol == "http/protobuf" else ""
        shipping = Shipping(base + path, headers, self.protocol, compression="gzip", timeout_s=5.0, certificate=self.ca)
        token.write(self.node.run, shipping)

    def complaint(self, *words: str, timeout_s: float = 20.0) -> str:
        """The agent's one line that says all of `words`."""
        wait_for(lambda: all(word in str(self.node.status().get("error")) for word in words), f"{words}", timeout_s)
        error = str(self.node.status()["error"])
        retries = self.node.status()["retries"]
        wait_for(lambda: self.node.status()["retries"] >= retries + 2, "it tries again", 40)
        said = [line for line in (self.node.run.path / "agent.log").read_text().splitlines() if words[0] in line]
        assert len(said) == 1, said
        assert "\n" not in error and TOKEN not in said[0]
        print(f"{self.protocol}: {said[0][20:]}")
        return error

    def arrived(self) -> list[int]:
        bodies = [record["body"] for record in self.otelcol.recorded()]
        return sorted(int(body.split()[1]) for body in bodies if body.startswith("refusal-line"))

    def expect_all(self) -> None:
        """Everything once; only then is the agent content."""
        wait_for(lambda: len(self.arrived()) >= self.written, "all lines arrive", 60)
        assert self.arrived() == list(range(self.written))
        wait_for(lambda: self.node.status()["error"] is None, "no complaint is left")
        status = self.node.status()
        assert status["rejected_records"] == status["lost_bytes"] == 0

    def close(self) -> None:
        self.node.close()
        self.otelcol.kill()


@pytest.fixture(params=PROTOCOLS)
def bench(request: pytest.FixtureRequest, spool_root: Path) -> Iterator[Bench]:
    made = Bench(spool_root, Otelcol(spool_root / "otelcol", None), request.param)
    yield made
    made.close()


@pytest.mark.parametrize("headers", [{"authorization": "Bearer wrong"}, {}], ids=["wrong token", "no token"])
def test_token(bench: Bench, headers: dict[str, str]) -> None:
    bench.otelcol.start()
    bench.ship(headers)
    bench.write()
    bench.node.start()
    bench.complaint(
        "answered 401" if bench.protocol != "grpc" else "answered UNAUTHENTICATED", "OTEL_EXPORTER_OTLP_HEADERS"
    )
    bench.write()
    bench.ship()
    bench.expect_all()


def test_collector_is_not_there_yet(bench: Bench) -> None:
    bench.ship()
    bench.write()
    bench.node.start()
    bench.complaint("onnection refused")
    bench.otelcol.start()
    bench.expect_all()


def test_plain_to_a_tls_port_and_back(bench: Bench) -> None:
    _certificate(bench.otelcol.folder, days=1)
    bench.otelcol.start(**_tls(bench.otelcol.folder))
    bench.ship()
    bench.write()
    bench.node.start()
    bench.complaint("is a TLS port" if bench.protocol != "grpc" else "is this a TLS or an HTTP port?")
    bench.ca = str(bench.otelcol.folder / "tls.crt")
    port = bench.otelcol.http if bench.protocol != "grpc" else bench.otelcol.grpc
    bench.ship(url=f"https://127.0.0.1:{port}")
    bench.expect_all()


def test_expired_certificate(bench: Bench) -> None:
    folder = bench.otelcol.folder
    _certificate(folder, days=-1)
    bench.otelcol.start(**_tls(folder))
    bench.ca = str(folder / "tls.crt")
    port = bench.otelcol.http if bench.protocol != "grpc" else bench.otelcol.grpc
    bench.ship(url=f"https://127.0.0.1:{port}")
    bench.write()
    bench.node.start()
    bench.complaint("certificate has expired" if bench.protocol != "grpc" else "CERTIFICATE_VERIFY_FAILED")
    bench.otelcol.kill()
    _certificate(folder, days=1)
    bench.otelcol.start(**_tls(folder))
    bench.expect_all()


def test_requests_larger_than_the_collector_takes(bench: Bench) -> None:
    """Split until they fit; a single record always does."""
    bench.otelcol.start(OTELCOL_MAX_BODY="150000", OTELCOL_MAX_GRPC_MIB="1")
    bench.write(20_000, width=150)
    bench.ship()
    bench.node.start()
    bench.expect_all()


def test_whatever_the_channel_says_there_is_a_route(bench: Bench) -> None:
    """No channel, a number, another spelling: infra. Nothing is in neither file, nothing in both."""
    from tests.collector_process import Line, request

    bench.otelcol.start()
    base = bench.otelcol.url + "/v1/logs" if bench.protocol != "grpc" else bench.otelcol.grpc_url
    connection = connect(Shipping(base, GOOD, bench.protocol, timeout_s=20.0))
    channels: dict[str, object] = {"none": None, "number": 7, "other": "Progress", "infra": "infra", "mine": "progress"}
    for name, channel in channels.items():
        resource = {"service.name": "x"} | ({} if channel is None else {"skyrl.channel": channel})
        made = request([Line(f"routed {name}", (0, 1))], resource)
        assert connection.post(made.SerializeToString()).verdict == "accepted"
    connection.close()
    expected = ["routed infra", "routed none", "routed number", "routed other"]
    wait_for(lambda: sorted(record["body"] for record in bench.otelcol.recorded()) == expected, "infra's file")
    wait_for(lambda: bench.otelcol.stdout.read_text().split("\n") == ["routed mine", ""], "stdout")


def test_twenty_megabytes_at_once(bench: Bench) -> None:
    """Ours never send that; what the real limits answer is known to be too large, and nothing else."""
    bench.otelcol.start()
    base = bench.otelcol.url + "/v1/logs" if bench.protocol != "grpc" else bench.otelcol.grpc_url
    connection = connect(Shipping(base, GOOD, bench.protocol, timeout_s=20.0))
    answer = connection.post(b"\x0a\x04\x12\x02\x12\x00" * 3_500_000)
    connection.close()
    print(f"{bench.protocol}: {answer.reason}")
    assert answer.verdict == "too_large"


def test_collector_out_of_memory(bench: Bench) -> None:
    """memory_limiter refuses everything; then the collector is given memory."""
    bench.otelcol.start(OTELCOL_MEMORY_MIB="3", OTELCOL_SPIKE_MIB="2")
    time.sleep(1.0)  # the limiter looks every half second
    bench.write()
    bench.ship()
    bench.node.start()
    bench.complaint("high memory usage")
    bench.otelcol.kill()
    bench.otelcol.start()
    bench.expect_all()


def _tls(folder: Path) -> dict[str, str]:
    return {
        "OTELCOL_TLS": "true",
        "OTELCOL_TLS_CERT": str(folder / "tls.crt"),
        "OTELCOL_TLS_KEY": str(folder / "tls.key"),
    }


def _certificate(folder: Path, days: int) -> None:
    """A certificate for 127.0.0.1 that ends in `days`, and signs itself; the key stays the same."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key_path = folder / "tls.key"
    if not key_path.exists():
        made = ec.generate_private_key(ec.SECP256R1())
        key_path.write_bytes(
            made.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
    key = serialization.load_pem_private_key(key_path.read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    import ipaddress

    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "collector")])
    now = datetime.now(timezone.utc)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=10))
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    (folder / "tls.crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
