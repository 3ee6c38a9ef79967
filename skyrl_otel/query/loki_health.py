"""Is Loki well: does it answer, has it runs of ours, what has it refused."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

from skyrl_otel.query.explain import explain
from skyrl_otel.query.health import Finding
from skyrl_otel.query.loki import Loki, LokiError

# loki_discarded_samples_total{policy="",reason="too_far_behind",retention_hours="744",…,tenant="fake"} 12
_DISCARDED = re.compile(r'loki_discarded_samples_total\{[^}]*reason="([^"]+)"[^}]*\} ([0-9.e+]+)')


def check_loki(loki: Loki) -> Iterator[Finding]:
    """What a reader can see; refusals are counted since Loki began, for all senders of all tenants."""
    try:
        runs = loki.runs()
    except LokiError as error:
        yield Finding("wrong", "loki", str(error))
        return
    newest = ", ".join(runs[-5:])
    yield Finding(
        "ok", "loki", f"{loki.url} holds {len(runs)} runs of the last 30 days{': ' + newest if newest else ''}"
    )
    try:
        metrics = loki.get("/metrics").decode("utf-8", "replace")
    except LokiError:
        yield Finding("note", "loki", "its /metrics cannot be read from here; what it refused is not known")
        return
    refused = refusals(metrics)
    for reason, count in refused.items():
        what = explain(reason) or 'see Loki\'s documentation, "discarded samples"'
        yield Finding("wrong", "loki", f"refused {count} lines since it began, {reason}: {what}")
    if not refused:
        yield Finding("ok", "loki", "has refused nothing since it began")


def refusals(metrics: str) -> Counter[str]:
    """Lines refused by reason, from Loki's own metrics."""
    found: Counter[str] = Counter()
    for reason, count in _DISCARDED.findall(metrics):
        if float(count):
            found[reason] += int(float(count))
    return found
