"""`skyrl-otel doctor`: is anything wrong, and what to do about it."""

from __future__ import annotations

import itertools
import json
from typing import Annotated

import typer

from skyrl_otel.cli.loki import connect

_SIGNS = {"ok": ("ok", "green"), "note": ("note", "yellow"), "wrong": ("WRONG", "red")}


def command(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
    loki: Annotated[str, typer.Option("--loki", help="Look at this Loki too. Default: SKYRL_OTEL_LOKI.")] = "",
    loki_tenant: Annotated[str, typer.Option("--loki-tenant", help="Loki's tenant (X-Scope-OrgID).")] = "",
) -> None:
    """Check settings, receiver and token, spool and its backlog, agents, and what was lost and why.

    Sends one empty request to the receiver. Of a Loki it says what it holds, and what it refused and why. Exit code 1 if
    something is wrong.

    [bold]Example[/bold]

      skyrl-otel doctor || skyrl-otel logs --grep 'Error'
    """
    from skyrl_otel.collector.text import visible
    from skyrl_otel.query.health import examine
    from skyrl_otel.query.loki_health import check_loki

    wrong = 0
    remote = connect(loki, loki_tenant)
    for finding in itertools.chain(examine(), check_loki(remote) if remote else ()):
        wrong += finding.level == "wrong"
        if as_json:
            typer.echo(json.dumps({"level": finding.level, "area": finding.area, "text": finding.text}))
            continue
        sign, colour = _SIGNS[finding.level]
        typer.echo(f"{typer.style(f'{sign:<5}', fg=colour)}  {finding.area}: {visible(finding.text)}")
    if wrong:
        raise typer.Exit(1)
