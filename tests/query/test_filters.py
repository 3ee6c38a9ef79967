"""What a reader asks for finds what it says, in order; what cannot be understood is named."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skyrl_otel.query.filters import Filter, FilterError, parse_choice, parse_grep, parse_since
from skyrl_otel.query.merge import merge
from skyrl_otel.query.sources import StoreSource
from tests.collector_process import SECOND, START, Line, request
from tests.stores import make_store

POLICY = {"skyrl.role": "policy", "host.name": "node-a", "ray.node.id": "aa11", "skyrl.channel": "infra"}
ENGINE = {
    "skyrl.role": "rollout",
    "host.name": "node-b",
    "ray.actor.id": "0badc0de77",
    "ray.actor.name": "engine[1]",
    "ray.actor.class": "RolloutEngine",
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    at = iter(range(1, 100))

    def line(body: object, **facts: object) -> Line:
        return Line(body, time=START + next(at) * SECOND, **facts)  # type: ignore[arg-type]

    return make_store(
        tmp_path_factory.mktemp("store") / "store.db",
        [
            request([line("p0 out"), line("p0 err Error", stream="stderr")], {**POLICY, "skyrl.rank": 0}),
            request([line("p1 out"), line({"event": "Error in a map"})], {**POLICY, "skyrl.rank": 1}),
            request([line("engine says\nTraceback")], ENGINE),
            request([line("driver", stream="")], {"skyrl.role": "driver", "skyrl.channel": "progress"}),
        ],
    )


ALL = ["p0 out", "p0 err Error", "p1 out", {"event": "Error in a map"}, "engine says\nTraceback", "driver"]


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (Filter(), ALL),
        (Filter(role="policy"), ALL[:4]),
        (Filter(role="ro*"), ALL[4:5]),
        (Filter(role="policy", rank=1), ALL[2:4]),
        (Filter(rank=0), ALL[:2]),
        (Filter(actor="0badc0"), ALL[4:5]),
        (Filter(actor="engine[1]"), ALL[4:5]),
        (Filter(actor="engine*"), ALL[4:5]),
        (Filter(actor="RolloutEngine"), ALL[4:5]),
        (Filter(actor="*Engine"), ALL[4:5]),
        (Filter(actor="badc"), []),
        (Filter(actor="%"), []),
        (Filter(node="node-b"), ALL[4:5]),
        (Filter(node="node-?"), ALL[:5]),
        (Filter(node="aa"), ALL[:4]),
        (Filter(channel="progress"), ALL[5:]),
        (Filter(channel="infra"), ALL[:5]),
        (Filter(stream="stderr"), ALL[1:2]),
        (Filter(grep=re.compile("Error|Traceback")), [ALL[1], ALL[3], ALL[4]]),
        (Filter(grep=re.compile("^p. out$")), [ALL[0], ALL[2]]),
        (Filter(since_unix_nano=START + 5 * SECOND), ALL[4:]),
        (Filter(limit=2), ALL[4:]),
        (Filter(limit=0), []),
        (Filter(limit=99), ALL),
        (Filter(role="policy", limit=1), ALL[3:4]),
        (Filter(role="policy", stream="stdout", grep=re.compile("p"), limit=5), [ALL[0], ALL[2], ALL[3]]),
    ],
)
def test_filters(store: Path, wanted: Filter, expected: list[object]) -> None:
    assert [record.body for record in StoreSource(store).read(wanted)] == [
        body
        for body in expected
        if not (wanted.grep and wanted.stream and isinstance(body, dict) and "p" not in str(body))
    ]


def test_order_is_time_then_writer_then_file_then_place(tmp_path: Path) -> None:
    first, second = "a" * 32, "b" * 32
    lines = [
        Line("5", (0, 9), f"{second}/out/0", START + 1),
        Line("4", (10, 20), f"{first}/out/1", START + 1),
        Line("3", (9, 10), f"{first}/out/1", START + 1),
        Line("2", (50, 60), f"{first}/out/0", START + 1),
        Line("1", (70, 80), f"{first}/err/0", START + 1),
        Line("0", (99, 100), f"{second}/out/0", START),
    ]
    store = make_store(tmp_path / "store.db", [request([line]) for line in lines])

    assert [record.body for record in StoreSource(store).read(Filter())] == list("012345")
    assert [record.body for record in StoreSource(store).read(Filter(limit=3))] == list("345")
    again = [StoreSource(store).read(Filter()) for _ in range(2)]
    assert [record.body for record in merge(*again)] == list("001122334455")


@given(st.lists(st.integers(0, 3), max_size=40), st.integers(1, 5), st.integers(0, 45))
def test_pages_neither_lose_nor_repeat(
    tmp_path_factory: pytest.TempPathFactory, times: list[int], page: int, limit: int
) -> None:
    lines = [Line(str(n), (n, n + 1), time=START + time) for n, time in enumerate(times)]
    requests = [request([line], {"skyrl.rank": n % 3}) for n, line in enumerate(lines)]
    store = make_store(tmp_path_factory.mktemp("pages") / "store.db", requests)
    expected = [line.body for line in sorted(lines, key=lambda line: (line.time, line.span))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("skyrl_otel.query.sources._PAGE", page)

        assert [record.body for record in StoreSource(store).read(Filter())] == expected
        assert [record.body for record in StoreSource(store).read(Filter(limit=limit))] == (
            expected[-limit:] if limit else []
        )


def test_since() -> None:
    now = START

    assert parse_since("10m", now) == now - 600 * SECOND
    assert parse_since(" 1.5H ", now) == now - 5400 * SECOND
    assert parse_since("2026-09-21T14:13:20Z") == START
    assert parse_since("2026-09-21 14:13:20+00:00") == START
    for bad in ("", "yesterday", "10", "-5m", "10 parsecs", "2026-13-01"):
        with pytest.raises(FilterError, match="write 30s, 10m"):
            parse_since(bad, now)


def test_what_is_wrong_is_named() -> None:
    with pytest.raises(FilterError, match=r"--grep '\(' is no regular expression: missing \), .*position 0.*backslash"):
        parse_grep("(")
    with pytest.raises(FilterError, match="--stream 'out' is none of stdout, stderr"):
        parse_choice("--stream", "out", "stdout", "stderr")
