"""`skyrl-otel`: the table of commands, and what holds for all of them."""

from __future__ import annotations

from typing import Annotated

import typer

from skyrl_otel.cli import collector, config, doctor, logs, replay, run, runs

_EPILOG = """
[bold]Begin[/bold]

  skyrl-otel run -- python train.py      run a program; see its progress, record all of it

  skyrl-otel logs -f                     read along, from another terminal

  skyrl-otel logs --role rollout --grep 'Error|Traceback'

  skyrl-otel doctor                      is anything wrong?
"""

app = typer.Typer(
    name="skyrl-otel",
    help="Every line of every process of a training run in one place, with who wrote it.",
    epilog=_EPILOG,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.command("run", context_settings=run.CONTEXT)(run.command)
app.command("logs")(logs.command)
app.command("runs")(runs.command)
app.command("doctor")(doctor.command)
app.command("config")(config.command)
app.command("collector")(collector.command)
app.command("replay")(replay.command)


def _version(wanted: bool) -> None:
    if wanted:
        from skyrl_otel import __version__

        typer.echo(f"skyrl-otel {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """The console script."""
    app()
