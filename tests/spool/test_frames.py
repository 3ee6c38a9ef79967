"""Frames: what is whole is read, what a kill tore never takes a neighbour with it."""

from hypothesis import example, given
from hypothesis import strategies as st

from skyrl_otel.spool.frames import Frame, Gap, encode, scan

payloads = st.lists(st.binary(max_size=300), max_size=8)


@given(payloads)
def test_whole_frames_are_read_back(given_payloads: list[bytes]) -> None:
    data = b"".join(map(encode, given_payloads))
    assert [item.payload for item in scan(data) if isinstance(item, Frame)] == given_payloads
    assert not any(isinstance(item, Gap) for item in scan(data))


@given(payloads, st.binary(min_size=1, max_size=100), payloads, st.integers(0, 400))
@example([], b"ends as the next begins\xf5", [b"next"], 35)
@example([], b"ends as the next begins\xf5SO1", [b"next"], 35)
def test_a_torn_frame_never_swallows_the_next(before: list[bytes], victim: bytes, after: list[bytes], cut: int) -> None:
    torn = encode(victim)[: cut % len(encode(victim))]
    data = b"".join(map(encode, before)) + torn + b"".join(map(encode, after))
    assert [item.payload for item in scan(data) if isinstance(item, Frame)] == before + after


@given(st.binary(max_size=2000), st.integers(0, 1 << 40))
def test_ranges_are_without_overlap_and_in_order(data: bytes, base: int) -> None:
    position = base
    for item in scan(data, base):
        assert item.start == position
        assert item.end > item.start
        position = item.end
    assert position <= base + len(data)


def test_a_tail_that_may_still_be_written_is_left() -> None:
    whole, next_one = encode(b"first"), encode(b"second")
    for cut in range(len(next_one)):
        items = list(scan(whole + next_one[:cut]))
        assert items == [Frame(0, len(whole), b"first")]
