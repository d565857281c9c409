"""Consoles of the first serial port: terminal, pipe, file and unix socket."""

from __future__ import annotations

import os
import pty
import queue
import select
import socket
import termios
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.machine.config import ConfigError
from pyvmm.machine.console import Console, EscapeFilter, FileConsole, InputQueue, StdioConsole, open_console
from pyvmm.machine.console_socket import SocketConsole


class Guest:
    """Takes input; `take` may be lowered to refuse it."""

    def __init__(self) -> None:
        self.take = 1 << 30
        self.refused = threading.Event()
        self._received: queue.Queue[bytes] = queue.Queue()

    def receive(self, data: bytes) -> int:
        taken = data[: self.take]
        if taken:
            self._received.put(taken)
        else:
            self.refused.set()
        return len(taken)

    def expect(self, data: bytes) -> None:
        """Wait until just `data` has arrived."""
        received = b""
        while len(received) < len(data):
            received += self._received.get(timeout=20)
        assert received == data

    def idle(self) -> bool:
        return self._received.empty()


def console_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "console"]


def test_the_escape_key_gives_commands_and_itself() -> None:
    keys = EscapeFilter()
    assert keys.feed(b"ab\x1dqcd") == (b"abcd", ["quit"])
    assert keys.feed(b"\x1d\x1d") == (b"\x1d", [])
    assert keys.feed(b"x\x1d") == (b"x", [])
    assert keys.feed(b"?y") == (b"y", ["help"])
    assert keys.feed(b"\x1dz") == (b"", ["help"])


@given(st.lists(st.sampled_from([b"a", b"q", b"?", b"\x1d", b"\r"])), st.integers(0, 20))
def test_the_escape_key_works_however_the_input_is_cut(pieces: list[bytes], cut: int) -> None:
    data = b"".join(pieces)
    whole = EscapeFilter().feed(data)
    keys = EscapeFilter()
    first, second = keys.feed(data[:cut]), keys.feed(data[cut:])
    assert (first[0] + second[0], first[1] + second[1]) == whole


def test_refused_input_is_offered_again_with_growing_pauses() -> None:
    taken = bytearray()
    room = 0

    def receive(data: bytes) -> int:
        taken.extend(data[:room])
        return len(data[:room])

    queue_ = InputQueue(receive)
    assert queue_.pump() is None
    queue_.add(b"abcde")
    assert [queue_.pump() for _ in range(9)] == [1, 2, 4, 8, 16, 32, 64, 64, 64]
    room = 2
    assert queue_.pump() is None
    assert taken == b"abcde"
    room = 0
    queue_.add(b"f")
    assert queue_.pump() == 1


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    master, slave = pty.openpty()
    yield master, slave
    os.close(master)
    os.close(slave)


def test_a_terminal_is_raw_while_the_console_runs_and_restored_after(
    terminal: tuple[int, int], capsys: pytest.CaptureFixture[str]
) -> None:
    master, slave = terminal
    before = termios.tcgetattr(slave)
    guest = Guest()
    console = StdioConsole(slave, slave)
    console.start(guest.receive)
    assert not termios.tcgetattr(slave)[3] & (termios.ECHO | termios.ICANON | termios.ISIG)
    assert "Ctrl-] q quits" in capsys.readouterr().err
    os.write(master, b"ls\r\x03")
    guest.expect(b"ls\r\x03")
    console.write(b"hello")
    assert os.read(master, 100) == b"hello"
    console.close()
    console.close()
    assert termios.tcgetattr(slave) == before
    assert not console_threads()


def test_the_escape_key_quits_even_when_the_guest_takes_no_input(terminal: tuple[int, int]) -> None:
    master, slave = terminal
    guest, quit_ = Guest(), threading.Event()
    guest.take = 0
    console = StdioConsole(slave, slave)
    console.on_quit = quit_.set
    console.start(guest.receive)
    os.write(master, b"typed ahead")
    assert guest.refused.wait(20)
    os.write(master, b"\x1dq")
    assert quit_.wait(20)
    console.close()


def test_a_terminal_that_hangs_up_ends_the_input_only() -> None:
    master, slave = pty.openpty()
    console = StdioConsole(slave, slave)
    console.start(Guest().receive)
    thread = console_threads()[0]
    os.close(master)
    thread.join(20)
    assert not thread.is_alive()
    console.write(b"lost")
    assert console.lost == 4
    console.close()
    os.close(slave)


def test_a_pipe_is_passed_through_to_its_end() -> None:
    read, write = os.pipe()
    out_read, out_write = os.pipe()
    guest = Guest()
    console = StdioConsole(read, out_write)
    console.start(guest.receive)
    os.write(write, b"echo \x1dq\n")  # no escape key without a terminal
    guest.expect(b"echo \x1dq\n")
    thread = console_threads()[0]
    os.write(write, b"last")
    os.close(write)
    thread.join(20)
    assert not thread.is_alive()
    guest.expect(b"last")
    console.write(b"out")
    assert os.read(out_read, 10) == b"out"
    console.close()
    for fd in (read, out_read, out_write):
        os.close(fd)


def test_a_pipe_waits_for_a_guest_that_takes_input_slowly() -> None:
    read, write = os.pipe()
    guest = Guest()
    guest.take = 0
    console = StdioConsole(read, 1)
    console.start(guest.receive)
    os.write(write, b"x" * 4096)
    assert guest.refused.wait(20)
    os.write(write, b"y" * 4096)
    os.close(write)
    guest.take = 16
    guest.expect(b"x" * 4096 + b"y" * 4096)
    console.close()
    os.close(read)


def test_a_guest_that_never_takes_input_does_not_hold_up_closing() -> None:
    read, write = os.pipe()
    guest = Guest()
    guest.take = 0
    console = StdioConsole(read, 1)
    console.start(guest.receive)
    os.write(write, b"x")
    assert guest.refused.wait(20)
    console.close()
    assert not console_threads()
    os.close(read)
    os.close(write)


def test_no_thread_waits_where_no_input_can_come(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.write_bytes(b"")
    read, write = os.pipe()
    os.close(write)
    sources = [os.open(os.devnull, os.O_RDONLY), os.open(empty, os.O_RDONLY), read]
    for fd in (*sources, 999):
        console = StdioConsole(fd, 1)
        console.start(Guest().receive)
        assert not console_threads()
        console.close()
    for fd in sources:
        os.close(fd)


def test_input_can_come_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "input"
    path.write_bytes(b"from a file")
    guest = Guest()
    fd = os.open(path, os.O_RDONLY)
    console = StdioConsole(fd, 1)
    console.start(guest.receive)
    guest.expect(b"from a file")
    console.close()
    os.close(fd)


def test_output_whose_reader_has_gone_is_counted() -> None:
    read, write = os.pipe()
    os.close(read)
    console = StdioConsole(0, write)
    console.write(b"abc")
    assert console.inspect() == {"kind": "stdio", "lost": 3}
    os.close(write)


def test_a_file_gets_the_output_and_starts_empty(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"of last time")
    console = open_console(f"file:{path}")
    assert isinstance(console, FileConsole)
    console.start(Guest().receive)
    assert not console_threads()
    console.write(b"boot\n")
    console.close()
    console.close()
    console.write(b"late")
    assert path.read_bytes() == b"boot\n"


def test_a_full_disk_is_counted_and_harmless() -> None:
    console = FileConsole("/dev/full")
    console.write(b"abc")
    assert console.inspect()["lost"] == 3
    console.close()


def test_no_console_drops_everything() -> None:
    console = open_console("none")
    assert type(console) is Console
    console.start(Guest().receive)
    console.write(b"x")
    console.close()
    assert console.inspect() == {"kind": "none", "lost": 0}


def test_a_file_that_cannot_be_made_is_a_config_error(tmp_path: Path) -> None:
    for path in (str(tmp_path), str(tmp_path / "no" / "log"), "a\0"):
        with pytest.raises(ConfigError, match="com1 file"):
            open_console(f"file:{path}")


@pytest.fixture
def guest() -> Guest:
    return Guest()


@pytest.fixture
def served(tmp_path: Path, guest: Guest) -> Iterator[tuple[SocketConsole, str]]:
    path = str(tmp_path / "com1")
    console = open_console(f"unix:{path}")
    assert isinstance(console, SocketConsole)
    console.start(guest.receive)
    yield console, path
    console.close()
    console.close()
    assert not os.path.exists(path)
    assert not console_threads()


def attach(path: str) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(20)
    client.connect(path)
    return client


def read_exactly(client: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = client.recv(size - len(data))
        assert piece, f"closed after {data!r}"
        data += piece
    return data


def test_a_late_client_first_sees_what_was_written_before(served: tuple[SocketConsole, str], guest: Guest) -> None:
    console, path = served
    console.write(b"booting\n")
    with attach(path) as client:
        assert read_exactly(client, 8) == b"booting\n"
        console.write(b"login: ")
        assert read_exactly(client, 7) == b"login: "
        client.sendall(b"root\r")
        guest.expect(b"root\r")
        assert console.inspect()["attached"]


def test_the_scrollback_is_the_last_64_kib(served: tuple[SocketConsole, str]) -> None:
    console, path = served
    console.write(b"old" + b"x" * 65535)
    console.write(b"!")
    with attach(path) as client:
        assert read_exactly(client, 65536) == b"x" * 65535 + b"!"


def test_a_second_client_is_told_that_the_console_is_in_use(served: tuple[SocketConsole, str]) -> None:
    console, path = served
    console.write(b">")
    with attach(path) as first, attach(path) as second:
        assert read_exactly(first, 1) == b">"
        assert b"in use" in second.recv(100)
        assert second.recv(100) == b""
        console.write(b"still here")
        assert read_exactly(first, 10) == b"still here"


def test_after_a_client_leaves_the_next_one_is_served(served: tuple[SocketConsole, str], guest: Guest) -> None:
    console, path = served
    console.write(b">")
    with attach(path) as client:
        assert read_exactly(client, 1) == b">"
        client.shutdown(socket.SHUT_WR)
        assert client.recv(1) == b""
    with attach(path) as client:
        assert read_exactly(client, 1) == b">"
        client.sendall(b"a")
        guest.expect(b"a")


def test_a_client_that_does_not_read_loses_output_and_is_told_how_much(served: tuple[SocketConsole, str]) -> None:
    console, path = served
    console.write(b">")
    with attach(path) as client:
        assert read_exactly(client, 1) == b">"
        for _ in range(1024):
            console.write(b"z" * 1024)  # returns at once, although nobody reads
        lost = console.inspect()["lost"]
        assert 0 < lost < 1 << 20
        received = read_exactly(client, (1 << 20) - lost)
        assert received == b"z" * len(received)
        notice = f"\r\n[pyvmm: {lost} bytes lost]\r\n".encode()
        assert read_exactly(client, len(notice)) == notice
        console.write(b"again")
        assert read_exactly(client, 5) == b"again"


def test_a_client_is_not_read_while_the_guest_takes_no_input(served: tuple[SocketConsole, str], guest: Guest) -> None:
    _, path = served
    guest.take = 0
    with attach(path) as client:
        client.setblocking(False)
        sent = 0
        while select.select([], [client], [], 0.2)[1] and sent < 16 << 20:
            sent += client.send(b"i" * 4096)
        assert sent < 16 << 20
        assert guest.refused.wait(20)
        assert guest.idle()


def test_closing_sends_what_was_written_last(tmp_path: Path) -> None:
    console = SocketConsole(str(tmp_path / "c"))
    console.start(Guest().receive)
    console.write(b">")
    with attach(str(tmp_path / "c")) as client:
        assert read_exactly(client, 1) == b">"
        console.write(b"Power down")
        console.close()
        assert read_exactly(client, 10) == b"Power down"
        assert client.recv(1) == b""


def test_a_console_that_never_started_closes(tmp_path: Path) -> None:
    console = SocketConsole(str(tmp_path / "c"))
    console.write(b"x")
    console.close()
    assert os.listdir(tmp_path) == []
