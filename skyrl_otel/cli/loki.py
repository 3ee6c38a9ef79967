"""Which Loki a command reads: its options, else the environment."""

from __future__ import annotations

from typing import TYPE_CHECKING

from skyrl_otel.cli.ending import fail

if TYPE_CHECKING:
    from skyrl_otel.query.loki import Loki


def connect(url: str, tenant: str) -> Loki | None:
    """None where neither the option nor SKYRL_OTEL_LOKI names one. Ends the command at a setting that cannot be used."""
    from skyrl_otel.config import Config, ConfigError
    from skyrl_otel.query.loki import Loki

    try:
        config = Config.from_env({"SKYRL_OTEL_LOKI": url}, strict=True) if url else Config.from_env()
    except ConfigError as error:
        fail(str(error).replace("SKYRL_OTEL_LOKI=", "--loki "))
    if not config.loki:
        return None
    known = Config.from_env()
    return Loki(config.loki, known.loki_headers, tenant or known.loki_tenant)
