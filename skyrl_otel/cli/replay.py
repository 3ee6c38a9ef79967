"""`skyrl-otel replay`: deliver what is still in the spool."""

from __future__ import annotations

from typing import Annotated

import typer

from skyrl_otel.cli.ending import fail


def command(
    run: Annotated[str, typer.Option("--run", help="Only this run. Default: all that hold something.")] = "",
    timeout_s: Annotated[
        float, typer.Option("--timeout", min=1, help="Give up after so many seconds without progress.")
    ] = 60.0,
) -> None:
    """Deliver what this node's spools still hold: to OTEL_EXPORTER_OTLP_ENDPOINT, else to where each run was sent.

    What was delivered before is not delivered again. Exit code 1 if something is left; it stays in the spool.

    [bold]Examples[/bold]

      skyrl-otel replay

      OTEL_EXPORTER_OTLP_ENDPOINT=http://gateway:4318 skyrl-otel replay --run night-7
    """
    from skyrl_otel.config import Config, ConfigError
    from skyrl_otel.spool.layout import existing_runs
    from skyrl_otel.terminal.replay import replay, waiting

    try:
        config = Config.from_env(strict=True)
    except ConfigError as error:
        fail(error)
    runs = [found for found in existing_runs(config.spool_root) if run in ("", found.run_id)]
    if run and not runs:
        fail(f"run {run!r} has no spool in {config.spool_root}")
    left = 0
    found = waiting(runs)
    for one, _ in found:
        try:
            left += replay(one, config, timeout_s=timeout_s).left_bytes
        except OSError as error:
            fail(f"run {one.run_id}: {error}", 1)
    if not found:
        typer.echo("nothing is waiting: all spools on this node are delivered", err=True)
    if left:
        raise typer.Exit(1)
