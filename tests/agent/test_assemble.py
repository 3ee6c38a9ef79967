"""Lines from bytes: the same pieces at any chunk boundary, every byte in exactly one of them."""

from hypothesis import given, settings
from hypothesis import strategies as st

from skyrl_otel.agent.assemble import PART_BYTES, Piece, State, split

# Bytes that meet each branch often: terminators, prefixes of children, broken and whole UTF-8.
texts = st.lists(
    st.sampled_from(
        [b"\n", b"\r\n", b"\r", b"a", b"bc", b"(A pid=1) ", b"(B pid=22) ", b" pid=", b"\xff", "é€🙂".encode(), b"\0"]
    ),
    max_size=60,
).map(b"".join)


def stream(data: bytes, chunk_ends: list[int], cuts: list[int], part_bytes: int) -> list[Piece]:
    """Feed `data` in chunks, as an agent does that reads from the start of what is incomplete."""
    pieces: list[Piece] = []
    state, position = State(), 0
    for end in [*chunk_ends, len(data)]:
        if end <= position:
            continue
        found, state = split(data[position:end], position, state, cuts, part_bytes)
        state = State.from_json(state.to_json())
        if found:
            pieces += found
            position = found[-1].end
    return pieces


@settings(max_examples=400)
@given(texts, st.data(), st.sampled_from([4, 9, 50, PART_BYTES]))
def test_chunks_do_not_matter(data: bytes, choice: st.DataObject, part_bytes: int) -> None:
    offsets = st.lists(st.integers(0, len(data)), max_size=6).map(lambda xs: sorted(set(xs)))
    chunk_ends, cuts = choice.draw(offsets), choice.draw(offsets)
    # A cut is only ever decided at the end of what was seen, so no piece can have passed it before.
    whole = stream(data, cuts, cuts, part_bytes)
    pieces = stream(data, sorted({*chunk_ends, *cuts}), cuts, part_bytes)
    assert pieces == whole


@given(texts, st.sampled_from([4, 9, 50]))
def test_every_byte_is_in_one_piece(data: bytes, part_bytes: int) -> None:
    data += b"\n"
    position = 0
    for piece in stream(data, [], [len(data)], part_bytes):
        assert piece.start == position
        raw = data[piece.start : piece.end]
        assert raw.startswith(piece.body)
        assert raw[len(piece.body) :].strip(b"\r\n") == b""
        position = piece.end
    assert position == len(data)


def test_lines_and_what_is_left() -> None:
    pieces, state = split(b"one\ntwo\r\n\npart", 100, State())
    assert pieces == [
        Piece(100, 104, b"one", -1, False, False),
        Piece(104, 109, b"two", -1, False, False),
        Piece(109, 110, b"", -1, False, False),
    ]
    assert state == State()


def test_a_partial_line_is_cut_and_continued() -> None:
    pieces, _ = split(b"loading... done\n", 0, State(), [11])
    assert pieces == [Piece(0, 11, b"loading... ", 0, False, False), Piece(11, 16, b"done", 1, True, False)]


def test_a_megabyte_is_parts_that_fit_loki() -> None:
    line = "é".encode() * (1 << 19)
    pieces, _ = split(line + b"\n", 0, State())
    assert b"".join(piece.body for piece in pieces) == line
    assert all(len(piece.body.decode().encode()) <= PART_BYTES for piece in pieces)
    assert [piece.part for piece in pieces] == list(range(len(pieces)))
    assert [piece.last for piece in pieces] == [False] * (len(pieces) - 1) + [True]


def test_parts_fit_although_replacement_characters_are_longer() -> None:
    pieces, _ = split(b"\xff" * (1 << 20) + b"\n", 0, State())
    assert all(len(piece.body.decode("utf-8", "replace").encode()) <= PART_BYTES for piece in pieces)


def test_a_line_cut_by_another_child_is_marked_and_whole() -> None:
    data = (
        b"(Engine pid=1) first\n(Worker pid=2) second\n"
        b"(Engine pid=1) half of (Worker pid=2) the other's line\nthe line\n(Engine pid=1) third\n"
    )
    pieces, state = split(data, 0, State(), [len(data)])
    assert [(piece.body, piece.torn) for piece in pieces] == [
        (b"(Engine pid=1) first", False),
        (b"(Worker pid=2) second", False),
        (b"(Engine pid=1) half of ", True),
        (b"(Worker pid=2) the other's line", True),  # what follows has no prefix: its end may be another's
        (b"the line", True),
        (b"(Engine pid=1) third", False),
    ]
    assert b"".join(data[p.start : p.end] for p in pieces) == data
    assert state.tears


def test_a_prefix_quoted_by_its_own_child_or_unknown_is_no_tear() -> None:
    data = b"(A pid=1) started (A pid=1) again\n(A pid=1) talks about (Nobody pid=9) here\nplain (A pid=1) words\n"
    assert not any(piece.torn for piece in split(data, 0, State())[0])


def block_buffered(lines: list[bytes], block: int) -> list[bytes]:
    """The writes of a child whose stdio buffers by blocks."""
    data = b"".join(lines)
    return [data[start : start + block] for start in range(0, len(data), block)]


@settings(max_examples=300)
@given(
    st.integers(40, 200), st.integers(40, 200), st.randoms(use_true_random=False), st.sampled_from([64, 333, 1 << 20])
)
def test_block_buffered_children_on_one_fd_are_marked(block_a: int, block_b: int, random: object, chunk: int) -> None:
    """Two children of which each announced itself once, then write blocks in any order."""
    lines = {name: [b"(%b pid=%d) says %d\n" % (name, len(name), n) for n in range(40)] for name in (b"A", b"Bee")}
    writes = {b"A": block_buffered(lines[b"A"], block_a), b"Bee": block_buffered(lines[b"Bee"], block_b)}
    data = b"(A pid=1) here\n(Bee pid=3) here\n"
    boundaries = sum(map(len, writes.values()))
    while any(writes.values()):
        name = random.choice([name for name, left in writes.items() if left])  # type: ignore[attr-defined]
        data += writes[name].pop(0)
    pieces: list[Piece] = []
    state, position = State(), 0
    for end in range(chunk, len(data) + chunk, chunk):
        end = min(end, len(data))
        found, state = split(data[position:end], position, state, [len(data)] if end == len(data) else [])
        state = State.from_json(state.to_json())
        pieces += found
        position = found[-1].end if found else position
    assert b"".join(data[piece.start : piece.end] for piece in pieces) == data
    whole = {line.rstrip(b"\n") for group in lines.values() for line in group}
    intact = whole & set(data.split(b"\n"))
    evidence = next((piece.start for piece in pieces if piece.torn), len(data))
    unmarked = {piece.body for piece in pieces if not piece.torn and piece.start > evidence}
    assert unmarked <= whole, "a fragment is not marked"
    marked_whole = [piece.body for piece in pieces if piece.torn and piece.body in intact]
    assert len(marked_whole) <= boundaries, "whole lines are marked although nothing is near them"


def test_a_cut_further_on_and_what_follows_a_cut_say_nothing_of_a_line() -> None:
    """What was sent before a cut, and is read again in a larger piece, must be the same bytes."""
    state = State(children=(b"(A pid=1) ", b"(B pid=2) "), tears=True)
    a, b = b"(A pid=1) a\n", b"(B pid=2) b\n"
    far = len(a + b) + 500
    alone, _ = split(a, 0, state, [far])
    assert alone == [], "it waits for the line after it, however far a cut is"
    together, _ = split(a + b, 0, state, [far])
    assert [piece.torn for piece in together] == [True]
    released, _ = split(a, 0, state, [len(a)])
    again, _ = split(a + b, 0, state, [len(a), len(a + b)])
    assert [released[0].torn, again[0].torn] == [False, False]
