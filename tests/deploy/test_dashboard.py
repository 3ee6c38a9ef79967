"""The checked-in dashboard is what its builder builds."""

import json

from tests.deploy.dashboard_file import dashboard


def test_the_file_is_what_the_builder_builds() -> None:
    assert dashboard.PATH.read_text() == dashboard.build(), "run python deploy/collector/grafana/dashboard.py"


def test_every_panel_asks_the_chosen_run_of_the_provisioned_source() -> None:
    made = json.loads(dashboard.build())
    assert len(made["panels"]) == len(dashboard.PANELS)
    for panel in made["panels"]:
        assert panel["datasource"] == {"type": "loki", "uid": "loki"}
        assert all('skyrl_run_id="$run"' in target["expr"] for target in panel["targets"])
