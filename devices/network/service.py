"""The process of one switch: it owns the data plane, gives VM processes ports, and takes them back.

``python -m devices.network.service NAME FD`` starts it, detached; what comes of that is told in one message through
the pipe FD. One thread does everything but carrying frames, and never waits for a client: each has at most one request
under way, whose reply must be gone before the next is read.
"""

from __future__ import annotations

import os
import selectors
import socket
import struct
import sys
import time
from typing import Any

import msgspec

from devices.network import addresses, protocol
from devices.network.definition import plain
from devices.network.errors import SwitchError
from devices.network.plane import PlaneError
from devices.network.settings import PortSettings

TYPE_CHECKING = False
if TYPE_CHECKING:
    import contextlib
    from collections.abc import Callable

    from devices.network.switch import Switch

#: Connections without a port, such as those of commands; one more, and the one that was quiet longest is closed.
MAX_VISITORS = 64
#: Bytes, after which the log begins anew.
MAX_LOG = 1 << 20
_HEARD_AT_ONCE = 64
_PAUSE_S = 0.1


class _Client:
    def __init__(self, connection: socket.socket, pid: int) -> None:
        self.connection = connection
        self.pid = pid
        self.port: int | None = None
        self.reply: tuple[bytes, int] | None = None  # not taken yet, and the descriptor with it or -1
        self.stale = False  # somebody else has changed the port's settings, which the client hasn't been told

    def set_reply(self, reply: dict[str, Any], fd: int = -1) -> None:
        """Have `reply` sent, and `fd` with it, which is closed then."""
        text, file = protocol.encode(reply)
        self.reply = text, fd if file < 0 else file

    def send_reply(self) -> None:
        """Send what waits; raises BlockingIOError while there is no room, another OSError if the client has gone."""
        if self.reply is not None:
            text, fd = self.reply
            socket.send_fds(self.connection, [text], [fd] if fd >= 0 else [], socket.MSG_NOSIGNAL)
            self._forget_reply()

    def farewell(self) -> None:
        """Send what waits, if the client takes it at once, and close."""
        try:
            self.send_reply()
        except OSError:
            pass
        self.close()

    def close(self) -> None:
        self.connection.close()
        self._forget_reply()

    def _forget_reply(self) -> None:
        if self.reply is not None and self.reply[1] >= 0:
            os.close(self.reply[1])
        self.reply = None


class Service:
    """Serves the clients of `listener` until told to stop. `heard` is a socket of `addresses.listen`."""

    def __init__(self, switch: Switch, listener: socket.socket, heard: socket.socket | None = None) -> None:
        self._switch = switch
        self._name = f"switch {switch.definition.name}"
        self._listener = listener
        self._heard = heard
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._stopping = False
        self._stopper: _Client | None = None  # waits for the end
        #: Called now and then: each time that somebody connects.
        self.on_visit: Callable[[], None] = lambda: None
        self._clients: dict[_Client, None] = {}  # the one that was quiet longest first
        self._resting: dict[socket.socket, tuple[float, Callable[[], None]]] = {}
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._wake, selectors.EVENT_READ, self._woken)
        self._selector.register(listener, selectors.EVENT_READ, self._accept)
        if heard is not None:
            self._selector.register(heard, selectors.EVENT_READ, self._hear)
        if switch.nat is not None:
            self._selector.register(switch.nat, selectors.EVENT_READ, self._check_nat)

    def stop(self) -> None:
        """Have `serve` return; any thread or signal handler, harmless after `close`."""
        if self._wake >= 0:
            os.eventfd_write(self._wake, 1)

    def serve(self) -> None:
        """Answer until `stop`, or until a client asks for the end."""
        while not self._stopping:
            for key, mask in self._selector.select(self._until_rested()):
                if isinstance(key.data, _Client):
                    if key.data in self._clients:
                        self._attend(key.data, mask)
                else:
                    key.data()

    def close(self, tidy: Callable[[], None] = lambda: None) -> None:
        """Close all connections and ports, then `tidy`; only then whoever asked for the end hears of it."""
        for client in list(self._clients):
            if client is not self._stopper:
                self._drop(client)
        reply: dict[str, Any] = {"ok": True}
        try:
            tidy()
        except PlaneError as error:
            reply = _refusal(f"{self._name}: {error}", "host")
            _log(str(error))
        if self._stopper is not None:
            self._stopper.set_reply(reply)
            self._stopper.farewell()
        self._selector.close()
        self._listener.close()
        if self._heard is not None:
            self._heard.close()
        wake, self._wake = self._wake, -1
        os.close(wake)

    def _woken(self) -> None:
        self._stopping = True

    def _rest(self, source: socket.socket, callback: Callable[[], None]) -> None:
        """Leave `source` alone for a while."""
        self._selector.unregister(source)
        self._resting[source] = time.monotonic() + _PAUSE_S, callback

    def _until_rested(self) -> float | None:
        now = time.monotonic()
        for source, (until, callback) in list(self._resting.items()):
            if until <= now:
                del self._resting[source]
                self._selector.register(source, selectors.EVENT_READ, callback)
        return min((until - now for until, _ in self._resting.values()), default=None)

    def _hear(self) -> None:
        assert self._heard is not None
        for _ in range(_HEARD_AT_ONCE):
            try:
                frame = self._heard.recv(addresses.SNAP)
            except BlockingIOError:
                return
            except OSError:  # the interface went down, or is gone
                break
            self._switch.addresses.hear(frame)
        self._rest(self._heard, self._hear)

    def _check_nat(self) -> None:
        assert self._switch.nat is not None
        try:
            told = self._switch.nat.check()
        except PlaneError as error:
            told = str(error)
        if told:
            _log(told)

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError:  # no file descriptors: there may be some later
            self._rest(self._listener, self._accept)
            return
        connection.setblocking(False)
        pid, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        client = _Client(connection, pid)
        if uid not in (0, os.geteuid()):
            client.set_reply(_refusal(f"{self._name} belongs to another user"))
            client.farewell()
            return
        visitors = [each for each in self._clients if each.port is None]
        if len(visitors) >= MAX_VISITORS:
            self._drop(visitors[0])
        self._clients[client] = None
        self._selector.register(connection, selectors.EVENT_READ, client)
        self.on_visit()

    def _attend(self, client: _Client, mask: int) -> None:
        self._clients[client] = self._clients.pop(client)  # the last to be quiet longest
        if mask & selectors.EVENT_WRITE:
            self._flush(client)
        elif mask & selectors.EVENT_READ:
            self._read(client)

    def _read(self, client: _Client) -> None:
        try:
            text = client.connection.recv(protocol.MAX_MESSAGE + 1)
        except BlockingIOError:
            return
        except OSError:
            text = b""
        if not text:
            self._drop(client)
            return
        try:
            if len(text) > protocol.MAX_MESSAGE:
                raise SwitchError(f"a request has at most {protocol.MAX_MESSAGE} bytes", "usage")
            reply, fd = self._answer(client, text)
        except SwitchError as error:
            reply, fd = _refusal(str(error), error.kind), -1
        except PlaneError as error:
            reply, fd = _refusal(f"{self._name}: {error}", "host"), -1
        except Exception as error:  # noqa: BLE001 - a bug in one request leaves the other VMs their network
            import traceback

            traceback.print_exc()
            reply, fd = _refusal(f"{self._name}: internal error: {type(error).__name__}: {error}"), -1
        if client is not self._stopper:
            client.set_reply(reply, fd)
            self._flush(client)

    def _answer(self, client: _Client, text: bytes) -> tuple[dict[str, Any], int]:
        """The reply to one request, and the descriptor that goes with it or -1."""
        try:
            request = msgspec.json.decode(text, type=protocol.REQUESTS)
        except (msgspec.DecodeError, RecursionError) as error:
            raise SwitchError(f"request refused: {error}", "usage") from error
        match request:
            case protocol.Plug():
                return self._plug(client, request.settings)
            case protocol.Offloads():
                self._switch.set_offloads(self._own(client), request.offloads)
            case protocol.Change():
                self._switch.change(self._own(client), request.settings)
            case protocol.Show(port=None):
                return {"ok": True, **self._show()}, -1
            case protocol.Show(port=str(port)):
                return {"ok": True, **self._switch.show_port(self._switch.find(port))}, -1
            case protocol.Set():
                return {"ok": True, **self._set(client, request)}, -1
            case protocol.Mirror():
                number = self._switch.find(request.port)
                if request.path is not None and not (os.path.isabs(request.path) and request.path.isprintable()):
                    raise SwitchError(f"mirror {request.path!r}: an absolute path is wanted", "usage")
                self._switch.mirror(number, request.path)
                return {"ok": True, **self._switch.show_port(number)}, -1
            case protocol.Stop():
                self._end(client, request)
        return {"ok": True}, -1

    def _plug(self, client: _Client, settings: PortSettings) -> tuple[dict[str, Any], int]:
        if client.port is not None:
            raise SwitchError(f"{self._name}: one port for each connection", "usage")
        number, fd = self._switch.plug(settings, client.pid)
        client.port = number
        return {"ok": True, "port": number, "mtu": self._switch.definition.mtu}, fd

    def _own(self, client: _Client) -> int:
        if client.port is None:
            raise SwitchError(f"{self._name}: the connection has no port", "usage")
        return client.port

    def _show(self) -> dict[str, Any]:
        return {
            **plain(self._switch.definition),
            "state": "running",
            "pid": os.getpid(),
            **self._switch.show(),
        }

    def _set(self, client: _Client, request: protocol.Set) -> dict[str, Any]:
        number = self._switch.find(request.port)
        old = self._switch.settings(number)
        try:
            settings = msgspec.convert({**msgspec.to_builtins(old), **request.changes}, PortSettings)
        except msgspec.ValidationError as error:
            raise SwitchError(f"port {request.port}: {error}", "usage") from error
        self._switch.change(number, settings)
        shown = self._switch.show_port(number)
        for other in self._clients:
            if other.port == number and other is not client:
                other.stale = True
                self._flush(other)  # which may find that it has gone
                break
        return shown

    def _end(self, client: _Client, request: protocol.Stop) -> None:
        count = self._switch.ports
        if count and not request.force:
            plural = "" if count == 1 else "s"
            raise SwitchError(f"{self._name}: {count} port{plural} in use: end the VMs first, or use --force")
        if request.delete:
            from devices.network import definition

            definition.remove(self._switch.definition.name)
        self._stopper = client
        self._stopping = True

    def _flush(self, client: _Client) -> None:
        """Send what the client has to hear, and see to it that the rest goes once it takes that."""
        try:
            client.send_reply()
        except BlockingIOError:
            pass
        except OSError:
            self._drop(client)
            return
        if client.reply is None and client.stale and client.port is not None:
            settings = msgspec.to_builtins(self._switch.settings(client.port))
            try:
                client.connection.send(protocol.encode({"event": "settings", "settings": settings})[0])
                client.stale = False
            except BlockingIOError:
                pass
            except OSError:
                self._drop(client)
                return
        events = selectors.EVENT_WRITE if client.reply is not None or client.stale else selectors.EVENT_READ
        self._selector.modify(client.connection, events, client)

    def _drop(self, client: _Client) -> None:
        del self._clients[client]
        self._selector.unregister(client.connection)
        client.close()
        if client.port is not None:
            try:
                self._switch.unplug(client.port)
            except PlaneError as error:
                _log(str(error))


def _refusal(error: str, kind: str = "refused") -> dict[str, Any]:
    return {"ok": False, "error": " ".join(error.split()), "kind": kind}


def main(name: str, ready: int) -> None:
    """Be the service of switch `name`, from here on in a process of its own; tell `ready` what comes of it."""
    if os.fork():
        os._exit(0)  # whoever started it need not wait for its end
    os.setsid()
    os.umask(0o077)
    os.set_inheritable(ready, False)
    told = False

    def tell(reply: dict[str, Any]) -> None:
        nonlocal told
        if not told:
            told = True
            try:
                os.write(ready, protocol.encode(reply)[0])
            except OSError:
                pass  # it has given up
            os.close(ready)

    try:
        _run(name, tell)
    except SwitchError as error:
        tell(_refusal(str(error), error.kind))
        _log(str(error))
        sys.exit(1)
    except PlaneError as error:
        tell(_refusal(f"switch {name}: {error}", "host"))
        _log(str(error))
        sys.exit(1)


def _run(name: str, tell: Callable[[dict[str, Any]], None]) -> None:
    import contextlib
    import resource
    import signal

    from devices.network import definition as definitions
    from devices.network import places, planes
    from devices.network.switch import Switch

    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, 65536) if most >= 0 else 65536, most))
    with contextlib.ExitStack() as made:
        if not _take_lock(name, made):
            tell({"ok": True})  # somebody else was faster
            return
        definition = definitions.load(name)
        chosen, reason = planes.plane_for(definition)
        plane = planes.make(definition, chosen)
        made.callback(plane.close)
        plane.open()
        if plane.host_interface is not None:
            planes.set_addresses(plane.host_interface, definition.addresses)
        nat = None
        if definition.type == "nat" and plane.host_interface is not None:
            from devices.network.nat import Nat

            nat = Nat(definition, plane.host_interface)
            made.callback(nat.stop)
            nat.start()
        heard = _listen(plane.host_interface or definition.interface)
        path = places.running(name, "sock")
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        try:
            _remove(path)  # if it is there its service was killed, since the lock is ours
            os.umask(0o177)
            listener.bind(path)
            os.umask(0o077)
            listener.listen(128)
        except OSError as error:
            raise SwitchError(f"switch {name}: {path}: {error.strerror or error}", "host") from error
        service = Service(Switch(definition, plane, reason, nat), listener, heard)
        service.on_visit = _trim_log
        made.callback(_remove, path)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: service.stop())
        _log(f"started on the {chosen} plane: {reason}")
        tell({"ok": True})
        try:
            service.serve()
        finally:
            service.close(made.close)
    _log("ended")


def _take_lock(name: str, made: contextlib.ExitStack) -> bool:
    """Whether this is the one service of the switch from here on; False if another one answers."""
    from devices.network import client, places

    deadline = time.monotonic() + client.START_S / 2
    while True:
        lock = places.lock(name)
        if lock is not None:
            made.callback(os.close, lock)
            made.callback(places.tidy, name)
            return True
        if client.running(name):
            return False
        if time.monotonic() > deadline:
            raise SwitchError(f"switch {name}: whoever has locked {places.running(name, 'lock')} does not answer")
        time.sleep(_PAUSE_S)


def _listen(interface: str | None) -> socket.socket | None:
    if interface is None:
        return None
    try:
        return addresses.listen(interface)
    except OSError as error:
        _log(f"no addresses of VMs are learned: {interface}: {error.strerror}")
        return None


def _remove(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass


def _trim_log() -> None:
    if os.fstat(2).st_size > MAX_LOG:
        os.truncate(2, 0)


def _log(text: str) -> None:
    print(time.strftime("%Y-%m-%d %H:%M:%S"), text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
