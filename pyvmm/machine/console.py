"""Where the first serial port's bytes go to and come from.

A console never holds the VM up for long: a file or socket that cannot keep up loses bytes, which are
counted; only standard output may block, as a terminal that is stopped with Ctrl-S should, until the VM ends.
"""

from __future__ import annotations

import os
import select
import stat
import sys
import time

from pyvmm.machine.config import ConfigError, split_com1

TYPE_CHECKING = False
if TYPE_CHECKING:
    import threading
    from collections.abc import Callable
    from typing import Any

    #: Takes bytes for the guest and returns how many it took; the rest is offered again later.
    Receive = Callable[[bytes], int]

_CHUNK = 4096
_LOOK_AGAIN_MS = 100
_LAST_WAIT_S = 1.0
#: Typed bytes kept for a guest that does not read them; a pipe is simply not read meanwhile.
_TYPE_AHEAD = 4096

_ESCAPE = 0x1D  # Ctrl-]
_HELP = "\r\npyvmm: Ctrl-] q quits, Ctrl-] Ctrl-] sends Ctrl-], Ctrl-] ? shows this\r\n"


class Console:
    """A console that is connected to nothing; the base of the others."""

    def __init__(self) -> None:
        #: Called, on any thread, when the user asks at the console for the VM to end.
        self.on_quit: Callable[[], None] = lambda: None
        #: Bytes of output that were dropped.
        self.lost = 0
        self._patience_ends: float | None = None

    def start(self, receive: Receive) -> None:
        """Begin to hand input to `receive`, which is called on the console's own thread."""

    def write(self, data: bytes) -> None:
        """Put out what the guest sent; may be called from any thread."""

    def lose_patience(self) -> None:
        """From now on wait for a reader that takes no output for a second at most, in all; any thread."""
        self._patience_ends = time.monotonic() + _LAST_WAIT_S

    def _write_all(self, fd: int, data: bytes) -> None:
        written = 0
        while written < len(data) and self._writable(fd):
            try:
                # No more than what a pipe that can be written to takes at once.
                written += os.write(fd, data[written : written + select.PIPE_BUF])
            except BlockingIOError:
                continue
            except OSError:  # the reader has gone away, the disk is full
                break
        self.lost += len(data) - written

    def _writable(self, fd: int) -> bool:
        poll = select.poll()
        poll.register(fd, select.POLLOUT)
        while not poll.poll(_LOOK_AGAIN_MS):
            if self._patience_ends is not None and time.monotonic() >= self._patience_ends:
                return False
        return True

    def close(self) -> None:
        """Stop the input and give back the terminal, socket or file; harmless the second time."""

    def inspect(self) -> dict[str, Any]:
        """What kind of console it is and what it lost."""
        return {"kind": "none", "lost": self.lost}


def open_console(spec: str) -> Console:
    """Make the console that a `VmConfig.com1` asks for; raises ConfigError."""
    kind, path = split_com1(spec)
    if kind == "stdio":
        return StdioConsole()
    if kind == "file":
        return FileConsole(path)
    if kind == "unix":
        from pyvmm.machine.console_socket import SocketConsole

        return SocketConsole(path)
    return Console()


class FileConsole(Console):
    """Output goes to a file, which starts empty; there is no input."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self._path = path
        try:
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else str(error)
            raise ConfigError(f"com1 file {path}: {why}") from error

    def write(self, data: bytes) -> None:
        if self._fd >= 0:
            self._write_all(self._fd, data)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def inspect(self) -> dict[str, Any]:
        return {"kind": "file", "path": self._path, "lost": self.lost}


class StdioConsole(Console):
    """Standard input and output. A terminal is put in raw mode, with Ctrl-] as the escape key."""

    def __init__(self, stdin: int = 0, stdout: int = 1) -> None:
        super().__init__()
        self._stdin = stdin
        self._stdout = stdout
        self._saved: list[Any] | None = None
        self._wake = -1
        self._thread: threading.Thread | None = None

    def start(self, receive: Receive) -> None:
        if not _has_input(self._stdin):
            return
        terminal = os.isatty(self._stdin)
        if terminal:
            self._saved = _make_raw(self._stdin)
            sys.stderr.write("pyvmm: console on this terminal; Ctrl-] q quits, Ctrl-] ? helps\n")
            sys.stderr.flush()
        import threading

        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread = threading.Thread(
            target=self._read_input, args=(InputQueue(receive), terminal), name="console", daemon=True
        )
        self._thread.start()

    def write(self, data: bytes) -> None:
        self._write_all(self._stdout, data)

    def close(self) -> None:
        thread, self._thread = self._thread, None
        if thread is not None:
            os.eventfd_write(self._wake, 1)
            thread.join()
            os.close(self._wake)
        saved, self._saved = self._saved, None
        if saved is not None:
            import termios

            try:
                termios.tcsetattr(self._stdin, termios.TCSANOW, saved)
            except termios.error:  # the terminal has gone away
                pass

    def inspect(self) -> dict[str, Any]:
        return {"kind": "stdio", "lost": self.lost}

    def _read_input(self, queue: InputQueue, terminal: bool) -> None:
        keys = EscapeFilter() if terminal else None
        at_end = False
        while True:
            timeout = queue.pump()
            if at_end and timeout is None:
                return
            poll = select.poll()
            poll.register(self._wake, select.POLLIN)
            # A terminal is always read, so that the escape key works while the guest takes nothing.
            if not at_end and (terminal or timeout is None):
                poll.register(self._stdin, select.POLLIN)
            ready = [fd for fd, _ in poll.poll(timeout)]
            if self._wake in ready:
                return
            if self._stdin in ready:
                try:
                    data = os.read(self._stdin, _CHUNK)
                except BlockingIOError:
                    continue
                except OSError:  # a terminal that was hung up
                    data = b""
                at_end = not data
                if keys is not None:
                    data, commands = keys.feed(data)
                    for command in commands:
                        self._obey(command)
                    data = data[: max(0, _TYPE_AHEAD - len(queue))]
                queue.add(data)

    def _obey(self, command: str) -> None:
        if command == "quit":
            self.on_quit()
        else:
            sys.stderr.write(_HELP)
            sys.stderr.flush()


class EscapeFilter:
    """Finds the commands that the user gives with the escape key among what is typed for the guest."""

    def __init__(self) -> None:
        self._escaped = False

    def feed(self, data: bytes) -> tuple[bytes, list[str]]:
        """Return the bytes for the guest and the commands, ``quit`` or ``help``, in `data`."""
        if not self._escaped and _ESCAPE not in data:
            return data, []
        passed = bytearray()
        commands: list[str] = []
        for byte in data:
            if not self._escaped:
                if byte == _ESCAPE:
                    self._escaped = True
                else:
                    passed.append(byte)
                continue
            self._escaped = False
            if byte == _ESCAPE:
                passed.append(byte)
            else:
                commands.append("quit" if byte in b"qQ" else "help")
        return bytes(passed), commands


class InputQueue:
    """Input on its way to a guest that takes a few bytes at a time, offered again with growing pauses."""

    _FIRST_PAUSE_MS = 1
    _LAST_PAUSE_MS = 64

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._pending = bytearray()
        self._pause_ms = self._FIRST_PAUSE_MS

    def __len__(self) -> int:
        return len(self._pending)

    def add(self, data: bytes) -> None:
        """Append `data`; the caller keeps the queue short."""
        self._pending += data

    def pump(self) -> int | None:
        """Offer what is pending; return the milliseconds until the next try, None if nothing is left."""
        while self._pending:
            taken = self._receive(bytes(self._pending))
            if taken <= 0:
                pause = self._pause_ms
                self._pause_ms = min(2 * pause, self._LAST_PAUSE_MS)
                return pause
            del self._pending[:taken]
            self._pause_ms = self._FIRST_PAUSE_MS
        return None


def _has_input(fd: int) -> bool:
    """Whether anything can ever be read from `fd`; in the background a terminal is not ours to read."""
    try:
        status = os.fstat(fd)
        if stat.S_ISREG(status.st_mode):
            return os.lseek(fd, 0, os.SEEK_CUR) < status.st_size
        if stat.S_ISCHR(status.st_mode):
            if os.isatty(fd):
                return os.tcgetpgrp(fd) == os.getpgrp()
            return status.st_rdev != os.makedev(1, 3)  # /dev/null
    except OSError:  # closed, or a terminal that is not the controlling one
        return os.isatty(fd)
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return not any(events & select.POLLHUP and not events & select.POLLIN for _, events in poll.poll(0))


def _make_raw(fd: int) -> list[Any]:
    """Pass every key on, unechoed; return the old settings. Output keeps its newlines for our own messages."""
    import termios

    saved = termios.tcgetattr(fd)
    raw = termios.tcgetattr(fd)
    raw[0] &= ~(termios.IGNBRK | termios.BRKINT | termios.PARMRK | termios.ISTRIP | termios.INLCR)
    raw[0] &= ~(termios.IGNCR | termios.ICRNL | termios.IXON)
    raw[3] &= ~(termios.ECHO | termios.ECHONL | termios.ICANON | termios.ISIG | termios.IEXTEN)
    raw[6][termios.VMIN] = 1
    raw[6][termios.VTIME] = 0
    termios.tcsetattr(fd, termios.TCSANOW, raw)
    return saved
