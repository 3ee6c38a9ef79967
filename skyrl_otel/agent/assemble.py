"""Bytes to lines, streaming, with the same result at any chunk boundary.

`split` is a pure function of the bytes, the offset they begin at, the journaled cuts and the state at their start. This is
the seam for recognised formats: what they need to know of earlier lines goes into `State`, which the checkpoint keeps.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

PART_BYTES = 256 * 1024
"""Loki's default limit of a line (`max_line_size`); a longer line becomes parts."""

WHOLE_BYTES = (
    PART_BYTES // 3
)  # a line up to this is never cut: each byte that is not UTF-8 becomes the 3 bytes of U+FFFD

# What vLLM's formatter (envs.VLLM_LOGGING_PREFIX, "(EngineCore pid=28789) ") puts before every line of a child.
CHILD = re.compile(rb"\((?P<name>[A-Za-z_][\w.-]{0,40}) pid=(?P<pid>\d{1,10})\) ")


class Piece(NamedTuple):
    """A line, or a part of one, in the byte range [start, end) of its file.

    `body` is without terminator. `part` is -1 for a whole line, else the part's number; `last` says that the line ends here.
    `torn`: another process's write cut this line.
    """

    start: int
    end: int
    body: bytes
    part: int
    last: bool
    torn: bool


@dataclass(frozen=True, slots=True)
class State:
    """What must be known of the bytes before: parts of the open line so far, children seen, whether they tear lines.

    `carry` is what `redact` must know of the part before. `claimed` are ranges of whole lines further on that belong to
    events that began before.
    """

    part: int = 0
    children: tuple[bytes, ...] = ()
    tears: bool = False
    carry: bytes = b""
    claimed: tuple[tuple[int, int], ...] = ()

    def to_json(self) -> list[object] | None:
        if self == State():
            return None
        children = [child.decode("latin-1") for child in self.children]
        fields: list[object] = [self.part, children, self.tears, self.carry.decode("latin-1")]
        return [*fields, [list(taken) for taken in self.claimed]] if self.claimed else fields

    @classmethod
    def from_json(cls, fields: list[object] | None) -> State:
        if fields is None:
            return cls()
        part, children, tears, carry, *more = fields
        assert isinstance(part, int) and isinstance(children, list) and isinstance(carry, str)
        claimed = more[0] if more else []
        assert isinstance(claimed, list)
        known = tuple(child.encode("latin-1") for child in children)
        return cls(part, known, bool(tears), carry.encode("latin-1"), tuple((a, b) for a, b in claimed))


def split(
    data: bytes,
    base: int,
    state: State,
    cuts: Sequence[int] = (),
    part_bytes: int = PART_BYTES,
    max_pieces: int = 1 << 30,
) -> tuple[list[Piece], State]:
    """The pieces that are complete in `data`.

    Args:
        data: bytes of the file; the first is the first of a line or, if `state.part`, of a line's next part.
        base: the file offset of the first byte.
        state: the state there.
        cuts: offsets, ascending, where a partial line was decided to end.
        part_bytes: longest piece.
        max_pieces: stop after about so many; the state is the one there.

    Returns:
        The pieces, without a gap from `base` on, and the state at the last one's end. What follows it is incomplete.
    """
    pieces: list[Piece] = []
    append = pieces.append
    find = data.find
    position = 0
    part = state.part
    limits = [cut - base for cut in cuts if base < cut <= base + len(data)]
    limits.reverse()
    while len(pieces) < max_pieces:
        newline = find(b"\n", position)
        end = newline + 1 if newline >= 0 else len(data)
        terminated = newline >= 0
        while limits and limits[-1] <= position:
            limits.pop()
        if limits and limits[-1] < end + (not terminated):
            end, terminated = limits[-1], False
            closed = True
        else:
            closed = terminated
        stop = end - 1 if terminated else end
        if stop - position > WHOLE_BYTES or part_bytes != PART_BYTES:
            size = _part_size(data, position, stop, closed, part_bytes)
            if size is None:
                break
            if size < stop - position:
                stop = end = position + size
                terminated = False
                closed = True
        if not closed:
            break
        if end == position:
            break
        body = data[position:stop]
        if terminated:
            if body[-1:] == b"\r":
                body = body[:-1]
            append(Piece(base + position, base + end, body, part if part else -1, part > 0, False))
            part = 0
        else:
            append(Piece(base + position, base + end, body, part, False, False))
            part += 1
        position = end
    if state.children or b" pid=" in data:
        kept, marked = _mark_torn(pieces, state, cuts)
        if pieces and (not kept or kept[-1].end < pieces[-1].end):
            part = max(pieces[-1].part, 0)  # that one waits: the next reading begins with it
        return kept, replace(marked, part=part)
    return pieces, replace(state, part=part) if part != state.part else state


def _part_size(data: bytes, position: int, stop: int, closed: bool, limit: int) -> int | None:
    """How much of a long run is the next part; its whole length if it fits, None if more must be seen to tell."""
    length = stop - position
    if not closed and length <= limit:
        return None
    run = data[position : position + min(length, limit)]
    if length > limit:
        run = run[: _character_end(data, position, limit)]
    try:
        run.decode()
    except UnicodeDecodeError:
        broken = max(limit // 3, 1)
        return length if length <= broken else broken
    return len(run) if length > limit else length


def _character_end(data: bytes, position: int, limit: int) -> int:
    # Not in the middle of a UTF-8 character: step back over continuation bytes, at most three.
    for back in range(4):
        if limit - back > 0 and data[position + limit - back] & 0xC0 != 0x80:
            return limit - back
    return limit


_MOST_CHILDREN = 64


def _mark_torn(pieces: list[Piece], state: State, cuts: Sequence[int]) -> tuple[list[Piece], State]:
    """Find lines that children who share one fd wrote into each other; `torn` is said of each fragment.

    Children that buffer by blocks end a write in the middle of a line. Another child's prefix in the middle of a line that
    began with a prefix, or with the beginning of one, is the evidence: the line is two pieces. From then on the stream is
    known to tear, and two more fragments are marked: a line without prefix (the rest of one), and the last line before
    one that is not the same child's (a rest may be glued to it). To know that one, each line waits for the one after it.
    The bytes tell no more; the first glued line before the first evidence stays unmarked.

    Args:
        pieces: lines in order.
        state: before them.
        cuts: a line that ends at a journaled cut did not wait, so what follows says nothing of it.
    """
    children = dict.fromkeys(state.children)
    tears = state.tears
    released = set(cuts)
    result: list[Piece] = []
    before_last = 0
    last_owner: bytes | None = None
    for piece in pieces:
        first = CHILD.match(piece.body) if piece.part <= 0 else None
        owner = first[0] if first else None
        if tears and last_owner is not None and owner != last_owner and result[-1].end not in released:
            result[-1] = result[-1]._replace(torn=True)
        before_last = len(result)
        rest = piece
        if owner is not None:
            _remember(children, owner)
        position = first.end() if first else 0
        while second := CHILD.search(rest.body, position):
            position = second.end()
            before = rest.body[: second.start()]
            if not before:  # the rest of a line, which in truth is another child's from its first byte on
                owner = second[0]
            if second[0] == owner or second[0] not in children:
                continue
            if owner is None and not tears and not _begun(children, before):
                continue
            tears = True
            middle = rest.start + second.start()
            result.append(Piece(rest.start, middle, before, rest.part, rest.last, True))
            rest = rest._replace(start=middle, body=rest.body[second.start() :])
            owner, position = second[0], second.end() - second.start()
        result.append(rest._replace(torn=tears and owner is None and piece.part <= 0))
        last_owner = owner
    known = replace(state, children=tuple(children), tears=tears)
    if tears and last_owner is not None and result[-1].end not in released:
        return result[:before_last], known
    return result, known


def _begun(children: dict[bytes, None], text: bytes) -> bool:
    """Whether some child was cut in the middle of its prefix, after `text`."""
    return bool(text) and any(child.startswith(text) for child in children)


def remembered(children: tuple[bytes, ...], owner: bytes) -> tuple[bytes, ...]:
    """`children` and `owner`; of too many the first is forgotten."""
    known = dict.fromkeys(children)
    _remember(known, owner)
    return tuple(known)


def _remember(children: dict[bytes, None], owner: bytes) -> None:
    if owner not in children:
        children[owner] = None
        if len(children) > _MOST_CHILDREN:
            children.pop(next(iter(children)))
