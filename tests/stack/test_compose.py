"""docker-compose.yml through compose-go, the loader that `docker compose` itself uses; no engine is needed."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.stack.processes import CHECKOUT, DEPLOY, Loki, binary

pytestmark = [pytest.mark.collector, pytest.mark.loki, pytest.mark.timeout(200)]


def _load(*profiles: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [binary("compose-config"), CHECKOUT / "docker-compose.yml", *profiles],
        env={"PATH": os.environ["PATH"], **environment},
        capture_output=True,
        text=True,
    )


def _services(*profiles: str, **environment: str) -> dict[str, Any]:
    done = _load(*profiles, **{"SKYRL_OTEL_TOKEN": "secret", **environment})
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)["services"]
    return found


def test_without_a_token_it_says_what_to_do() -> None:
    done = _load("grafana")
    assert done.returncode == 1
    assert "required variable SKYRL_OTEL_TOKEN is missing a value: set SKYRL_OTEL_TOKEN in .env" in done.stderr


def test_there_is_one_collector_in_each_profile() -> None:
    # `docker compose up collector` starts the service it names, whatever its profile.
    assert set(_services("files")) == {"collector"}
    assert set(_services("grafana")) == {"collector-loki", "loki", "grafana"}
    assert set(_services()) == set()


def test_each_variable_is_in_the_example() -> None:
    text = (DEPLOY / "env.example").read_text()
    for name in re.findall(r"\$\{([A-Z_]+)[:}]", (CHECKOUT / "docker-compose.yml").read_text()):
        assert f"{name}=" in text, f"env.example does not name {name}"


def test_it_starts_on_a_machine_of_any_size() -> None:
    # Docker refuses a limit above the machine's cores.
    assert all(float(service.get("cpus", 0)) == 0 for service in _services("files", "grafana").values())


def test_grafana_is_not_opened_to_others_with_its_first_password() -> None:
    done = _load("grafana", SKYRL_OTEL_TOKEN="secret", GRAFANA_LISTEN="0.0.0.0")
    assert done.returncode == 1 and "set GRAFANA_PASSWORD in .env before GRAFANA_LISTEN" in done.stderr
    opened = _services("grafana", GRAFANA_LISTEN="0.0.0.0", GRAFANA_PASSWORD="own")["grafana"]
    assert opened["environment"]["GF_SECURITY_ADMIN_PASSWORD"] == "own"
    # Nothing that training pods know opens it.
    assert "secret" not in json.dumps(_services("grafana")["grafana"])


def test_a_key_that_only_its_owner_may_read_can_be_mounted() -> None:
    for name in ("collector", "collector-loki"):
        assert _services("files", "grafana")[name]["cap_add"] == ["DAC_READ_SEARCH"]


def test_versions_are_the_ones_built_and_tested() -> None:
    services = _services("files", "grafana")
    built = (DEPLOY / "recipes/otelcol/builder.yaml").read_text()
    version = re.search(r"^  version: (\S+)$", built, re.M)
    loki = re.search(r"^require github.com/grafana/loki/v3 v(\S+)$", (DEPLOY / "recipes/loki/go.mod").read_text(), re.M)
    assert version and loki
    for name in ("collector", "collector-loki"):
        assert services[name]["image"] == f"otel/opentelemetry-collector-contrib:{version[1]}"
    assert services["loki"]["image"] == f"grafana/loki:{loki[1]}"


def test_ports_are_this_machines_own_unless_told_otherwise() -> None:
    for services, address in (
        (_services("files", "grafana"), "127.0.0.1"),
        (_services("files", LISTEN="10.0.0.7"), "10.0.0.7"),
    ):
        for service in services.values():
            for port in service["ports"]:
                expected = address if port["target"] in (4317, 4318) else "127.0.0.1"
                assert port["host_ip"] == expected, port


def test_what_is_mounted_is_what_the_tests_run() -> None:
    services = _services("files", "grafana")
    mounted = {
        (name, volume["target"]): volume["source"]
        for name, service in services.items()
        for volume in service["volumes"]
        if volume["type"] == "bind"
    }
    config = str(DEPLOY / "config.yaml")
    assert mounted["collector", "/etc/otelcol/config.yaml"] == config
    assert mounted["collector-loki", "/etc/otelcol/config.yaml"] == config
    assert mounted["loki", "/etc/loki/config.yaml"] == str(DEPLOY / "loki.yaml")
    for (_, target), source in mounted.items():
        assert target == "/tls" or Path(source).exists(), source
    for name in ("collector", "collector-loki", "loki", "grafana"):
        assert services[name]["mem_limit"] and services[name]["restart"] == "unless-stopped"


def test_lokis_health_check_is_a_command_it_has(spool_root: Path) -> None:
    check = _services("grafana")["loki"]["healthcheck"]["test"]
    assert check == ["CMD", "/usr/bin/loki", "-health"]
    loki = Loki(spool_root / "loki")
    command = [binary("loki"), *check[2:], f"-health.url={loki.url}/ready"]
    try:
        assert subprocess.run(command, capture_output=True).returncode != 0
        loki.start()
        assert subprocess.run(command, capture_output=True).returncode == 0
    finally:
        loki.kill()
