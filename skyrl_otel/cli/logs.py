"""`skyrl-otel logs`: print a run's records."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from skyrl_otel.cli.ending import fail, quiet_end

if TYPE_CHECKING:
    from skyrl_otel.query.filters import Filter
    from skyrl_otel.query.runs import FoundRun
    from skyrl_otel.query.sources import Source


def command(
    run: Annotated[str, typer.Option("--run", help="The run, or how its name begins. Default: the newest.")] = "",
    actor: Annotated[
        str, typer.Option("--actor", help="Actor by name or class (* and ? allowed) or start of id.")
    ] = "",
    role: Annotated[str, typer.Option("--role", help="policy, critic, ref, reward, rollout, driver … (glob).")] = "",
    rank: Annotated[int | None, typer.Option("--rank", help="Rank within its role.")] = None,
    node: Annotated[str, typer.Option("--node", help="Host name (glob) or start of Ray's node id.")] = "",
    channel: Annotated[str, typer.Option("--channel", help="infra or progress.")] = "",
    stream: Annotated[str, typer.Option("--stream", help="stdout or stderr.")] = "",
    since: Annotated[str, typer.Option("--since", help="30s, 10m, 2h, 1d ago, or 2026-11-22T14:30:00.")] = "",
    grep: Annotated[str, typer.Option("--grep", help="Regular expression to find in the message.")] = "",
    limit: Annotated[int | None, typer.Option("-n", "--limit", min=0, help="Only the newest N.")] = None,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on as more comes, until Ctrl-C.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
    log_dir: Annotated[Path | None, typer.Option("--log-dir", help="Where finished runs lie.")] = None,
    loki: Annotated[
        str, typer.Option("--loki", help="Read Loki at this URL. Default: SKYRL_OTEL_LOKI, else the store.")
    ] = "",
    loki_tenant: Annotated[str, typer.Option("--loki-tenant", help="Loki's tenant (X-Scope-OrgID).")] = "",
) -> None:
    """Print what a run recorded, by time, with who wrote it. All conditions must hold.

    [bold]Examples[/bold]

      skyrl-otel logs -n 100                                  the newest run's last 100

      skyrl-otel logs --actor RolloutEngine --since 10m -f    one actor, and go on

      skyrl-otel logs --role policy --rank 3 --stream stderr

      skyrl-otel logs --grep 'Error|Traceback' --json | jq -r .body

      skyrl-otel logs --loki http://loki:3100 --run night-7   the same from Loki

    Headers for Loki, a token for example, are taken from SKYRL_OTEL_LOKI_HEADERS.
    """
    import sqlite3

    from skyrl_otel.cli.loki import connect
    from skyrl_otel.query import filters
    from skyrl_otel.query.loki import LokiError, LokiSource
    from skyrl_otel.query.runs import UnknownRun
    from skyrl_otel.query.sources import StoreSource

    try:
        wanted = filters.Filter(
            actor=actor,
            role=role,
            rank=rank,
            node=node,
            channel=filters.parse_choice("--channel", channel, "infra", "progress"),
            stream=filters.parse_choice("--stream", stream, "stdout", "stderr"),
            since_unix_nano=filters.parse_since(since) if since else None,
            grep=filters.parse_grep(grep) if grep else None,
            limit=limit,
        )
    except filters.FilterError as error:
        fail(error)
    remote = connect(loki, loki_tenant)
    with quiet_end():
        if remote is not None:
            try:
                _print(LokiSource(remote, remote.choose_run(run)), wanted, follow=follow, as_json=as_json)
            except (LokiError, UnknownRun) as error:
                fail(error)
            return
        found = find(run, log_dir)
        try:
            _print(StoreSource(found.path), wanted, follow=follow, as_json=as_json)
        except (sqlite3.Error, FileNotFoundError) as error:
            fail(f"cannot read {found.path}: {error}")


def find(run: str, log_dir: Path | None) -> FoundRun:
    """The run that is meant; ends the command where there is none."""
    from skyrl_otel.config import Config
    from skyrl_otel.query.runs import UnknownRun, choose_run, find_runs

    config = Config.from_env()
    try:
        return choose_run(find_runs(config.spool_root, log_dir or config.log_dir), run)
    except UnknownRun as error:
        fail(error)


def _print(source: Source, wanted: Filter, *, follow: bool, as_json: bool) -> None:
    from skyrl_otel.query import render

    out = sys.stdout
    colour = out.isatty() and _has_colours()
    line = render.json_line if as_json else render.Lines(colour=colour).line
    if hasattr(out, "reconfigure"):
        out.reconfigure(encoding="utf-8", errors="backslashreplace", line_buffering=False)
    for record in source.read(wanted):
        out.write(line(record))
    out.flush()
    if not follow:
        return
    for more in source.follow(wanted, lambda: False):
        if more is not None:
            out.write(line(more))
        else:
            out.flush()


def _has_colours() -> bool:
    """Whether the terminal shows colours and the user wants them (TERM, NO_COLOR); rich knows."""
    from rich.console import Console

    console = Console()
    return console.color_system is not None and not console.no_color
