"""`skyrl-otel collector`: the embedded collector by hand."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from skyrl_otel.cli.ending import fail


def command(
    run_id: Annotated[str, typer.Option("--run-id", help="Name of the run. Default: SKYRL_OTEL_RUN_ID.")] = "",
    log_dir: Annotated[Path | None, typer.Option("--log-dir", help="Folder for text files and store.")] = None,
    host: Annotated[str, typer.Option("--host", help="The one address to listen on. Default: the node's.")] = "",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Default: any, or that of last time.")] = 0,
    control_only: Annotated[bool, typer.Option("--control-only", help="Take agents' statuses, no records.")] = False,
    exit_when_drained: Annotated[
        bool, typer.Option("--exit-when-drained", help="End when no agent has spoken for ten minutes.")
    ] = False,
) -> None:
    """Run the embedded collector of one run until Ctrl-C. `skyrl-otel run` starts one by itself.

    Senders need the token in <spool>/<run>/store/secret as a bearer token.

    [bold]Example[/bold]

      skyrl-otel collector --run-id night-7 --host 10.0.0.5 --port 4318
    """
    from skyrl_otel.collector import node_ip, service
    from skyrl_otel.config import Config, ConfigError
    from skyrl_otel.spool.layout import SpoolRefused, open_run

    try:
        config = Config.from_env(strict=True)
        name = run_id or config.run_id
        if not name:
            fail("the collector serves one run; name it with --run-id")
        run = open_run(config.spool_root, name)
    except (ConfigError, SpoolRefused) as error:
        fail(error)
    settings = service.Settings(
        run=run,
        log_dir=(log_dir or config.log_dir).expanduser().absolute(),
        host=node_ip.find(os.environ, given=host or config.node_ip),
        port=port,
        control_only=control_only,
        exit_when_drained=exit_when_drained,
        settings_file=config.settings_file,
        store_max_bytes=config.store_max_bytes,
    )
    raise typer.Exit(service.main(settings))
