"""The dashboard "skyrl-otel", built from this file: ``python deploy/collector/grafana/dashboard.py`` writes the JSON beside it.

A panel is one entry of the table below; its queries are plain LogQL, which the tests run on a real Loki.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grafana_foundation_sdk.builders import common as common_builders
from grafana_foundation_sdk.builders import dashboard, logs, loki, stat, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import (
    DataSourceRef,
    GraphDrawStyle,
    LegendDisplayMode,
    LegendPlacement,
    LogsSortOrder,
    StackingMode,
)
from grafana_foundation_sdk.models.dashboard import VariableRefresh, VariableSort

PATH = Path(__file__).parent / "dashboards" / "skyrl-otel.json"
SOURCE = DataSourceRef("loki", "loki")

RUN = '{skyrl_run_id="$run"}'
ERRORS = f"{RUN} | severity_number >= 17"
"""OTLP's SeverityNumber: 17 is ERROR."""


@dataclass(frozen=True)
class Panel:
    """`$__auto` and `$__range` are Grafana's: the step of a graph, and the whole time shown."""

    title: str
    kind: str
    query: str
    description: str
    legend: str = ""
    unit: str = ""
    width: int = 12
    height: int = 8


PANELS = (
    Panel("Lines", "stat", f"sum(count_over_time({RUN} [$__range]))", "All records of the run.", width=6, height=4),
    Panel(
        "Errors", "stat", f"sum(count_over_time({ERRORS} [$__range]))", "Severity ERROR and above.", width=6, height=4
    ),
    Panel(
        "Processes that ended badly",
        "stat",
        f'sum(count_over_time({ERRORS} | event_name="skyrl.process.end" [$__range]))',
        "Killed by a signal, or ended with a code other than 0 or without a word.",
        width=6,
        height=4,
    ),
    Panel(
        "Bytes lost",
        "stat",
        f'sum(sum_over_time({RUN} | event_name="skyrl.loss" | unwrap skyrl_lost_bytes [$__range]))',
        "What was given up, and counted: a spool at its cap, a truncated file, a refusal.",
        unit="bytes",
        width=6,
        height=4,
    ),
    Panel(
        "Errors by node, component and rank",
        "bars",
        f"sum by (host_name, service_name, skyrl_rank) (count_over_time({ERRORS} [$__auto]))",
        "Which process it is, over time.",
        legend="{{host_name}} {{service_name}}/{{skyrl_rank}}",
    ),
    Panel(
        "Volume by actor",
        "bars",
        f'sum by (ray_actor_class, ray_actor_name) (bytes_over_time({RUN} | ray_actor_class != "" [$__auto]))',
        "Bytes of messages, by class and, where it has one, name.",
        legend="{{ray_actor_class}} {{ray_actor_name}}",
        unit="bytes",
    ),
    Panel(
        "Lines by component",
        "bars",
        f"sum by (service_name, skyrl_channel) (count_over_time({RUN} [$__auto]))",
        "Roles, Ray's own processes, the driver.",
        legend="{{service_name}} ({{skyrl_channel}})",
    ),
    Panel(
        "Step",
        "line",
        f'max(max_over_time({RUN} | skyrl_step != "" | unwrap skyrl_step [$__auto]))',
        "The training step that records name, where they do.",
        legend="step",
    ),
    Panel(
        "How processes ended",
        "logs",
        f'{RUN} | event_name="skyrl.process.end"',
        "The end of each process: code or signal, and its last line.",
        width=24,
    ),
    Panel("First errors", "logs-ascending", ERRORS, "The oldest first: that is where one looks.", width=24),
    Panel(
        "One actor",
        "logs",
        f'{RUN} | (ray_actor_name=~"$actor" or ray_actor_class=~"$actor")',
        "By name or class, chosen above.",
        width=24,
        height=10,
    ),
    Panel(
        "Live",
        "logs",
        f'{RUN} |~ "$text"',
        "Everything, newest first; `Live` in Explore tails it.",
        width=24,
        height=14,
    ),
)


def build() -> str:
    """The dashboard as JSON, with a newline at its end."""
    made = (
        dashboard.Dashboard("skyrl-otel")
        .uid("skyrl-otel")
        .description("One training run: who wrote what, what went wrong, how each process ended.")
        .tags(["skyrl-otel"])
        .timezone("browser")
        .time("now-6h", "now")
        .refresh("10s")
        .readonly()
        .with_variable(
            dashboard.QueryVariable("run")
            .label("Run")
            .datasource(SOURCE)
            .query({"label": "skyrl_run_id", "refId": "run", "stream": "", "type": 1})
            .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
            .sort(VariableSort.ALPHABETICAL_DESC)
        )
        .with_variable(dashboard.TextBoxVariable("actor").label("Actor (regular expression)").default_value(".+"))
        .with_variable(dashboard.TextBoxVariable("text").label("Text (regular expression)").default_value(""))
    )
    for panel in PANELS:
        made.with_panel(_KINDS[panel.kind](panel))
    return json.dumps(made.build(), cls=JSONEncoder, indent=2, sort_keys=True) + "\n"


def _query(panel: Panel, *, instant: bool = False) -> Any:
    query = loki.Dataquery().expr(panel.query).ref_id("A").query_type("instant" if instant else "range")
    return query.legend_format(panel.legend) if panel.legend else query


def _common(made: Any, panel: Panel, *, instant: bool = False) -> Any:
    made = made.title(panel.title).description(panel.description).datasource(SOURCE)
    return made.with_target(_query(panel, instant=instant)).span(panel.width).height(panel.height)


def _stat(panel: Panel) -> Any:
    made = _common(stat.Panel(), panel, instant=True).no_value("0")
    return made.unit(panel.unit) if panel.unit else made


def _bars(panel: Panel) -> Any:
    made = (
        _common(timeseries.Panel(), panel)
        .draw_style(GraphDrawStyle.BARS)
        .fill_opacity(70)
        .stacking(common_builders.StackingConfig().mode(StackingMode.NORMAL))
        .legend(_legend())
    )
    return made.unit(panel.unit) if panel.unit else made


def _line(panel: Panel) -> Any:
    return _common(timeseries.Panel(), panel).draw_style(GraphDrawStyle.LINE).legend(_legend())


def _legend() -> Any:
    return (
        common_builders.VizLegendOptions()
        .display_mode(LegendDisplayMode.LIST)
        .placement(LegendPlacement.BOTTOM)
        .show_legend(True)
    )


def _logs(panel: Panel) -> Any:
    made = _common(logs.Panel(), panel).show_time(True).wrap_log_message(True).enable_log_details(True)
    return made.sort_order(LogsSortOrder.DESCENDING)


def _logs_ascending(panel: Panel) -> Any:
    return _logs(panel).sort_order(LogsSortOrder.ASCENDING)


_KINDS: dict[str, Callable[[Panel], Any]] = {
    "stat": _stat,
    "bars": _bars,
    "line": _line,
    "logs": _logs,
    "logs-ascending": _logs_ascending,
}


if __name__ == "__main__":
    PATH.parent.mkdir(parents=True, exist_ok=True)
    PATH.write_text(build())
