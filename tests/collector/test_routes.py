"""Which text file a record goes to, by the user's rules; and that no attribute leads out of the log folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skyrl_otel.collector.committer import Committer
from skyrl_otel.collector.decode import Batch, Row
from skyrl_otel.collector.resource import Resource, read_resource
from skyrl_otel.collector.routes import Router, safe
from skyrl_otel.collector.store import Store
from skyrl_otel.collector.text import TextFile
from skyrl_otel.collector.texts import Texts
from skyrl_otel.spool import settings

SPLIT = """
[[route]]
match = { scope = "vllm*", process = "EngineCore*" }
to = "vllm.log"
[[route]]
match = { scope = ["skyrl*", "harbor*", "examples*"] }
to = "skyrl.log"
[[route]]
to = "rest.log"
"""
TREE = """
[[route]]
match = { skyrl.env = "*" }
to = "env_workers/{skyrl.env}/worker_{skyrl.rank}.log"
[[route]]
match = { skyrl.role = ["policy", "trainer"] }
to = "trainer/rank_{skyrl.rank}.log"
"""


def rules(tmp_path: Path, text: str) -> tuple[settings.RouteItem, ...]:
    path = tmp_path / "settings.toml"
    path.write_text(text)
    return settings.read(str(path)).routes


def row(scope: str, body: str, **attributes: Any) -> Row:
    encoded = json.dumps(attributes) if attributes else None
    return Row(1, 1, 9, None, scope, body, None, encoded, None, 0, None, 0, 0)


def resource(**attributes: Any) -> Resource:
    return read_resource({key.replace("__", "."): value for key, value in attributes.items()})


def test_the_split_of_skyrl_and_harbor(tmp_path: Path) -> None:
    router = Router(rules(tmp_path, SPLIT))
    engine = resource(service__instance__id="e", ray__actor__class="AsyncVLLMEngine")
    trainer = resource(service__instance__id="t")
    other = resource(service__instance__id="o")
    routed = [
        (row("vllm.v1.engine", "x"), engine),
        (row("skyrl_otel.text", "(EngineCore pid=7) anything"), engine),
        (row("skyrl_otel.text", "native words"), engine),
        (row("skyrl.trainer", "x"), trainer),
        (row("skyrl_otel.text", "printed"), trainer),
        (row("examples.gsm8k", "x"), engine),
        (row("skyrl_otel.text", "nobody's"), other),
        (row("ray.data", "x"), trainer),
    ]
    assert [router.route(*pair) for pair in routed] == [
        "vllm.log",
        "vllm.log",
        "vllm.log",
        "skyrl.log",
        "skyrl.log",
        "skyrl.log",
        "rest.log",
        "rest.log",
    ]


def test_a_tree_by_component_and_rank(tmp_path: Path) -> None:
    router = Router(rules(tmp_path, TREE))
    policy = resource(skyrl__role="policy", skyrl__rank=3)
    env = resource(skyrl__rank=1)
    assert router.route(row("a", "x"), policy) == "trainer/rank_3.log"
    assert (
        router.route(row("a", "x", **{"skyrl.env": "../../etc/passwd"}), env)
        == "env_workers/_.._etc_passwd/worker_1.log"
    )
    assert router.route(row("a", "x"), env) is None


@given(st.text())
def test_no_value_leads_out_of_its_folder(value: str) -> None:
    name = safe(value)
    assert name and "/" not in name and "\0" not in name and name not in (".", "..") and len(name) <= 80


def test_routed_files_are_written_beside_the_channels(tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    store = Store(tmp_path / "store.db", run_id="r")
    channels = {name: TextFile(logs / f"{name}.log", 0) for name in ("infra", "progress")}
    router = Router(rules(tmp_path, TREE))
    committer = Committer(store, Texts(channels, logs, {}), max_bytes=1 << 40, say=print, router=router)
    committer.start()
    owners = (resource(skyrl__role="policy", skyrl__rank=0), resource(skyrl__channel="progress"))
    rows = tuple(row("a", f"line {n}")._replace(resource=n % 2) for n in range(10))
    for _ in range(2):
        committer.submit(Batch(owners, rows, {})).result(30)
    committer.stop(30)
    assert len((logs / "trainer" / "rank_0.log").read_text().splitlines()) == 10
    assert len((logs / "progress.log").read_text().splitlines()) == 10 and not (logs / "infra.log").read_text()
    lengths = {key: length for key, (_, length) in store.texts().items()}
    assert lengths["route:trainer/rank_0.log"] == (logs / "trainer" / "rank_0.log").stat().st_size
    store.close()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[[route]]\nto = '/etc/passwd'", "below the log folder"),
        ("[[route]]\nto = 'a/../../b'", "below the log folder"),
        ("[[route]]\nmatch = 'x'\nto = 'b'", "match='x'"),
        ("[[routes]]\nto = 'b'", "'routes' is no setting"),
        ("route = 3", "list of tables"),
        ("[[route", "cannot be read"),
    ],
)
def test_a_bad_file_is_refused_with_its_key_and_the_way_out(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(settings.SettingsError, match=says):
        rules(tmp_path, text)
