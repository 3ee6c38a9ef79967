"""Request bodies, bounded: never more memory than the limit, whatever the sender claims or compresses."""

from __future__ import annotations

import zlib

_STEP = 1 << 20


class TooLarge(ValueError):
    """The body exceeds the limit; sending it again cannot help, sending it in parts can."""


class Malformed(ValueError):
    """The body is not what its headers say."""


def gunzip(data: bytes, limit: int) -> bytes:
    """Decompress gzip, one member or several, in steps, so that a bomb is noticed at `limit` and not in memory.

    Raises:
        TooLarge: more than `limit` bytes come out.
        Malformed: it is not gzip, or cut off.
    """
    out: list[bytes] = []
    size = 0
    rest = data
    while rest:
        inflater = zlib.decompressobj(wbits=31)
        while not inflater.eof:
            try:
                piece = inflater.decompress(rest, _STEP)
            except zlib.error as error:
                raise Malformed(f"the body is not gzip: {error}") from None
            size += len(piece)
            if size > limit:
                raise TooLarge(f"the body has more than {limit} bytes when decompressed; send smaller batches")
            out.append(piece)
            rest = inflater.unconsumed_tail
            if not piece and not rest and not inflater.eof:
                raise Malformed("the gzip body is cut off")
        rest = inflater.unused_data
    if not out:
        raise Malformed("the gzip body is empty")
    return b"".join(out)
