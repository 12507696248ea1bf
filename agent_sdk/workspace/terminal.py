"""Pseudo terminals: a pair of descriptors, a size, and what the terminal does to the bytes in between."""

from __future__ import annotations

import fcntl
import os
import struct
import termios
from dataclasses import dataclass
from typing import Literal

Reading = Literal["lines", "keys", "edited"]


@dataclass
class Terminal:
    """The side of a terminal where a person would sit (`master`), and its other side."""

    master: int
    slave: int
    name: str
    """Path of the other side."""

    def discard_input(self) -> None:
        """Drop what was typed and not read."""
        termios.tcflush(self.slave, termios.TCIFLUSH)

    def close_slave(self) -> None:
        """Let the master see the end once no process has the other side open. Harmless when repeated."""
        slave, self.slave = self.slave, -1
        if slave >= 0:
            os.close(slave)


def open_terminal(rows: int, cols: int) -> Terminal:
    """Open a terminal; both descriptors are the caller's.

    The other side stays open here as well: a master whose other side nobody has open yet reads as ended.
    """
    master, slave = os.openpty()
    resize(master, rows, cols)
    return Terminal(master, slave, os.ttyname(slave))


def resize(master: int, rows: int, cols: int) -> None:
    """Set the size in characters; the programs on the terminal get WINCH."""
    fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, cols, 0, 0))


def reading(fd: int) -> Reading:
    """Return how the program on a terminal reads: `lines`, single `keys`, or keys of a line that is `edited`.

    Who edits a line (or a whole screen) takes Enter as the key that it is; who asks for a key (`read -n1`) does not.
    """
    modes = termios.tcgetattr(fd)
    if modes[3] & termios.ICANON:
        return "lines"
    return "keys" if modes[0] & termios.ICRNL else "edited"


def make_plain(fd: int) -> None:
    """Have bytes pass as they are: no echo of what is typed, no carriage return before a newline.

    Keys keep their meaning (^C interrupts, ^D ends the input).
    """
    modes = termios.tcgetattr(fd)
    modes[1] &= ~termios.OPOST
    modes[3] &= ~(termios.ECHO | termios.ECHONL)
    modes[3] |= termios.ICANON | termios.ISIG
    modes[0] |= termios.ICRNL
    termios.tcsetattr(fd, termios.TCSANOW, modes)
