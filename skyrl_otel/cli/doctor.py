"""`skyrl-otel doctor`: is anything wrong, and what to do about it."""

from __future__ import annotations

import json
from typing import Annotated

import typer

_SIGNS = {"ok": ("ok", "green"), "note": ("note", "yellow"), "wrong": ("WRONG", "red")}


def command(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Check settings, receiver and token, spool and its backlog, agents, and what was lost and why.

    Sends one empty request to the receiver. Exit code 1 if something is wrong.

    [bold]Example[/bold]

      skyrl-otel doctor || skyrl-otel logs --grep 'Error'
    """
    from skyrl_otel.collector.text import visible
    from skyrl_otel.query.health import examine

    wrong = 0
    for finding in examine():
        wrong += finding.level == "wrong"
        if as_json:
            typer.echo(json.dumps({"level": finding.level, "area": finding.area, "text": finding.text}))
            continue
        sign, colour = _SIGNS[finding.level]
        typer.echo(f"{typer.style(f'{sign:<5}', fg=colour)}  {finding.area}: {visible(finding.text)}")
    if wrong:
        raise typer.Exit(1)
