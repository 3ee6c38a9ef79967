"""`skyrl-otel run`: hand the command over to the launcher."""

from __future__ import annotations

from typing import Annotated

import typer

from skyrl_otel.cli.ending import fail

# Everything from the command's own name on belongs to the command.
CONTEXT = {"allow_interspersed_args": False, "ignore_unknown_options": False}


def command(
    argv: Annotated[list[str], typer.Argument(metavar="CMD…", help="The program and its arguments, after --.")],
    run_id: Annotated[str, typer.Option("--run-id", help="Name of the run. Default: the job's, else a new one.")] = "",
    log_dir: Annotated[
        str, typer.Option("--log-dir", help="Folder for text files and store. Default: SKYRL_OTEL_LOG_DIR.")
    ] = "",
) -> None:
    """Run a program with every line of all its processes recorded; the terminal shows progress only.

    Exit code, signals, Ctrl-C, colours and window size pass through. Nothing in the program needs to change.

    [bold]Examples[/bold]

      skyrl-otel run -- python train.py --lr 3e-4

      skyrl-otel run -- uv run --isolated -m skyrl_train.entrypoints.main_base trainer.epochs=2

      SKYRL_LOG_LEVEL=DEBUG skyrl-otel run -- python train.py      all lines on the terminal too

      OTEL_EXPORTER_OTLP_ENDPOINT=http://gw:4318 skyrl-otel run -- python train.py      to your collector
    """
    from skyrl_otel.config import is_run_id
    from skyrl_otel.terminal.run import main

    if run_id and not is_run_id(run_id):
        fail(f"--run-id {run_id!r} is no plain name; use 1 to 80 letters, digits, '.', '_' or '-', not a dot first")
    raise typer.Exit(main(argv, run_id=run_id or None, log_dir=log_dir or None))
