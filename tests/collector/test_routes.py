"""Which text file a record goes to, by the user's rules; and that no attribute leads out of the log folder."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skyrl_otel.collector.committer import Committer, Unavailable
from skyrl_otel.collector.decode import BadRequest, Batch, Row
from skyrl_otel.collector.resource import Resource, read_resource
from skyrl_otel.collector.routes import Router, safe
from skyrl_otel.collector.store import Store
from skyrl_otel.collector.text import TextFile
from skyrl_otel.collector.texts import Texts
from skyrl_otel.spool import settings

TEXT = "skyrl_otel.text"
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
    stream = "stdout" if scope == TEXT else None
    return Row(1, 1, 9, None, scope, body, stream, encoded, attributes.get("event.name"), 0, None, 0, 0)


def resource(**attributes: Any) -> Resource:
    return read_resource({key.replace("__", "."): value for key, value in attributes.items()})


def test_the_split_of_skyrl_and_harbor(tmp_path: Path) -> None:
    router = Router(rules(tmp_path, SPLIT))
    engine = resource(service__instance__id="e", ray__actor__class="AsyncVLLMEngine")
    trainer = resource(service__instance__id="t")
    other = resource(service__instance__id="o")
    routed = [
        (row("vllm.v1.engine", "x"), engine),
        (row(TEXT, "(EngineCore pid=7) anything"), engine),
        (row(TEXT, "native words"), engine),
        (row("skyrl.trainer", "x"), trainer),
        (row(TEXT, "printed"), trainer),
        (row("examples.gsm8k", "x"), engine),
        (row(TEXT, "nobody's"), other),
        (row("ray.data", "x"), trainer),
    ]
    assert [router.route(*pair).path for pair in routed] == [
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
    assert router.route(row("a", "x"), policy) == ("trainer/rank_3.log", "")
    escaping = row("a", "x", **{"skyrl.env": "../../etc/passwd"})
    assert router.route(escaping, env) == ("env_workers/_.._etc_passwd/worker_1.log", "")
    assert router.route(row(TEXT, "x"), env) == (None, ""), "rules by attributes alone need not wait for anything"


class Site:
    """A collector's committer that can be killed and started again."""

    def __init__(self, root: Path, text: str) -> None:
        self.logs = root / "logs"
        self.logs.mkdir()
        self._root, self._rules = root, rules(root, text)
        self.start()

    def start(self) -> None:
        self._store = Store(self._root / "store.db", run_id="r")
        known = self._store.texts()
        channels = {
            name: TextFile(self.logs / f"{name}.log", known.get(name, (None, 0))[1]) for name in ("infra", "progress")
        }
        texts = Texts(channels, self.logs, known)
        router = Router(self._rules)
        self.committer = Committer(self._store, texts, max_bytes=1 << 40, say=print, router=router)
        self.committer.start()

    def add(self, owner: Resource, *rows: Row) -> None:
        self.committer.submit(Batch((owner,), rows, {})).result(30)

    def die(self) -> None:
        """The store as a kill leaves it; nothing that waits is settled."""
        self.committer._router.give_up = lambda before_s: None  # type: ignore[method-assign]
        self.stop()

    def stop(self) -> None:
        self.committer.stop(30)
        self._store.close()

    def bodies(self, name: str) -> list[str]:
        path = self.logs / name
        return [line.split()[-1] for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = Site(tmp_path, SPLIT)
    yield site
    site.stop()


def test_what_an_engine_prints_before_its_first_record_is_in_its_file(site: Site) -> None:
    engine = resource(service__instance__id="e", host__name="h", process__pid=7)
    early = resource(service__instance__id="before-it-was-an-actor", host__name="h", process__pid=7)
    site.add(early, row(TEXT, "native-0"))
    site.add(engine, row(TEXT, "native-1"), row("c10", "native-2")._replace(stream="stderr"))
    assert not site.bodies("rest.log") and not site.bodies("vllm.log")
    site.add(engine, row(TEXT, "native-3"), row("vllm.platforms", "platform"), row("skyrl.server", "ready"))
    site.add(engine, row(TEXT, "native-4"), row("ray.data", "other"))
    assert site.bodies("vllm.log") == ["native-0", "native-1", "native-2", "native-3", "platform", "native-4"]
    assert site.bodies("skyrl.log") == ["ready"] and site.bodies("rest.log") == ["other"]


def test_what_waits_survives_a_kill_and_goes_on_in_the_next_life(site: Site) -> None:
    engine, other = resource(service__instance__id="e", process__pid=7), resource(service__instance__id="o")
    site.add(engine, row(TEXT, "native-0"))
    site.add(other, row(TEXT, "nobodys"))
    site.die()
    site.start()
    site.add(engine, row(TEXT, "native-1"), row("vllm.platforms", "platform"))
    assert site.bodies("vllm.log") == ["native-0", "native-1", "platform"] and not site.bodies("rest.log")


def test_a_batch_that_cannot_be_stored_leaves_waiting_what_waited(site: Site) -> None:
    engine = resource(service__instance__id="e", process__pid=7)
    site.add(engine, row(TEXT, "native-0"))
    broken = row("vllm.x", "platform")._replace(time=object())  # type: ignore[arg-type]
    with pytest.raises(BadRequest):
        site.add(engine, broken)
    assert not site.bodies("vllm.log")
    site.add(engine, row("vllm.x", "platform"))
    assert site.bodies("vllm.log") == ["native-0", "platform"]


def test_lines_of_a_process_that_no_record_places_wait_for_its_end_at_most(site: Site) -> None:
    mute = resource(service__instance__id="m", process__pid=8)
    site.add(mute, row(TEXT, "printed"))
    assert not site.bodies("rest.log")
    end = row("skyrl_otel.agent", "ended", **{"event.name": "skyrl.process.end"})
    site.add(mute, end)
    assert site.bodies("rest.log") == ["printed", "ended"]
    site.add(mute, row(TEXT, "late"))
    assert site.bodies("rest.log") == ["printed", "ended", "late"]


def test_lines_wait_until_the_run_ends_at_most_and_five_minutes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = Site(tmp_path, SPLIT)
    site.add(resource(service__instance__id="m", process__pid=8), row(TEXT, "printed"))
    site.stop()
    assert site.bodies("rest.log") == ["printed"]
    site.start()
    monkeypatch.setattr("skyrl_otel.collector.committer.WAIT_S", -1.0)
    site.add(resource(service__instance__id="n", process__pid=9), row(TEXT, "waited"))
    site.add(resource(service__instance__id="n", process__pid=9), row(TEXT, "at-once"))
    assert site.bodies("rest.log") == ["printed", "waited", "at-once"]
    site.stop()


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
