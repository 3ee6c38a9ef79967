"""Which text file a record goes to, by the user's rules; and that no attribute leads out of the log folder."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skyrl_otel.collector.committer import Committer, Unavailable
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


class Life:
    """One life of a collector's committing part, in this process."""

    def __init__(self, folder: Path, text: str) -> None:
        self.logs = folder / "logs"
        self.logs.mkdir(exist_ok=True)
        self.store = Store(folder / "store.db", run_id="r")
        channels = {name: TextFile(self.logs / f"{name}.log", 0) for name in ("infra", "progress")}
        router = Router(rules(folder, text))
        router.restore(self.store.followed())
        texts = Texts(channels, self.logs, self.store.texts())
        self.committer = Committer(self.store, texts, max_bytes=1 << 40, say=print, router=router)
        self.committer.start()

    def take(self, *rows: Row, owner: Resource) -> None:
        self.committer.submit(Batch((owner,), rows, {})).result(30)

    def end(self) -> None:
        self.committer.stop(30)
        self.store.close()


def uid(start: int, body: str) -> Row:
    return row("skyrl_otel.text", body)._replace(source=f"{'0' * 32}/out/0", start=start, end=start + 1)


@pytest.mark.parametrize("before", ["", "of another run\n"])
def test_the_first_lines_of_a_new_file_stand_once_after_a_kill(tmp_path: Path, before: str) -> None:
    owner, path = resource(skyrl__role="policy", skyrl__rank=0), tmp_path / "logs" / "trainer" / "rank_0.log"
    path.parent.mkdir(parents=True)
    if before:
        path.write_text(before)
    child = os.fork()
    if child == 0:
        append = TextFile.append

        def and_die(file: TextFile, data: bytes) -> None:
            append(file, data)
            os.kill(os.getpid(), signal.SIGKILL)

        pytest.MonkeyPatch().setattr(TextFile, "append", and_die)
        Life(tmp_path, TREE).take(uid(0, "one"), owner=owner)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL and path.read_text().endswith("one\n")
    life = Life(tmp_path, TREE)
    life.take(uid(0, "one"), uid(1, "two"), owner=owner)
    life.end()
    text = path.read_text()
    assert text.startswith(before) and [line.split()[-1] for line in text[len(before) :].splitlines()] == ["one", "two"]


def test_the_next_life_knows_whom_a_writers_lines_follow(tmp_path: Path) -> None:
    engine = resource(service__instance__id="e", ray__actor__class="AsyncVLLMEngine")
    life = Life(tmp_path, SPLIT)
    life.take(row("vllm.v1.engine", "scoped"), owner=engine)
    life.end()
    life = Life(tmp_path, SPLIT)
    life.take(row("skyrl_otel.text", "native"), owner=engine)
    life.end()
    # Where the user changed the rules meanwhile, a writer follows the same rule, wherever that stands now, or none.
    other = '[[route]]\nmatch = { scope = "x" }\nto = "x.log"\n'
    for text in (other + SPLIT, other):
        life = Life(tmp_path, text)
        life.take(row("skyrl_otel.text", "native"), owner=engine)
        life.end()
    lines = [line.split()[-1] for line in (tmp_path / "logs" / "vllm.log").read_text().splitlines()]
    assert lines == ["scoped", "native", "native"]


def test_memory_that_is_short_is_no_fault_of_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    life, owner = Life(tmp_path, TREE), resource(skyrl__channel="progress")
    with monkeypatch.context() as patch:
        patch.setattr(TextFile, "append", lambda *_: (_ for _ in ()).throw(MemoryError))
        with pytest.raises(Unavailable, match="memory"):  # 503: the agent keeps it; a 400 would be given up
            life.take(uid(0, "one"), owner=owner)
    life.take(uid(0, "one"), owner=owner)
    life.end()
    assert (tmp_path / "logs" / "progress.log").read_text().count("one") == 1


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
