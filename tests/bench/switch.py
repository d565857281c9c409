"""Frames through the in-process switch, against a loop that does no more than carry messages between two sockets."""

from __future__ import annotations

import socket
import subprocess
import threading
from contextlib import ExitStack
from pathlib import Path

from devices.network.port import OFFLOAD_CHECKSUM, OFFLOAD_TSO4
from pyvmm.core._hot import Switch
from tests.bench.figures import Figure, Samples
from tests.bench.native import compile_c, output_of

_BUFFER = 4 << 20
_SO_SNDBUFFORCE = 32
_VNET = 10
_SEGMENT, _SEGMENTS = 1460, 44
_SMALL, _FULL, _LARGE = _VNET + 64, _VNET + 54 + _SEGMENT, _VNET + 54 + _SEGMENTS * _SEGMENT


def measure(folder: Path, rounds: int) -> list[Figure]:
    """Send `rounds` times by each in turn. Raises BenchError."""
    program = str(compile_c("frames", folder))
    return [
        _compare(program, rounds, "a frame of 64 bytes", 300_000, _words(_SMALL, 300_000, 128)),
        _compare(program, rounds, "a frame of 1514 bytes", 300_000, _words(_FULL, 300_000, 64)),
        _compare(program, rounds, "64 KiB of TCP, not cut", 40_000, _words(_LARGE, 40_000, 8, _SEGMENT)),
        _compare(
            program,
            rounds,
            f"64 KiB of TCP, cut into {_SEGMENTS}; {_SEGMENTS} frames",
            5_000,
            _words(_LARGE, 5_000, 2, _SEGMENT, _SEGMENTS),
            _words(_FULL, 5_000 * _SEGMENTS, 2 * _SEGMENTS),
        ),
    ]


def _words(size: int, count: int, window: int, segment: int = 0, parts: int = 1) -> tuple[str, ...]:
    """Of the program: messages of so many bytes, how many, how many under way, and what becomes of each."""
    return str(size), str(segment), str(count), str(window), str(parts)


def _compare(
    program: str, rounds: int, title: str, count: int, ours: tuple[str, ...], rivals: tuple[str, ...] = ()
) -> Figure:
    switch, relay = [], []
    for _ in range(rounds):
        switch.append(_by_switch(program, ours) / count / 1000)
        relay.append(_by_relay(program, rivals or ours) / count / 1000)
    return Figure(title, "us", Samples("switch", tuple(switch)), Samples("bare relay", tuple(relay)), 1.25)


def _pair(stack: ExitStack) -> tuple[socket.socket, socket.socket]:
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in ends:
        try:
            end.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _BUFFER)
        except PermissionError:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
        stack.enter_context(end)
    return ends


def _send(program: str, here: socket.socket, there: socket.socket, words: tuple[str, ...]) -> int:
    fds = here.fileno(), there.fileno()
    return output_of([program, "send", *map(str, fds), *words], fds)[0]


def _by_switch(program: str, words: tuple[str, ...]) -> int:
    with ExitStack() as stack:
        (a, a_switch), (b, b_switch) = _pair(stack), _pair(stack)
        switch = Switch()
        switch.add_port(1, "socket", a_switch.detach(), mac=bytes.fromhex("00155d000001"), mac_spoofing=False)
        switch.add_port(2, "socket", b_switch.detach(), mac=bytes.fromhex("00155d000002"), mac_spoofing=False)
        if words[-1] == "1":
            switch.set_offloads(2, OFFLOAD_CHECKSUM | OFFLOAD_TSO4)
        thread = threading.Thread(target=switch.run)
        thread.start()
        try:
            return _send(program, a, b, words)
        finally:
            switch.stop()
            thread.join()


def _by_relay(program: str, words: tuple[str, ...]) -> int:
    with ExitStack() as stack:
        (a, a_relay), (b, b_relay) = _pair(stack), _pair(stack)
        fds = a_relay.fileno(), b_relay.fileno()
        with subprocess.Popen([program, "relay", *map(str, fds)], pass_fds=fds) as relay:
            try:
                return _send(program, a, b, words)
            finally:
                relay.kill()
