"""The control socket: how other processes of the same user steer a running VM.

JSON lines over a unix stream socket. A request is one line, ``{"command": NAME, ...arguments}``; its reply is
one line, ``{"version": 1, "ok": true, ...}`` or ``{"version": 1, "ok": false, "error": TEXT}``. Requests of
one connection are answered in order; each connection has its own thread, so that a shutdown which waits for
the guest holds up nobody else. docs/cli.md lists the commands.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time

from pyvmm.machine.config import (
    MAX_CONTROLLERS,
    MAX_DISK,
    MAX_LUNS,
    MIN_BANDWIDTH,
    MIN_IOPS,
    SECTOR_SIZES,
    DiskConfig,
    check_disk,
    parse_nic,
)
from pyvmm.machine.unix_socket import UnixListener

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from pyvmm.machine.machine import Machine

VERSION = 1
MAX_REQUEST = 64 << 10
MAX_CLIENTS = 8
DEFAULT_SHUTDOWN_S = 30.0
_MAX_SHUTDOWN_S = 3600.0
_MAX_LIMIT = 1 << 50
_MAX_NIC = 99
#: How long a client may take to read a reply, and how long closing waits for replies under way.
_SEND_S = 10.0
_CLOSE_S = 2.0
_ACCEPT_PAUSE_S = 0.1


class RequestError(Exception):
    """A request that is refused; the message goes back to the client."""


class Commands:
    """Answers requests on behalf of one VM, without knowing how they came in."""

    def __init__(self, machine: Machine, name: str) -> None:
        self._machine = machine
        self._name = name
        #: By name: the arguments that a command knows, and what carries it out.
        self._table: dict[str, tuple[tuple[str, ...], Callable[[_Arguments], dict[str, Any]]]] = {
            "add-disk": (tuple(DiskConfig.__annotations__), self._add_disk),
            "add-nic": (("spec",), self._add_nic),
            "eject": (("bus", "controller", "lun", "force"), self._eject),
            "enlightenments": ((), lambda _: machine.enlightenments()),
            "insert": (("bus", "controller", "lun", "path"), self._insert),
            "inspect": (("path",), self._inspect),
            "list-nics": ((), lambda _: {"nics": machine.nics().inspect()}),
            "pause": ((), lambda _: self._control(machine.pause)),
            "poweroff": ((), lambda _: self._request(machine.poweroff, "power-off")),
            "remove-disk": (("controller", "lun"), self._remove_disk),
            "remove-nic": (("nic",), lambda arguments: machine.nics().remove(_nic(arguments))),
            "reset": ((), lambda _: self._request(machine.reset, "reset")),
            "resize-disk": (("controller", "lun", "size"), self._resize_disk),
            "resume": ((), lambda _: self._control(machine.resume)),
            "set-nic": (("nic", "spec"), self._set_nic),
            "shutdown": (("timeout", "restart"), self._shutdown),
            "status": ((), lambda _: self._status()),
        }

    def answer(self, line: bytes) -> bytes:
        """Carry out the request in `line` and return the reply, newline included. Raises nothing."""
        try:
            reply = {"version": VERSION, "ok": True, **self._run(line)}
            return json.dumps(reply).encode() + b"\n"
        except Exception as error:  # noqa: BLE001 - whatever a command runs into, its client hears of it
            return refusal(str(error) or type(error).__name__)

    def _run(self, line: bytes) -> dict[str, Any]:
        try:
            request = json.loads(line)
        except (ValueError, RecursionError):
            raise RequestError("the request is not JSON") from None
        if not isinstance(request, dict):
            raise RequestError("the request is not a JSON object")
        name = request.pop("command", None)
        if not isinstance(name, str) or name not in self._table:
            raise RequestError(f"unknown command: choose from {', '.join(self._table)}")
        known, action = self._table[name]
        unknown = sorted(set(request).difference(known))
        if unknown:
            raise RequestError(f"{name} has no argument {unknown[0]!r}")
        return action(_Arguments(request))

    def _control(self, action: Callable[[], object]) -> dict[str, Any]:
        action()
        return {"state": self._machine.state}

    def _request(self, action: Callable[[], object], what: str) -> dict[str, Any]:
        action()
        return {"message": f"{what} requested"}

    def _status(self) -> dict[str, Any]:
        return {"name": self._name, "pid": os.getpid(), "state": self._machine.state}

    def _add_disk(self, arguments: _Arguments) -> dict[str, Any]:
        config = DiskConfig(arguments.path(), arguments.flag("readonly"))
        if arguments.has("bus"):
            config.bus = arguments.text("bus")
        config.controller = arguments.integer("controller", 0, MAX_CONTROLLERS - 1, default=0)
        if arguments.has("lun"):
            config.lun = arguments.integer("lun", 0, MAX_LUNS - 1)
        if arguments.has("format"):
            config.format = arguments.text("format")
        if arguments.has("sector_size"):
            config.sector_size = arguments.integer("sector_size", 1, max(SECTOR_SIZES))
        if arguments.has("iops"):
            config.iops = arguments.integer("iops", MIN_IOPS, _MAX_LIMIT)
        if arguments.has("bandwidth"):
            config.bandwidth = arguments.integer("bandwidth", MIN_BANDWIDTH, _MAX_LIMIT)
        check_disk(config)
        return self._machine.disks.add(config)

    def _remove_disk(self, arguments: _Arguments) -> dict[str, Any]:
        return self._machine.disks.remove(*self._place(arguments))

    def _eject(self, arguments: _Arguments) -> dict[str, Any]:
        return self._machine.disks.eject(
            *self._place(arguments), arguments.flag("force"), arguments.text("bus", "scsi")
        )

    def _insert(self, arguments: _Arguments) -> dict[str, Any]:
        return self._machine.disks.insert(*self._place(arguments), arguments.path(), arguments.text("bus", "scsi"))

    def _resize_disk(self, arguments: _Arguments) -> dict[str, Any]:
        return self._machine.disks.resize(*self._place(arguments), arguments.integer("size", 1, MAX_DISK))

    def _add_nic(self, arguments: _Arguments) -> dict[str, Any]:
        return self._machine.nics().add(parse_nic(arguments.text("spec")))

    def _set_nic(self, arguments: _Arguments) -> dict[str, Any]:
        return self._machine.nics().change(_nic(arguments), arguments.text("spec"))

    def _place(self, arguments: _Arguments) -> tuple[int, int]:
        controller = arguments.integer("controller", 0, MAX_CONTROLLERS - 1)
        return controller, arguments.integer("lun", 0, MAX_LUNS - 1)

    def _shutdown(self, arguments: _Arguments) -> dict[str, Any]:
        timeout = arguments.seconds("timeout", DEFAULT_SHUTDOWN_S, _MAX_SHUTDOWN_S)
        return self._machine.shutdown(timeout, arguments.flag("restart"))

    def _inspect(self, arguments: _Arguments) -> dict[str, Any]:
        node: Any = self._machine.inspect()
        walked = ""
        for step in arguments.text("path", "").split("/"):
            if not step:
                continue
            children = _children(node)
            if step not in children:
                known = ", ".join(list(children)[:40]) or "nothing"
                raise RequestError(f"{walked or 'the VM'} has no {step!r}; it has {known}")
            node = children[step]
            walked = f"{walked}/{step}" if walked else step
        return {"inspect": node}


class _Arguments:
    """The arguments of one request, checked as they are taken."""

    def __init__(self, values: dict[str, Any]) -> None:
        self._values = values

    def has(self, name: str) -> bool:
        return self._values.get(name) is not None

    def text(self, name: str, default: str | None = None) -> str:
        value = self._values.get(name, default)
        if not isinstance(value, str) or "\0" in value:
            raise RequestError(f"{name}: expected a string without NUL")
        return value

    def path(self) -> str:
        path = self.text("path")
        if not os.path.isabs(path):
            raise RequestError("path: it is not absolute")
        return path

    def flag(self, name: str) -> bool:
        value = self._values.get(name, False)
        if not isinstance(value, bool):
            raise RequestError(f"{name}: expected true or false")
        return value

    def integer(self, name: str, low: int, high: int, default: int | None = None) -> int:
        value = self._values.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise RequestError(f"{name}: expected a whole number, {low} to {high}")
        return value

    def seconds(self, name: str, default: float, high: float) -> float:
        value = self._values.get(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= high:
            raise RequestError(f"{name}: expected seconds, more than 0 and up to {high:g}")
        return float(value)


def _nic(arguments: _Arguments) -> int:
    return arguments.integer("nic", 0, _MAX_NIC)


def _children(node: Any) -> dict[str, Any]:
    if isinstance(node, dict):
        return {str(key): value for key, value in node.items()}
    if isinstance(node, list | tuple):
        return {str(index): value for index, value in enumerate(node)}
    return {}


def refusal(error: str) -> bytes:
    """The reply that says why a request was not carried out."""
    return json.dumps({"version": VERSION, "ok": False, "error": error}).encode() + b"\n"


class ControlServer:
    """Listens at `path` (mode 0600) for up to MAX_CLIENTS clients; raises ConfigError if it cannot."""

    def __init__(self, path: str, commands: Commands) -> None:
        self._commands = commands
        self._listener = UnixListener(path, "control")
        self._lock = threading.Lock()
        self._clients: dict[socket.socket, threading.Thread] = {}
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._accept, name="control", daemon=True)

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def close(self) -> None:
        """Take no more requests, finish the replies under way and remove the socket."""
        if self._closing.is_set():
            return
        self._closing.set()
        # shutdown() and not close(): it wakes the thread that waits in accept() or recv().
        _shut(self._listener.socket, socket.SHUT_RDWR)
        if self._thread.ident is not None:
            self._thread.join()
        with self._lock:
            clients = list(self._clients.items())
        for client, _ in clients:
            _shut(client, socket.SHUT_RD)
        deadline = time.monotonic() + _CLOSE_S
        for _, thread in clients:
            thread.join(max(0.0, deadline - time.monotonic()))
        self._listener.close()

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                client, _ = self._listener.socket.accept()
            except OSError:
                self._closing.wait(_ACCEPT_PAUSE_S)  # out of file descriptors, or closing
                continue
            with self._lock:
                full = len(self._clients) >= MAX_CLIENTS
                if not full:
                    thread = threading.Thread(target=self._serve, args=(client,), name="control-client", daemon=True)
                    self._clients[client] = thread
                    thread.start()
            if full:
                _send(client, refusal(f"more than {MAX_CLIENTS} clients"))
                client.close()

    def _serve(self, client: socket.socket) -> None:
        with client, client.makefile("rb") as requests:
            while not self._closing.is_set():
                try:
                    line = requests.readline(MAX_REQUEST + 1)
                except OSError:
                    break
                if not line:
                    break
                if len(line) > MAX_REQUEST:
                    _send(client, refusal(f"the request is longer than {MAX_REQUEST} bytes"))
                    break
                if not _send(client, self._commands.answer(line)):
                    break
        with self._lock:
            del self._clients[client]


def _send(client: socket.socket, reply: bytes) -> bool:
    """Send all of `reply`; False if the client has gone or does not read."""
    try:
        client.settimeout(_SEND_S)
        client.sendall(reply)
        client.settimeout(None)
    except OSError:
        return False
    return True


def _shut(connection: socket.socket, how: int) -> None:
    try:
        connection.shutdown(how)
    except OSError:  # not connected any more
        pass
