"""What receivers say, as they say it, is explained."""

from __future__ import annotations

import pytest

from skyrl_otel.query.explain import advice, explain
from skyrl_otel.query.loki_health import refusals


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (
            "http://c:4318/v1/logs answered 401 Unauthorized: missing or empty authorization header",
            "OTEL_EXPORTER_OTLP_HEADERS",
        ),
        ("h:4317 answered UNAUTHENTICATED: provided authorization does not match", "OTEL_EXPORTER_OTLP_HEADERS"),
        ("http://c:4318/v1/logs answered 413 Request Entity Too Large", "max_request_body_size"),
        ("http://c:4318/v1/logs answered 400 Bad Request: http: request body too large", "max_request_body_size"),
        (
            "http://l/otlp answered 429 Too Many Requests: ingestion rate limit exceeded for user fake",
            "ingestion_rate_mb",
        ),
        ("answered 429: Per stream rate limit exceeded (limit: 3MB/sec)", "per_stream_rate_limit"),
        (
            "answered 429: Maximum active stream limit exceeded when trying to create stream",
            "max_global_streams_per_user",
        ),
        ("answered 429 Too Many Requests", "agents wait"),
        ("answered 400: entry too far behind, entry timestamp is: 2026-11-22", "max_chunk_age"),
        ("answered 400: entry for stream '{a=\"b\"}' has timestamp too old: 2026", "reject_old_samples"),
        ("answered 400: Max entry size '262144' bytes exceeded for stream", "max_line_size"),
        ("answered 401 Unauthorized: no org id", "X-Scope-OrgID"),
        ("answered 503 Service Unavailable: data refused due to high memory usage", "memory_limiter"),
        ("answered 503 Service Unavailable: sending queue is full", "behind the collector"),
    ],
)
def test_a_refusal_is_explained(said: str, words: str) -> None:
    assert words in (explain(said) or "")
    assert words in advice(said)


def test_what_nobody_knows_is_not_explained() -> None:
    assert explain("teapot") is None
    assert advice("teapot") == ""


def test_lokis_own_count_of_refusals_is_read() -> None:
    metrics = """# TYPE loki_discarded_samples_total counter
loki_discarded_samples_total{policy="",reason="too_far_behind",retention_hours="720",tenant="fake"} 12
loki_discarded_samples_total{policy="",reason="too_far_behind",retention_hours="720",tenant="other"} 3
loki_discarded_samples_total{policy="",reason="rate_limited",retention_hours="720",tenant="fake"} 0
loki_discarded_bytes_total{policy="",reason="rate_limited",retention_hours="720",tenant="fake"} 9
"""
    assert refusals(metrics) == {"too_far_behind": 15}
    assert explain("too_far_behind")
