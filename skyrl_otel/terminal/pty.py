"""Pseudo terminals for output only.

The child gets one in place of a terminal it would have printed to; the real terminal stays its stdin and its controlling
terminal, so that Ctrl-C, Ctrl-Z, `fg`, pdb and readline need nothing from us. Output processing is off: what the child
wrote is what we read, and the real terminal turns `\\n` into `\\r\\n` once.
"""

from __future__ import annotations

import fcntl
import os
import termios

_OFLAG = 1


def open_like(terminal: int) -> tuple[int, int]:
    """(our end, the child's end) of a new pty with `terminal`'s settings and window size. Raises OSError."""
    ours, childs = os.openpty()
    try:
        settings = termios.tcgetattr(terminal)
        settings[_OFLAG] &= ~termios.OPOST
        termios.tcsetattr(childs, termios.TCSANOW, settings)
        copy_window_size(terminal, ours)
    except termios.error as error:
        os.close(ours)
        os.close(childs)
        raise OSError(*error.args) from error
    return ours, childs


def copy_window_size(terminal: int, pty: int) -> bool:
    """Give the pty the terminal's window size; whether that changed anything."""
    try:
        size = fcntl.ioctl(terminal, termios.TIOCGWINSZ, bytes(8))
        if size == fcntl.ioctl(pty, termios.TIOCGWINSZ, bytes(8)):
            return False
        fcntl.ioctl(pty, termios.TIOCSWINSZ, size)
    except OSError:
        return False
    return True
