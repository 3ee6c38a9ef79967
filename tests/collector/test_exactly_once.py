"""Invariant 3, the collector's half: what is sent again and again is stored once, in the rows and in the text."""

import http.client
import random
import sqlite3
import threading
import time
from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skyrl_otel.collector.decode import Row
from skyrl_otel.collector.dedup import Deduplicator
from tests.collector_process import WRITER, CollectorProcess, Line, request, wait_until

SOURCE = f"{WRITER}/out/0"


def lines(*starts: int, source: str = SOURCE) -> list[Line]:
    return [Line(f"line {start}", (start, start + 10), source) for start in starts]


def test_a_batch_that_comes_again_is_dropped_and_counted(collector: CollectorProcess) -> None:
    client = collector.start()
    batch = request(lines(0, 10, 20))

    assert [client.post(batch).status for _ in range(3)] == [200, 200, 200]

    assert collector.rows() == ["line 0", "line 10", "line 20"]
    assert collector.text().count("\n") == 3
    assert collector.meta()["repeats_dropped"] == 6


def test_another_batch_with_some_of_the_same_records_adds_only_the_others(collector: CollectorProcess) -> None:
    client = collector.start()
    client.post(request(lines(0, 10, 20)))

    client.post(request(lines(10, 20, 30)))
    client.post(request([Line("cut", (30, 35)), Line("elsewhere", (30, 40), f"{WRITER}/out/1")]))

    assert collector.rows() == ["line 0", "line 10", "line 20", "line 30", "cut", "elsewhere"]


def test_records_below_the_low_water_mark_are_dropped_and_its_uids_forgotten(collector: CollectorProcess) -> None:
    client = collector.start()
    client.post(request(lines(0, 10, 20)))

    client.post(request(lines(30)), low_water=f"{SOURCE}=20")
    client.post(request(lines(0, 10, 20, 40)), low_water=f"{SOURCE}=10")  # an older checkpoint: the mark does not fall

    assert collector.rows() == ["line 0", "line 10", "line 20", "line 30", "line 40"]
    assert collector.meta().items() >= {"repeats_dropped": 1, "below_low_water_dropped": 2}.items()

    client.post(request(lines(50)), low_water=f"{SOURCE}=50, {WRITER}/err/0=7,nonsense,=,a/b=1")
    collector.kill()
    client = collector.start()
    client.post(request(lines(0, 40, 50, 60)))
    client.post(request(lines(0, 7, source=f"{WRITER}/err/0")))

    assert collector.rows()[5:] == ["line 50", "line 60", "line 7"]


def test_records_without_a_uid_of_ours_are_always_kept(collector: CollectorProcess) -> None:
    client = collector.start()
    foreign = [Line("x"), Line("x", attributes={"log.record.uid": "01ARZ3NDEKTSV4RRFFQ69G5FAV"})]

    client.post(request(foreign))
    client.post(request(foreign))

    assert collector.rows() == ["x"] * 4
    assert collector.rows("attributes")[1] == '{"log.record.uid":"01ARZ3NDEKTSV4RRFFQ69G5FAV"}'


def test_what_was_seen_survives_a_kill(collector: CollectorProcess) -> None:
    batch = request(lines(*range(0, 1000, 10)))
    assert collector.start().post(batch).status == 200
    collector.kill()

    client = collector.start()

    assert client.post(batch).status == 200
    assert len(collector.rows()) == 100
    assert collector.meta()["repeats_dropped"] == 100


def test_the_text_is_cut_to_what_was_committed(collector: CollectorProcess) -> None:
    client = collector.start()
    client.post(request(lines(0)))
    collector.kill()
    (infra,) = collector.log_dir.glob("infra-*.log")
    committed = infra.read_text()
    with infra.open("a") as file:
        file.write("2026-01-01 00:00:00.000 INFO  n p line 10\n2026-01-01 00:00:00.000 IN")

    client = collector.start()

    assert infra.read_text() == committed
    client.post(request(lines(10)))
    assert [line.split(maxsplit=5)[5] for line in infra.read_text().splitlines()] == ["line 0", "line 10"]


@pytest.mark.parametrize("seed", range(3))
def test_invariant_3_killed_at_random_moments_while_senders_repeat_all_is_there_once(
    collector: CollectorProcess, seed: int
) -> None:
    """Ten kills in all; what each sender got a 2xx for, and nothing else, is there once."""
    chance = random.Random(seed)
    url = f"http://{collector.start().host}"
    over = threading.Event()
    resends = [0]
    sent: list[str] = []

    def sender(number: int) -> None:
        client = collector.client(url)
        source = f"{number:032x}/out/0"
        acknowledged = at = 0
        while not over.is_set():
            count = 1 + (at * 7 + number) % 400
            batch = [Line(f"{number} {n}", (n, n + 1), source) for n in range(at, at + count)]
            while True:
                try:
                    answer = client.post(request(batch, {"skyrl.rank": number}), low_water=f"{source}={acknowledged}")
                except (http.client.HTTPException, OSError):
                    resends[0] += 1
                    time.sleep(0.005)
                    continue
                assert answer.status == 200, answer
                break
            sent.extend(line.body for line in batch)
            at += count
            # As an agent's checkpoint: sometimes it is on disk before the next request, sometimes not.
            acknowledged = at if at % 3 else acknowledged

    senders = [threading.Thread(target=sender, args=(number,)) for number in range(3)]
    for thread in senders:
        thread.start()
    for _ in range(4 if seed == 0 else 3):
        time.sleep(chance.uniform(0.02, 0.4))
        collector.kill()
        client = collector.start()
        assert f"http://{client.host}" == url
    over.set()
    for thread in senders:
        thread.join()

    assert resends[0] > 0
    assert sorted(collector.rows()) == sorted(sent)
    assert sorted(line.split(maxsplit=5)[5] for line in collector.text().splitlines()) == sorted(sent)
    assert collector.meta()["records"] == len(sent)
    code, said = collector.stop()
    assert (code, "Traceback" in said) == (0, False)


def test_the_memory_of_repeats_does_not_grow_with_the_run(collector: CollectorProcess) -> None:
    client = collector.start()
    for step in range(50):
        start = step * 1000
        client.post(request(lines(*range(start, start + 1000, 10))), low_water=f"{SOURCE}={start}")

    wait_until(lambda: len(collector.rows()) == 5000, "all rows")
    db = sqlite3.connect(f"file:{collector.store}?mode=ro", uri=True)
    (spans,) = db.execute("SELECT sum(length(spans)) / 16 FROM seen").fetchone()
    db.close()
    assert spans == 100


def row(start: int, end: int, source: str | None) -> Row:
    return Row(1, 0, 0, None, "", f"{start}-{end}", None, None, None, 0, source, start, end)


spans = st.tuples(st.integers(0, 40), st.integers(1, 3)).map(lambda pair: (pair[0], pair[0] + pair[1]))
batches = st.lists(st.tuples(st.lists(st.tuples(st.sampled_from("ab"), spans)), st.integers(0, 40)), max_size=12)


@given(batches)
def test_the_deduplicator_agrees_with_a_set_of_all_uids(
    steps: list[tuple[list[tuple[str, tuple[int, int]]], int]],
) -> None:
    dedup = Deduplicator()
    seen: set[tuple[str, tuple[int, int]]] = set()
    mark = 0
    for records, low_water in steps:
        mark = max(mark, low_water)
        expected, repeats, below = [], 0, 0
        for name, span in records:
            if name == "a" and span[0] < mark:
                below += 1
            elif (name, span) in seen:
                repeats += 1
            else:
                seen.add((name, span))
                expected.append((name, span))

        sifted = dedup.sift([row(*span, name) for name, span in records], {"a": low_water})

        assert [(row.source, (row.start, row.end)) for row in sifted.fresh] == expected
        assert (sifted.repeats, sifted.below_low_water) == (repeats, below)
        assert all(len(pairs) % 2 == 0 for pairs in sifted.spans.values())


@given(batches)
def test_a_deduplicator_restored_from_what_was_stored_goes_on_as_the_first(
    steps: list[tuple[list[tuple[str, tuple[int, int]]], int]],
) -> None:
    first, again = Deduplicator(), Deduplicator()
    stored: dict[str, list[array[int]]] = {"a": [], "b": []}
    marks = {"a": 0, "b": 0}
    for records, low_water in steps:
        rows = [row(*span, name) for name, span in records]
        again = Deduplicator()
        for name, pairs in stored.items():
            again.restore(name, marks[name], pairs)
        expected = first.sift(rows, {"a": low_water})

        found = again.sift(rows, {"a": low_water})

        assert found == expected
        for name, pairs in found.spans.items():
            stored[name].append(pairs)
        marks |= found.low_water
