"""Where the agent sends and with which secret: the 0600 file `token`, and the same JSON in Ray's KV."""

from __future__ import annotations

import json
from typing import NamedTuple

from skyrl_otel.config import Config
from skyrl_otel.spool.layout import RunDir, read_file, replace_file


class Control(NamedTuple):
    """The launcher's listener for status reports. Shows its secret to nobody who prints it, as `Shipping`."""

    url: str
    authorization: str

    def __repr__(self) -> str:
        return f"Control(url={self.url!r})"


class Shipping(NamedTuple):
    """All an agent needs to send. `endpoint` is the full URL of /v1/logs; `timeout_s` bounds one request; `redact` has the
    user's own rules, each [name, pattern, anchors]."""

    endpoint: str
    headers: dict[str, str]
    protocol: str = "http/protobuf"
    compression: str = "none"
    timeout_s: float = 10.0
    redact: tuple[list[object], ...] = ()
    certificate: str = ""
    client_key: str = ""
    client_certificate: str = ""
    control: Control | None = None

    def __repr__(self) -> str:
        return f"Shipping(endpoint={self.endpoint!r}, protocol={self.protocol!r}, control={self.control!r})"

    def to_json(self) -> str:
        return json.dumps({**self._asdict(), "control": self.control and self.control._asdict()})

    @classmethod
    def from_json(cls, text: str | bytes) -> Shipping:
        """Raises ValueError for anything that is not what `to_json` makes."""
        try:
            fields = json.loads(text)
            control = fields.pop("control", None)
            redact = tuple(fields.pop("redact", ()))
            return cls(**fields, redact=redact, control=Control(**control) if control else None)
        except (TypeError, AttributeError) as error:
            raise ValueError(f"no shipping settings: {error}") from error


def redaction(config: Config) -> tuple[list[object], ...]:
    """The user's redaction rules; none where the settings file cannot be read, which the launcher has said."""
    if not config.settings_file:
        return ()
    from skyrl_otel.spool import settings  # it costs 6 ms, and few have one

    try:
        return settings.read(config.settings_file).redact
    except settings.SettingsError:
        return ()


def from_config(config: Config, control: Control | None = None) -> Shipping | None:
    """The user's own endpoint, or None where there is none and the embedded collector is used."""
    if config.endpoint is None:
        return None
    return Shipping(
        redact=redaction(config),
        endpoint=config.endpoint,
        headers=dict(config.headers),
        protocol=config.protocol,
        compression=config.compression,
        timeout_s=config.timeout_s,
        certificate=config.certificate,
        client_key=config.client_key,
        client_certificate=config.client_certificate,
        control=control,
    )


def write(run: RunDir, shipping: Shipping) -> None:
    """Raises OSError."""
    replace_file(run.token, shipping.to_json().encode())


def read(run: RunDir) -> Shipping | None:
    """None where the file is not there yet or is not readable as one."""
    try:
        return Shipping.from_json(read_file(run.token))
    except (OSError, ValueError):
        return None
