"""Every environment variable this project reads, parsed once into one frozen `Config`.

No other module looks at `os.environ` for a setting. In a training process a bad value is replaced by its default and
named in `Config.problems`; under ``strict=True`` (the command line) it raises `ConfigError` instead.

Standard library only: this module is imported inside the user's processes. In the modules that each worker loads at its
start values are named tuples: the code of a frozen dataclass is made anew at each import, for 0.5 to 2 ms.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import unquote, urlsplit

CaptureMode = Literal["auto", "redirect", "follow", "off"]
Channel = Literal["infra", "progress"]


class ConfigError(ValueError):
    """A variable has a value that cannot be used; the message names variable, value and what was expected."""


class Variable(NamedTuple):
    """One environment variable.

    `names` are tried in order, the first that is set and not empty wins. `parse` maps its text to the field's value
    and raises `ValueError` saying what was expected.
    """

    field: str
    names: tuple[str, ...]
    default: Any
    meaning: str
    parse: Callable[[str], Any] = str
    secret: bool = False


class Setting(NamedTuple):
    """One line of `skyrl-otel config`: a variable, the value in force, where it comes from."""

    names: tuple[str, ...]
    value: str
    source: str
    meaning: str
    problem: str | None


class Config(NamedTuple):
    """All settings of one process.

    Times are in seconds, sizes in bytes. `endpoint` is the full URL that logs are posted to, or None for the embedded
    collector. `problems` holds one sentence for each variable whose value was refused.
    """

    endpoint: str | None
    headers: Mapping[str, str]
    timeout_s: float
    compression: Literal["gzip", "none"]
    certificate: str
    client_key: str
    client_certificate: str
    protocol: str
    service_name: str
    resource_attributes: Mapping[str, str]
    disabled: bool
    skyrl_log_dir: str
    skyrl_log_file: str
    show_infra: bool
    run_id: str
    spool_root: Path
    log_dir: Path
    capture: CaptureMode
    progress: tuple[str, ...]
    loki: str
    loki_tenant: str
    loki_headers: Mapping[str, str]
    role: str
    project: str
    drain_s: float
    node_ip: str
    spool_max_bytes: int
    store_max_bytes: int
    allow_tmpfs: bool
    launched: bool
    terminal_fd: int | None
    echo: str
    levels: Mapping[str, int]
    settings_file: str
    user_hook: str
    raise_errors: bool
    problems: tuple[str, ...]

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None, *, strict: bool = False) -> Config:
        """Read the environment.

        Args:
            environ: the variables; default `os.environ`.
            strict: raise on the first bad value instead of falling back to its default.

        Raises:
            ConfigError: only if `strict`.
        """
        env = os.environ if environ is None else environ
        values: dict[str, Any] = {}
        problems: list[str] = []
        for variable in VARIABLES:
            value, _, problem = _read(variable, env)
            values[variable.field] = value
            if problem:
                problems.append(problem)
        dumped = values.pop("dump_infra")
        values["show_infra"] = values.pop("log_level") == "DEBUG" or dumped
        logs_endpoint, base_endpoint = values.pop("logs_endpoint"), values.pop("endpoint")
        if values["protocol"] not in ("http/protobuf", "grpc"):
            problems.append(
                f"OTEL_EXPORTER_OTLP_PROTOCOL={values['protocol']!r} is not spoken; "
                "write http/protobuf and use the receiver's port 4318, or grpc and port 4317"
            )
            values["protocol"] = "http/protobuf"
        # The path is OTLP/HTTP's; a gRPC method has none.
        path = "/v1/logs" if values["protocol"] == "http/protobuf" else ""
        values["endpoint"] = logs_endpoint or (base_endpoint.rstrip("/") + path if base_endpoint else None)
        values["spool_root"] = Path(values["spool_root"] or f"/var/tmp/skyrl-otel-{os.geteuid()}")
        values["log_dir"] = _log_dir(values["log_dir"], values["skyrl_log_dir"], values["skyrl_log_file"])
        if env.get("OTEL_CONFIG_FILE"):
            problems.append(
                f"OTEL_CONFIG_FILE={env['OTEL_CONFIG_FILE']!r} is not read; set OTEL_EXPORTER_OTLP_ENDPOINT instead"
            )
        if strict and problems:
            raise ConfigError(problems[0])
        return cls(**values, problems=tuple(problems))


def describe(environ: Mapping[str, str] | None = None) -> list[Setting]:
    """Every variable with its value, its source (the variable's name or "default") and its meaning; secrets masked."""
    env = os.environ if environ is None else environ
    settings = []
    for variable in VARIABLES:
        value, source, problem = _read(variable, env)
        shown = _mask(value) if variable.secret else _show(value)
        settings.append(Setting(variable.names, shown, source or "default", variable.meaning, problem))
    return settings


def _read(variable: Variable, env: Mapping[str, str]) -> tuple[Any, str, str | None]:
    for name in variable.names:
        text = env.get(name, "").strip()
        if not text:
            continue
        try:
            return variable.parse(text), name, None
        except ValueError as error:
            shown = "***" if variable.secret else repr(text)
            return variable.default, name, f"{name}={shown} {error}"
    return variable.default, "", None


def _show(value: Any) -> str:
    if value is None or value == "" or value == {} or value == ():
        return ""
    if isinstance(value, dict):
        return ",".join(f"{key}={item}" for key, item in value.items())
    if isinstance(value, tuple):
        return ",".join(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def _mask(value: Any) -> str:
    return ",".join(f"{key}=***" for key in value) if isinstance(value, dict) else ("***" if value else "")


def _log_dir(own: str, skyrl_dir: str, skyrl_file: str) -> Path:
    if own or skyrl_dir:
        return Path(own or skyrl_dir).expanduser().absolute()
    if skyrl_file:
        return Path(skyrl_file).expanduser().absolute().parent
    return Path.cwd() / "skyrl-logs"


def _url(text: str) -> str:
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"has no scheme; write http://{text}" if "://" not in text else "is not an http(s) URL")
    try:
        parts.port  # noqa: B018  (the property raises on a bad port)
    except ValueError as error:
        raise ValueError(f"has a bad port: {error}") from None
    return text


def _pairs(text: str) -> dict[str, str]:
    # W3C Baggage style, percent-encoded values: OpenTelemetry specification, "Environment Variable Specification".
    pairs = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = item.partition("=")
        if not equals or not key.strip():
            raise ValueError(
                f"has the item {item.split('=')[0]!r} that is not key=value; write key1=value1,key2=value2"
            )
        pairs[key.strip()] = unquote(value.strip())
    return pairs


def _headers(text: str) -> dict[str, str]:
    try:
        pairs = _pairs(text)
    except ValueError:
        raise ValueError("is not a list of key=value; write key1=value1,key2=value2") from None
    for key, value in pairs.items():
        if not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", key) or re.search(r"[\x00-\x08\x0a-\x1f\x7f]", value):
            raise ValueError(f"holds the header {key!r} that HTTP does not allow")
    return {key.lower(): value for key, value in pairs.items()}


def _flag(text: str) -> bool:
    lowered = text.lower()
    if lowered in ("1", "true", "yes", "on"):
        return True
    if lowered in ("0", "false", "no", "off"):
        return False
    raise ValueError("is neither true nor false; write 1 or 0")


def _number(low: float, high: float, unit: str) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise ValueError(f"is not a number of {unit}") from None
        if not low <= value <= high:
            raise ValueError(f"is outside {low:g} to {high:g} {unit}")
        return value

    return parse


def _milliseconds(text: str) -> float:
    return _number(1, 3_600_000, "milliseconds")(text) / 1000


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?b?)", text, re.IGNORECASE)
    if not match:
        raise ValueError("is not a size; write for example 20GB or 512MB")
    return int(float(match[1]) * 1024 ** " kmgt".index(match[2].lower() or " "))


def _choice(*allowed: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text.lower() not in allowed:
            raise ValueError(f"is none of {', '.join(allowed)}")
        return text.lower()

    return parse


def _globs(text: str) -> tuple[str, ...]:
    return tuple(filter(None, (part.strip() for part in text.split(","))))


_RUN_ID_LETTERS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-")


def is_run_id(text: str) -> bool:
    """Whether a text may name a run, and so a folder: 1 to 80 letters, digits, '.', '_' or '-', not a dot first."""
    return 1 <= len(text) <= 80 and text[0] != "." and _RUN_ID_LETTERS.issuperset(text)


_LEVELS = {"TRACE": 5, "DEBUG": 10, "INFO": 20, "SUCCESS": 25, "WARN": 30, "WARNING": 30, "ERROR": 40, "CRITICAL": 50}


def _levels(text: str) -> dict[str, int]:
    """`vllm=INFO,ray=WARNING`; an item without a name is for all other loggers."""
    levels = {}
    for item in _globs(text):
        name, _, level = item.rpartition("=")
        number = _LEVELS.get(level.strip().upper(), -1)
        if level.strip().isdigit():
            number = int(level)
        if number < 0:
            raise ValueError(f"has the level {level.strip()!r}; write for example vllm=INFO,ray=WARNING")
        levels[name.strip()] = number
    return levels


def _run_id(text: str) -> str:
    if not is_run_id(text):
        raise ValueError("is no run id; use 1 to 80 letters, digits, '.', '_' or '-', not a dot first")
    return text


def _descriptor(text: str) -> int:
    if not text.isdigit():
        raise ValueError("is no file descriptor")
    return int(text)


def _otlp(suffix: str) -> tuple[str, ...]:
    return (f"OTEL_EXPORTER_OTLP_LOGS_{suffix}", f"OTEL_EXPORTER_OTLP_{suffix}")


GB = 1024**3

VARIABLES: tuple[Variable, ...] = (
    Variable("endpoint", ("OTEL_EXPORTER_OTLP_ENDPOINT",), "", "collector to send to; unset: the embedded one", _url),
    Variable("logs_endpoint", ("OTEL_EXPORTER_OTLP_LOGS_ENDPOINT",), "", "the same for logs alone, full URL", _url),
    Variable("headers", _otlp("HEADERS"), {}, "headers of each request, key=value,…", _headers, secret=True),
    Variable("timeout_s", _otlp("TIMEOUT"), 10.0, "time for one request, in milliseconds", _milliseconds),
    Variable("compression", _otlp("COMPRESSION"), "gzip", "gzip or none", _choice("gzip", "none")),
    Variable("certificate", _otlp("CERTIFICATE"), "", "CA file that signs the collector's certificate"),
    Variable("client_key", _otlp("CLIENT_KEY"), "", "private key file for mutual TLS"),
    Variable("client_certificate", _otlp("CLIENT_CERTIFICATE"), "", "certificate file for mutual TLS"),
    Variable("protocol", _otlp("PROTOCOL"), "http/protobuf", "http/protobuf, or grpc", str.lower),
    Variable("service_name", ("OTEL_SERVICE_NAME",), "", "service.name; unset: the role"),
    Variable("resource_attributes", ("OTEL_RESOURCE_ATTRIBUTES",), {}, "more resource attributes, key=value,…", _pairs),
    Variable("disabled", ("OTEL_SDK_DISABLED",), False, "true: do nothing at all", _flag),
    Variable("skyrl_log_dir", ("SKYRL_LOG_DIR",), "", "SkyRL's log folder; the text files go there too"),
    Variable("skyrl_log_file", ("SKYRL_LOG_FILE",), "", "SkyRL's infra log file; its folder is used"),
    Variable("log_level", ("SKYRL_LOG_LEVEL",), "INFO", "DEBUG: infra lines are shown on the terminal too", str.upper),
    Variable("dump_infra", ("SKYRL_DUMP_INFRA_LOG_TO_STDOUT",), False, "1: infra lines on the terminal too", _flag),
    Variable("run_id", ("SKYRL_OTEL_RUN_ID",), "", "name of the run; unset: job id or made", _run_id),
    Variable("spool_root", ("SKYRL_OTEL_SPOOL_DIR",), "", "spool on a local disk; unset: /var/tmp/skyrl-otel-<uid>"),
    Variable("log_dir", ("SKYRL_OTEL_LOG_DIR",), "", "text files and store; unset: SkyRL's, else ./skyrl-logs"),
    Variable(
        "capture",
        ("SKYRL_OTEL_CAPTURE",),
        "auto",
        "auto, redirect, follow (leave all in Ray's files) or off",
        _choice("auto", "redirect", "follow", "off"),
    ),
    Variable("progress", ("SKYRL_OTEL_PROGRESS",), (), "tasks and actors that are progress, globs with commas", _globs),
    Variable("loki", ("SKYRL_OTEL_LOKI",), "", "Loki that `logs` and `doctor` read, like http://loki:3100", _url),
    Variable("loki_tenant", ("SKYRL_OTEL_LOKI_TENANT",), "", "its tenant (X-Scope-OrgID)"),
    Variable("loki_headers", ("SKYRL_OTEL_LOKI_HEADERS",), {}, "headers for it, key=value,…", _headers, secret=True),
    Variable("role", ("SKYRL_OTEL_ROLE",), "", "role of this process (policy, rollout, …)"),
    Variable("project", ("SKYRL_OTEL_PROJECT",), "", "service.namespace"),
    Variable("drain_s", ("SKYRL_OTEL_DRAIN_S",), 10.0, "seconds to wait at the end", _number(0, 3600, "seconds")),
    Variable("node_ip", ("SKYRL_OTEL_NODE_IP",), "", "address the embedded collector listens on; unset: found"),
    Variable("spool_max_bytes", ("SKYRL_OTEL_SPOOL_MAX",), 8 * GB, "undelivered bytes kept per node and run", _size),
    Variable("store_max_bytes", ("SKYRL_OTEL_STORE_MAX",), 50 * GB, "size at which the store takes no more", _size),
    Variable("allow_tmpfs", ("SKYRL_OTEL_ALLOW_TMPFS",), False, "1: the spool may be in memory", _flag),
    Variable("launched", ("SKYRL_OTEL_LAUNCHER",), False, "set by `skyrl-otel run` for its children", _flag),
    Variable(
        "terminal_fd", ("SKYRL_OTEL_TERMINAL_FD",), None, "set by `skyrl-otel run`: shown, not recorded", _descriptor
    ),
    Variable("echo", ("SKYRL_OTEL_ECHO",), "", "set by `skyrl-otel run`: how console echoes are marked for it"),
    Variable("levels", ("SKYRL_OTEL_LEVELS",), {}, "lowest level recorded, logger=LEVEL,… (vllm=INFO)", _levels),
    Variable("settings_file", ("SKYRL_OTEL_CONFIG",), "", "TOML file with routes and redaction rules"),
    Variable("user_hook", ("SKYRL_OTEL_USER_HOOK",), "", "set by us: the job's own setup hook, called after ours"),
    Variable("raise_errors", ("SKYRL_OTEL_RAISE",), False, "1: our own errors raise (for tests)", _flag),
)
