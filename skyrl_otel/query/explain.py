"""What a receiver's refusal means and what to do: a table, for `doctor` and for readers of Loki.

Texts are those of otelcol 0.161 and Loki 3.7 (pkg/validation/validate.go, pkg/distributor/http.go).
"""

from __future__ import annotations

import re

_ADVICE: tuple[tuple[str, str], ...] = (
    (
        r"entry too far behind|too_far_behind",
        (
            "these lines lie further behind the newest of their stream than half of Loki's ingester.max_chunk_age;"
            " raise it (deploy/collector/loki.yaml has 50h) and replay again; a Loki of several processes needs"
            " querier.query_ingesters_within above it too"
        ),
    ),
    (
        r"entry for stream .* has timestamp too old|greater_than_max_sample_age",
        "Loki refuses old lines; set limits_config.reject_old_samples: false and replay again",
    ),
    (
        r"has timestamp too new|too_far_in_future",
        "the clock of that node is ahead, or limits_config.creation_grace_period is too short",
    ),
    (
        r"per stream rate limit|per_stream_rate_limit",
        "raise limits_config.per_stream_rate_limit; what was refused comes again",
    ),
    (
        r"ingestion rate limit exceeded|rate_limited",
        "raise limits_config.ingestion_rate_mb and ingestion_burst_size_mb (metadata counts); what was refused comes again",
    ),
    (
        r"maximum active stream limit|stream_limit",
        "raise limits_config.max_global_streams_per_user, or make fewer attributes labels (otlp_config.ignore_defaults)",
    ),
    (r"max entry size|line_too_long", "raise limits_config.max_line_size to 512KB"),
    (
        r"structured metadata (?:too large|size|count)|structured_metadata_too",
        "fewer OTEL_RESOURCE_ATTRIBUTES, or raise limits_config.max_structured_metadata_size",
    ),
    (
        r"structured metadata.*(?:not allowed|disallowed)|disallowed_structured_metadata",
        "set limits_config.allow_structured_metadata: true, which needs schema v13",
    ),
    (r"no org id", "this Loki has tenants: name one (--loki-tenant, or the header X-Scope-OrgID)"),
    (
        r"https server|is a TLS port",
        "that port speaks TLS: write https://",
    ),
    (
        r"\b401\b|\bUNAUTHENTICATED\b",
        "the token is wrong or missing: OTEL_EXPORTER_OTLP_HEADERS=authorization=Bearer%20<token>",
    ),
    (r"\b403\b|\bPERMISSION_DENIED\b", "the token is known but may not write there"),
    (
        r"\b413\b|request body too large|larger than max",
        "requests are made smaller by themselves; the receiver's limit is below ours of 1 MB (max_request_body_size)",
    ),
    (
        r"high memory usage|data refused",
        "the collector's memory_limiter refuses: give it more memory (limit_mib), or another collector beside it",
    ),
    (r"sending queue is full", "what stands behind the collector is slow or gone; agents wait and come again"),
    (
        r"\b429\b|RESOURCE_EXHAUSTED",
        "the receiver is asked for more than it allows; agents wait as it says and come again",
    ),
    (r"\b503\b|\bUNAVAILABLE\b", "the receiver is not ready or is overloaded; agents wait and come again"),
    (
        r"no answer in time|DEADLINE_EXCEEDED",
        (
            "the receiver took the request and did not answer: what stands behind it (Loki) is slow or gone and its queue"
            " is full (sending_queue.queue_size); agents wait longer each time and come again"
        ),
    ),
    (r"certificate (?:has )?expired", "renew the receiver's certificate; agents try again by themselves"),
    (
        r"Connection refused",
        "nothing listens there: is it running, and is the port right (4318 HTTP, 4317 gRPC, 3100 Loki)?",
    ),
)
_COMPILED = [(re.compile(pattern, re.IGNORECASE | re.DOTALL), text) for pattern, text in _ADVICE]


def explain(said: str) -> str | None:
    """What to do about what a receiver said; None where nothing is known."""
    return next((text for pattern, text in _COMPILED if pattern.search(said)), None)


def advice(said: str) -> str:
    """The same to be put behind it; "" where nothing is known."""
    text = explain(said)
    return f"; {text}" if text else ""
