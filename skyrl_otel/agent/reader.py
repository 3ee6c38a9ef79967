"""Blocks of a text file to records.

The common block is whole lines, most of which have a header that was met before: those cost a look-up of the header and one
formatting of bytes (`Fast`). A line that is not known takes the slow way through `_Block.line`, which knows everything; a
block with cuts, parts or torn lines goes that way altogether. Both ways give the same records: the tests hold them against
each other.

Records are a pure function of the bytes, the state at their start and the decisions; what a `Reader` keeps is a cache.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

from skyrl_otel.agent import assemble
from skyrl_otel.agent.assemble import Piece, State
from skyrl_otel.agent.block import Block, Context, Odd, Result
from skyrl_otel.agent.events import TRIGGER
from skyrl_otel.agent.fast import Fast
from skyrl_otel.agent.find import has
from skyrl_otel.agent.recognise import Recogniser
from skyrl_otel.agent.redact import Redactor
from skyrl_otel.spool.decisions import Decision


class View(NamedTuple):
    """The decisions about one file, each list by offset."""

    marks: Sequence[Decision]
    identities: Sequence[Decision]
    cuts: list[int]
    zones: Sequence[Decision]
    echoes: Sequence[Decision] = ()
    """Where echoes begin and end there are cuts."""


@lru_cache(1)
def _shared() -> Recogniser:
    # Of all streams, for it remembers nothing that belongs to one; a thousand of them would take 60 MB.
    return Recogniser()


class Reader:
    """Reads one text file of a writer, block after block.

    Args:
        prefix: writer, file and generation as in a uid, "/" included.
        attributes: those of every line, encoded.
        skip_markers: leave out Ray's markers and our pointer line.
        redactor: the rules by which secrets are masked, before anything else is made of the bytes.
    """

    def __init__(
        self,
        prefix: bytes,
        attributes: bytes,
        *,
        skip_markers: bool = False,
        fast: bool = True,
        redactor: Redactor | None = None,
    ) -> None:
        self._redactor = redactor or Redactor()
        self._prefix = prefix
        self._attributes = attributes
        self._skip_markers = skip_markers
        self._recogniser = _shared()
        self._may_be_fast = fast
        self._next: tuple[int, State] | None = None
        self._fast = Fast(prefix, self._recogniser)

    def read(
        self, data: bytes, base: int, state: State, view: View, *, most: int = 1 << 30, one: bool = False
    ) -> Result:
        """The records that are complete in `data`.

        Args:
            data: bytes of the file from offset `base` on, where the last result ended, with its state.
            most: stop after about so many lines.
            one: stop at the first line at which nothing is open; for an event that is larger than a block.
        """
        if (base, state) != self._next:
            self._fast.clear()  # its headers may be of children that are not known here
        result = None
        end = data.rfind(b"\n") + 1
        if end and not state.part and not state.tears and _cuts_between_lines(data, base, view.cuts):
            lines, masked = self._redactor.lines(data if end == len(data) else data[:end])
            if not any(b" pid=" in data[low:high] for low, high in masked):  # what children there are the bytes say
                result = self._whole_lines(lines, base, state, view, most, one)
        if result is None:
            self._fast.clear()
            result = self._pieces(data, base, state, view, most, one)
        self._next = (result.end, result.state)
        return result

    def _block(self, base: int, state: State, view: View) -> Block:
        return Block(
            self._recogniser,
            self._prefix,
            self._attributes,
            base,
            state,
            view.cuts,
            self._skip_markers,
            self._redactor,
        )

    # -- whole lines ---------------------------------------------------------------------------------------------------

    def _whole_lines(self, data: bytes, base: int, state: State, view: View, most: int, one: bool) -> Result | None:
        plain = _is_plain(data)
        fast = self._may_be_fast and plain and not state.claimed and not one
        try:
            return self._lines(data, base, state, view, most, plain=plain, fast=fast, one=one)
        except Odd:
            return None

    def _lines(
        self, data: bytes, base: int, state: State, view: View, most: int, *, plain: bool, fast: bool, one: bool
    ) -> Result:
        """Read whole lines. Raises Odd if some line is torn, too long, or may be, so that another way is to be taken."""
        block = self._block(base, state, view)
        quick = self._fast if fast else None
        position = base
        for low, high, context, common in _past_echoes(_ranges(data, len(data), base, view, fast), view, base):
            if context is None:
                for line in data[low:high].split(b"\n"):
                    _refuse_odd(line, block)
                position = base + high
                continue
            found = data[low:high].split(b"\n", most)
            rest = found.pop()
            most -= len(found)
            lines = iter(found)
            while True:
                if quick is not None and common and not block.is_open:
                    missed, position = quick.take(lines, position, context, block)
                    if missed is None:
                        break
                    line = missed
                else:
                    following = next(lines, None)
                    if following is None:
                        break
                    line = following
                after = position + len(line) + 1
                _refuse_odd(line, block)
                raw = line if plain or line[-1:] != b"\r" else line[:-1]
                header = block.line(position, after, raw, context, plain=plain)
                if quick is not None and header is not None and not block.is_open:
                    quick.learn(line, position, header, context)
                position = after
                if one and not block.is_open:
                    return block.finish(position)
            if rest:
                break
        result = block.finish(position)
        if result.waits or block.has_forgotten:
            self._fast.clear()
        return result

    # -- anything ------------------------------------------------------------------------------------------------------

    def _pieces(self, data: bytes, base: int, state: State, view: View, most: int, one: bool) -> Result:
        count = 1 if one else most
        while True:
            result = self._some_pieces(data, base, state, view, count)
            if not one or result.end > base or count > len(data):
                return result
            count *= 4

    def _some_pieces(self, data: bytes, base: int, state: State, view: View, most: int) -> Result:
        pieces, after = assemble.split(data, base, state, view.cuts, max_pieces=most)
        if not pieces:
            return Result([], base, state, False)
        block = self._block(base, state, view)
        contexts = _Contexts(view, pieces[0])
        masked, carry = self._redactor.pieces(pieces, data[: pieces[-1].end - base], base, state.carry)
        for piece in masked:
            if view.echoes and _is_echo(piece, view.echoes):
                continue
            begins = piece.start == base or data[piece.start - base - 1] == 0x0A
            block.piece(piece, contexts.of(piece), begins=begins)
        result = block.finish(pieces[-1].end)
        if result.waits:
            # What is known where the event begins, which is where a line does.
            cuts = [*(cut for cut in view.cuts if cut < result.end), result.end]
            _, after = assemble.split(data[: result.end - base], base, state, cuts)
            carry = b""
        return result._replace(state=replace(after, carry=carry, claimed=result.state.claimed))


def _is_plain(data: bytes) -> bool:
    """Whether lines of it are shown as they stand."""
    if b"\x1b" in data or b"\r" in data or b"\0" in data:
        return False
    if data.isascii():
        return True
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _cuts_between_lines(data: bytes, base: int, cuts: Sequence[int]) -> bool:
    inside = (cut - base for cut in cuts if base < cut < base + len(data))
    if not all(data[cut - 1] == 0x0A for cut in inside):
        return False
    return not cuts or cuts[-1] < base + len(data) or data[-1:] == b"\n"


def _refuse_odd(line: bytes, block: Block) -> None:
    """Raises Odd for a line that `assemble` would cut or mark as torn; remembers children's prefixes."""
    if len(line) > assemble.WHOLE_BYTES:
        raise Odd
    if b" pid=" in line:
        first = assemble.CHILD.match(line)
        if assemble.CHILD.search(line, first.end() if first else 0):
            raise Odd
        if first:
            block.remember(first[0])


# -- what holds for a line ---------------------------------------------------------------------------------------------


def _runs(data: bytes, end: int, base: int, view: View) -> Iterator[tuple[int, int, Context]]:
    """Ranges of whole lines in data[:end] under the same mark, identity and zone."""
    contexts = _Contexts(view, Piece(base, base + data.find(b"\n") + 1, b"", -1, True, False))
    low = 0
    while low < end:
        context = contexts.of(Piece(base + low, base + data.find(b"\n", low) + 1, b"", -1, True, False))
        limit = contexts.seen_by
        high = end if limit - base >= end else data.rfind(b"\n", low, limit - base) + 1
        if contexts.changes < base + high:
            high = min(high, data.find(b"\n", max(contexts.changes - base - 1, low)) + 1)
        yield low, high, context
        low = high


def _ranges(data: bytes, end: int, base: int, view: View, fast: bool) -> Iterator[tuple[int, int, Context, bool]]:
    """`_runs`, for the fast way divided at the lines that it must not see: those that may begin an event by their message,
    and one at which the offsets in the uids grow by a digit."""
    growth = 10 ** len(str(base)) - 1 - base
    triggers = fast and has(data, TRIGGER)
    for start, stop, context in _runs(data, end, base, view):
        low = start
        while low < stop:
            at = data.find(TRIGGER, low, stop) if triggers else -1
            if low <= growth < (stop if at < 0 else at):
                at = growth
            if at < 0 or not fast:
                yield low, stop, context, fast
                break
            line = data.rfind(b"\n", low, at) + 1 or low
            if line > low:
                yield low, line, context, True
            low = data.find(b"\n", at) + 1
            yield line, low, context, False
            growth = 10 ** len(str(base + low)) - 1 - base


def _past_echoes(
    ranges: Iterator[tuple[int, int, Context, bool]], view: View, base: int
) -> Iterator[tuple[int, int, Context | None, bool]]:
    """The ranges, divided where echoes begin and end; what lies in an echo has no context."""
    echoes = view.echoes
    if not echoes:
        yield from ranges
        return
    place = max(bisect.bisect_right(echoes, base, key=_offset) - 1, 0)
    for low, high, context, common in ranges:
        while low < high:
            while place < len(echoes) and _end(echoes[place]) <= base + low:
                place += 1
            first = echoes[place].offset - base if place < len(echoes) else high
            if first > low:
                yield low, min(first, high), context, common
                low = min(first, high)
            else:
                stop = min(_end(echoes[place]) - base, high)
                yield low, stop, None, False
                low = stop


def _is_echo(piece: Piece, echoes: Sequence[Decision]) -> bool:
    place = bisect.bisect_right(echoes, piece.start, key=_offset) - 1
    return place >= 0 and piece.end <= _end(echoes[place])


def _offset(decision: Decision) -> int:
    return decision.offset


def _end(echo: Decision) -> int:
    return int(echo.offset + echo.value["bytes"])


class _Contexts:
    """Walks the decisions along with the lines, which must come in order."""

    def __init__(self, view: View, first: Piece) -> None:
        self._marks, self._identities, self._zones = view.marks, view.identities, view.zones
        self._mark = bisect.bisect_left([mark.offset for mark in self._marks], first.end)
        self._identity = self._zone = 0
        self._current: Context | None = None
        self._key = (-1, -1, -1)

    def of(self, piece: Piece) -> Context:
        """What holds for a line."""
        while self._marks[self._mark].offset < piece.end:
            self._mark += 1
        while self._identity + 1 < len(self._identities) and self._identities[self._identity + 1].offset <= piece.start:
            self._identity += 1
        while self._zone < len(self._zones) and self._zones[self._zone].offset <= piece.start:
            self._zone += 1
        key = (self._mark, self._identity, self._zone)
        if self._current is None or key != self._key:
            self._key = key
            known = [zone.value for zone in self._zones[max(self._zone - 2, 0) : self._zone]]
            zones = (known[-1], known[0]) if known else (0, 0)
            mark = self._marks[self._mark]
            self._current = Context(mark.value, self._identities[self._identity].value, zones, mark.value - mark.offset)
        return self._current

    @property
    def seen_by(self) -> int:
        """Lines that end above this offset have another mark."""
        return self._marks[self._mark].offset

    @property
    def changes(self) -> int:
        """Lines that start at this offset or above have another identity or zone."""
        identity, zone = self._identity + 1, self._zone
        offsets = [self._identities[identity].offset] if identity < len(self._identities) else []
        offsets += [self._zones[zone].offset] if zone < len(self._zones) else []
        return min(offsets, default=1 << 62)
