"""Secrets do not leave the node: what matches a rule is overwritten with `*`, byte for byte, before it is sent.

Nearly all text holds none, so the cost that counts is that of seeing so: each rule has *anchors*, literals without which it
cannot match, and a block is asked for them with strstr(3), which compares with the widest registers there are and is ten
times as fast as `bytes.find`. Only round an anchor the rule's pattern is tried.

A token may be cut in two, where a long line comes in parts or a partial line is sent. Then what has begun is masked to the
part's end, and `Cut` carries as much of it into the next part as its pattern needs to go on.
"""

from __future__ import annotations

import bisect
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import itemgetter

from skyrl_otel.agent import otlp
from skyrl_otel.agent.assemble import Piece
from skyrl_otel.agent.find import has

_CARRY_BYTES = 200
_REACH_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Rule:
    """What a kind of secret looks like.

    `anchors`: literals one of which is in each match. `pattern`: the match, of which the group `secret`, or all of it where
    there is none, is masked. `opening`: at the end of a part, what may be the beginning of a match; None: an anchor and
    whatever has no space. `also`: a second literal without which there is no match, for a rule whose anchors are common.
    """

    name: str
    anchors: tuple[bytes, ...]
    pattern: re.Pattern[bytes]
    opening: re.Pattern[bytes]
    also: bytes = b""

    @classmethod
    def make(cls, name: str, anchors: Iterable[bytes], pattern: bytes, opening: bytes = b"", also: bytes = b"") -> Rule:
        """Raises re.error for a bad pattern, ValueError for a rule without an anchor."""
        literals = tuple(anchors)
        if not literals or not all(literals):
            raise ValueError(f"rule {name!r} has no anchor; name a literal that each match contains")
        begun = opening or b"(?:" + b"|".join(map(re.escape, literals)) + rb")[^\s\"',;]*"
        return cls(name, literals, re.compile(pattern), re.compile(begun + rb"\Z"), also)


# Shapes as their issuers document them or as secret scanners know them (GitHub secret scanning, TruffleHog).
RULES: tuple[Rule, ...] = (
    Rule.make(
        "huggingface",
        (b"hf_",),
        rb"(?<![A-Za-z0-9_])hf_[A-Za-z0-9]{30,}",
        rb"(?<![A-Za-z0-9_])hf_[A-Za-z0-9]*",
    ),
    Rule.make(
        "openai",
        (b"sk-",),
        rb"(?<![A-Za-z0-9_-])sk-(?:(?:proj|svcacct|admin|ant|or)-[A-Za-z0-9_-]{20,}|[A-Za-z0-9]{32,})",
        rb"(?<![A-Za-z0-9_-])sk-[A-Za-z0-9_-]*",
    ),
    Rule.make(
        "aws-key-id",
        (b"AKIA", b"ASIA"),
        rb"(?<![A-Za-z0-9])A[KS]IA[A-Z2-7]{16}(?![A-Za-z0-9])",
        rb"(?<![A-Za-z0-9])A[KS]IA[A-Z2-7]{0,16}",
    ),
    Rule.make(
        "aws-secret",
        (b"ecret_access_key", b"ECRET_ACCESS_KEY", b"ecretAccessKey"),
        rb"(?i)secret_?access_?key[\"']?\s{0,3}[=:]\s{0,3}[\"']?(?P<secret>[A-Za-z0-9/+=]{40})(?![A-Za-z0-9/+=])",
        rb"(?i)secret_?access_?key[\"']?\s{0,3}(?:[=:]\s{0,3}[\"']?[A-Za-z0-9/+=]{0,40})?",
    ),
    Rule.make(
        "wandb",
        (b"wandb_v1_", b"wandb login", b"wandb_api_key", b"WANDB_API_KEY"),
        rb"(?i)(?:wandb_api_key[\"']?\s{0,3}[=:]\s{0,3}[\"']?|wandb login\s{1,3}(?:--\S+\s{1,3})*)"
        rb"(?P<secret>[A-Za-z0-9_-]{32,})|(?<![A-Za-z0-9_])wandb_v1_[A-Za-z0-9_]{32,}",
        rb"(?i)(?:wandb_api_key[\"']?\s{0,3}(?:[=:]\s{0,3}[\"']?)?|wandb login\s{1,3}|wandb_v1_)[A-Za-z0-9_-]*",
    ),
    Rule.make(
        "bearer",
        (b"earer ", b"EARER "),
        rb"(?i)(?<![A-Za-z])bearer\s{1,3}(?P<secret>(?=[^\s\"']*[0-9])[A-Za-z0-9._~+/=-]{16,})",
        rb"(?i)(?<![A-Za-z])bearer\s{1,3}[A-Za-z0-9._~+/=-]*",
    ),
    Rule.make(
        "url-password",
        (b"://",),
        rb"://[^\s:/@?#\"'<>]{0,256}:(?P<secret>[^\s/@\"'<>]{1,256})@",
        rb"://[^\s:/@?#\"'<>]{0,256}:[0-9]{0,5}[^\s/@\"'<>0-9][^\s/@\"'<>]{0,256}",
        also=b"@",
    ),
)


_START = itemgetter(Piece._fields.index("start"))
_PART = itemgetter(Piece._fields.index("part"))


def _positions(block: bytes, anchor: bytes) -> Iterator[int]:
    position = block.find(anchor)
    while position >= 0:
        yield position
        position = block.find(anchor, position + 1)


def _whole_characters(text: bytes, start: int, end: int) -> tuple[int, int]:
    """The range, and the rest of a UTF-8 character that it begins or ends within: at most three bytes."""
    first, last = max(start - 3, 0), min(end + 3, len(text))
    while start > first and text[start] & 0xC0 == 0x80:
        start -= 1
    while end < last and text[end] & 0xC0 == 0x80:
        end += 1
    return start, end


class Redactor:
    """The rules in force. `hits` counts what was masked, by rule."""

    def __init__(self, rules: Sequence[Rule] = RULES) -> None:
        self.rules = tuple(rules)
        self.hits: Counter[str] = Counter()

    def awake(self, block: bytes) -> list[tuple[Rule, bytes]]:
        """The rules of which an anchor is in `block`, with that anchor."""
        if b"\0" in block:
            block = block.replace(b"\0", b"\n")
        return [
            (rule, anchor)
            for rule in self.rules
            if not rule.also or rule.also in block
            for anchor in rule.anchors
            if has(block, anchor)
        ]

    def text(self, text: bytes) -> bytes:
        """`text` with its secrets masked; the same object where it has none."""
        awake = self.awake(text)
        return self._masked(text, [rule for rule, _ in awake]) if awake else text

    def lines(self, block: bytes) -> tuple[bytes, list[tuple[int, int]]]:
        """`block`, which is whole lines, each of them masked; and the ranges in it of those that had something to mask."""
        awake = self.awake(block)
        found: dict[int, list[Rule]] = {}
        for rule, anchor in awake:
            for position in _positions(block, anchor):
                rules = found.setdefault(block.rfind(b"\n", 0, position) + 1, [])
                if rule not in rules:
                    rules.append(rule)
        changed: bytearray | None = None
        ranges: list[tuple[int, int]] = []
        for start, rules in found.items():
            end = block.index(b"\n", start)
            if block[start:end].endswith(b"\r"):  # no part of the line: `assemble.Piece`
                end -= 1
            line = block[start:end]
            masked = self._masked(line, rules)
            if masked is not line:
                changed = bytearray(block) if changed is None else changed
                changed[start:end] = masked
                ranges.append((start, end))
        return block if changed is None else bytes(changed), ranges

    def pieces(self, pieces: list[Piece], block: bytes, base: int, carry: bytes) -> tuple[list[Piece], bytes]:
        """The pieces of `block`, which begins at file offset `base`, masked; and what the part after them must know.

        Args:
            carry: what the part before them left.
        """
        awake = self.awake(block)
        if not awake and not carry and (not pieces or pieces[-1].part < 0):
            return pieces, b""
        masked = list(pieces)
        for number, rules in self._near(pieces, block, base, awake).items():
            if masked[number].part < 0:
                masked[number] = masked[number]._replace(body=self._masked(masked[number].body, rules))
        if not carry and max(map(_PART, pieces), default=-1) < 0:
            return masked, b""
        for number, piece in enumerate(pieces):
            if piece.part >= 0:
                body, carry = self._part(piece.body, carry, piece.last)
                masked[number] = piece._replace(body=body)
            elif carry:
                carry = b""
        return masked, carry

    def record(self, record: bytes) -> bytes:
        """A LogRecord with the secrets in its body, severity text and attributes, keys and values, masked."""
        if not self.awake(record):
            return record
        changed = bytearray(record)
        for tag, start, end in otlp.fields(record, 0, len(record)):
            if tag == 0x2A:
                self._any_value(record, start, end, changed)
            elif tag == 0x1A:
                changed[start:end] = self.text(record[start:end])
            elif tag == 0x32:
                self._key_value(record, start, end, changed)
        return bytes(changed)

    def records(self, records: list[bytes]) -> list[bytes]:
        """LogRecords, masked where they have something to mask."""
        block = b"".join(records)
        awake = self.awake(block)
        if not awake:
            return records
        ends = list(accumulate(map(len, records)))
        masked = list(records)
        for number in {
            bisect.bisect_right(ends, position) for _, anchor in awake for position in _positions(block, anchor)
        }:
            masked[number] = self.record(records[number])
        return masked

    def field(self, encoded: bytes) -> bytes:
        """The same for a record as the field of ScopeLogs."""
        if not self.awake(encoded):
            return encoded
        return b"".join(
            encoded[:start] + self.record(encoded[start:end]) for _, start, end in otlp.fields(encoded, 0, len(encoded))
        )

    def scope(self, encoded: bytes) -> bytes:
        """An InstrumentationScope, as the field of ScopeLogs, with the secrets in its name masked."""
        if not self.awake(encoded):
            return encoded
        changed = bytearray(encoded)
        for _, start, end in otlp.fields(encoded, 0, len(encoded)):
            for tag, at, stop in otlp.fields(encoded, start, end):
                if tag == 0x0A:
                    changed[at:stop] = self.text(encoded[at:stop])
        return bytes(changed)

    def resource(self, encoded: bytes) -> bytes:
        """A Resource, as the field of ResourceLogs, with the secrets in its attributes masked."""
        if not self.awake(encoded):
            return encoded
        changed = bytearray(encoded)
        for _, start, end in otlp.fields(encoded, 0, len(encoded)):
            for tag, at, stop in otlp.fields(encoded, start, end):
                if tag == 0x0A:
                    self._key_value(encoded, at, stop, changed)
        return bytes(changed)

    def _near(
        self, pieces: list[Piece], block: bytes, base: int, awake: list[tuple[Rule, bytes]]
    ) -> dict[int, list[Rule]]:
        """Which rules are worth trying on which piece: those with an anchor in it."""
        starts = list(map(_START, pieces))
        found: dict[int, list[Rule]] = {}
        for rule, anchor in awake:
            for position in _positions(block, anchor):
                number = bisect.bisect_right(starts, base + position) - 1
                if number >= 0 and rule not in (rules := found.setdefault(number, [])):
                    rules.append(rule)
        return found

    def _masked(self, text: bytes, rules: Iterable[Rule]) -> bytes:
        changed: bytearray | None = None
        for rule in rules:
            for match in rule.pattern.finditer(text):
                start, end = match.span("secret") if "secret" in rule.pattern.groupindex else match.span()
                if start < 0:
                    start, end = match.span()
                changed = bytearray(text) if changed is None else changed
                start, end = _whole_characters(text, start, end)
                changed[start:end] = b"*" * (end - start)
                self.hits[rule.name] += 1
        return text if changed is None else bytes(changed)

    def _part(self, body: bytes, carry: bytes, last: bool) -> tuple[bytes, bytes]:
        """One part of a line: masked, with what its next part must know."""
        whole = carry + body
        masked = self.text(whole)[len(carry) :]
        if last:
            return masked, b""
        reach = whole[-_REACH_BYTES:]
        begun = min((match.start() for rule in self.rules if (match := rule.opening.search(reach))), default=-1)
        if begun < 0:
            return masked, whole[-64:]
        start = max(len(whole) - len(reach) + begun - len(carry), 0)
        masked = masked[:start] + b"*" * (len(masked) - start)
        return masked, reach[begun : begun + _CARRY_BYTES]

    def _key_value(self, record: bytes, start: int, end: int, changed: bytearray) -> None:
        for tag, at, stop in otlp.fields(record, start, end):
            if tag == 0x0A:
                changed[at:stop] = self.text(record[at:stop])
            elif tag == 0x12:
                self._any_value(record, at, stop, changed)

    def _any_value(self, record: bytes, start: int, end: int, changed: bytearray) -> None:
        for tag, at, stop in otlp.fields(record, start, end):
            if tag in (0x0A, 0x3A):
                changed[at:stop] = self.text(record[at:stop])
            elif tag == 0x2A:
                for inner, first, after in otlp.fields(record, at, stop):
                    if inner == 0x0A:
                        self._any_value(record, first, after, changed)
            elif tag == 0x32:
                for inner, first, after in otlp.fields(record, at, stop):
                    if inner == 0x0A:
                        self._key_value(record, first, after, changed)


def from_settings(items: Iterable[Sequence[object]]) -> Redactor:
    """The built-in rules and those of the user's settings, each [name, pattern, anchors]. Raises ValueError, re.error."""
    own = []
    for name, pattern, anchors in items:
        if not isinstance(anchors, list):
            raise ValueError(f"rule {name!r}: anchors is no list")
        own.append(Rule.make(str(name), [str(anchor).encode() for anchor in anchors], str(pattern).encode()))
    return Redactor((*RULES, *own))
