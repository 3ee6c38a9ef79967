"""`skyrl-otel runs`: what is recorded here."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer


def command(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
    log_dir: Annotated[Path | None, typer.Option("--log-dir", help="Where finished runs lie.")] = None,
) -> None:
    """List the runs recorded on this machine and in the log folder, newest first.

    [bold]Examples[/bold]

      skyrl-otel runs

      skyrl-otel runs --json | jq -r 'select(.errors > 0) | .run'
    """
    import sqlite3

    from skyrl_otel.config import Config
    from skyrl_otel.query.runs import find_runs
    from skyrl_otel.query.summary import summarize

    config = Config.from_env()
    rows: list[dict[str, Any]] = []
    for found in find_runs(config.spool_root, log_dir or config.log_dir):
        try:
            summary = summarize(found.path)
        except (sqlite3.Error, OSError) as error:
            typer.echo(f"skyrl-otel: {found.path} cannot be read: {error}", err=True)
            continue
        last = summary.last_unix_nano or found.started_unix_nano
        rows.append(
            {
                "run": found.run_id,
                "started_unix_nano": found.started_unix_nano,
                "duration_s": round(max(last - found.started_unix_nano, 0) / 1e9, 3),
                "records": summary.records,
                "errors": summary.errors,
                "lost_bytes": summary.lost_bytes,
                "size_bytes": summary.size_bytes,
                "live": found.live,
                "store": str(found.path),
                "texts": {channel: str(path) for channel, path in summary.texts.items()},
            }
        )
    if as_json:
        for row in rows:
            typer.echo(json.dumps(row))
    elif rows:
        _table(rows)
    else:
        typer.echo("no run is recorded here; start one with: skyrl-otel run -- python train.py", err=True)


def _table(rows: list[dict[str, Any]]) -> None:
    from datetime import datetime, timedelta

    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("run", "started", "duration", "records", "errors", "size", "where"):
        table.add_column(
            title, overflow="fold", justify="right" if title in ("duration", "records", "errors", "size") else "left"
        )
    for row in rows:
        started = datetime.fromtimestamp(row["started_unix_nano"] / 1e9).astimezone()
        infra = row["texts"].get("infra", "")
        table.add_row(
            escape(row["run"]),
            f"{started:%Y-%m-%d %H:%M:%S}",
            "running" if row["live"] else str(timedelta(seconds=round(row["duration_s"]))),
            f"{row['records']:,}",
            f"[red]{row['errors']:,}[/red]" if row["errors"] else "0",
            f"{row['size_bytes'] / 1e6:,.1f} MB",
            escape(str(Path(infra).parent) if infra else row["store"]),
        )
    # A table that is cut to 80 columns is of no use to whoever reads it from a pipe.
    console = Console() if sys.stdout.isatty() else Console(width=400)
    console.print(table)
