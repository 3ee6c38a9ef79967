"""`skyrl-otel config`: every setting, its value and where it comes from."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def command(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Print each variable with value, source and meaning; secrets are masked. Exit code 1 if a value is refused.

    [bold]Example[/bold]

      OTEL_EXPORTER_OTLP_ENDPOINT=http://gateway:4318 skyrl-otel config
    """
    from skyrl_otel.config import Config, describe

    settings = describe()
    problems = Config.from_env().problems
    if as_json:
        for setting in settings:
            typer.echo(
                json.dumps(
                    {
                        "names": setting.names,
                        "value": setting.value,
                        "source": setting.source,
                        "meaning": setting.meaning,
                        "problem": setting.problem,
                    }
                )
            )
    else:
        width = max(len(setting.names[-1]) for setting in settings)
        for setting in settings:
            source = "" if setting.source == "default" else f"  [{setting.source}]"
            typer.echo(f"{setting.names[-1]:<{width}}  {setting.value or '-'}{source}")
            typer.echo(f"{'':<{width}}    {setting.meaning}")
    for problem in problems:
        typer.echo(f"skyrl-otel: {problem}", err=True)
    if problems:
        raise typer.Exit(1)
