"""QEMU's `hyperv-testdev`: a guest sees its own messages, events and interrupts come back by the SynIC.

Source: QEMU, hw/hyperv/hyperv_testdev.c; x86/hyperv.c of kvm-unit-tests is its user. Where QEMU aborts on a wrong
request, the VM ends with one line.
"""

from __future__ import annotations

import os
import threading

from devices.saved import check_version
from enlightenments.ports import SINTS
from pyvmm.core.bus import BusHandler
from pyvmm.core.device import Device, GuestViolation

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from devices.legacy.ports import PortRange
    from enlightenments.ports import Ports
    from pyvmm.core.worker import Worker

#: Takes 32 bits: from the lowest byte, SINT, VP index, what to do, connection id.
HYPERV_TESTDEV_PORT = 0x3000

ROUTE_CREATE, ROUTE_DESTROY, ROUTE_SET_SINT = 1, 2, 3
MESSAGE_CREATE, MESSAGE_DESTROY, EVENT_CREATE, EVENT_DESTROY = 4, 5, 6, 7


class HypervTestdev(Device, BusHandler):
    """Routes and connections lead to a SINT of a VP.

    Setting the SINT of a route interrupts its VP. A message posted to a message connection goes to its SINT, or is
    refused for want of buffers; an event signalled on an event connection sets the flag of the connection's number
    there, from `worker`'s thread.
    """

    name = "hyperv-testdev"

    def __init__(self, ports: Ports, worker: Worker) -> None:
        self._ports = ports
        self._worker = worker
        self._lock = threading.Lock()  # all below; never taken by the worker
        self._paused = False
        self._routes: set[tuple[int, int]] = set()
        # By connection id: VP and SINT, and the eventfd that a VP writes to.
        self._messages: dict[int, tuple[int, int]] = {}
        self._events: dict[int, tuple[int, int, int]] = {}
        self._commands: dict[int, Callable[[int, int, int], None]] = {
            ROUTE_CREATE: lambda vp, sint, _: self._routes.add((vp, sint)),
            ROUTE_DESTROY: lambda vp, sint, _: self._routes.remove((vp, sint)),
            ROUTE_SET_SINT: self._set_sint,
            MESSAGE_CREATE: self._create_message,
            MESSAGE_DESTROY: lambda vp, sint, connection: self._destroy_message(connection),
            EVENT_CREATE: self._create_event,
            EVENT_DESTROY: lambda vp, sint, connection: self._destroy_event(connection),
        }

    def ports(self) -> list[PortRange]:
        """The I/O ports to register."""
        return [(HYPERV_TESTDEV_PORT, 4, self, self.name)]

    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        if size != 4:
            return
        sint, vp, control, connection = value.to_bytes(4, "little")
        command = self._commands.get(control)
        if command is None:
            return
        if sint >= SINTS or vp >= self._ports.vp_count:
            raise GuestViolation(f"{self.name}: there is no SINT {sint} of VP {vp}")
        with self._lock:
            try:
                command(vp, sint, connection)
            except KeyError:
                raise GuestViolation(f"{self.name}: command {value:#x} is about what was never made") from None
            except (ValueError, RuntimeError) as error:
                raise GuestViolation(f"{self.name}: {error}") from error

    # Under the lock ---------------------------------------------------------------------------------

    def _set_sint(self, vp: int, sint: int, _: int) -> None:
        if (vp, sint) not in self._routes:
            raise KeyError
        self._ports.raise_sint(vp, sint)

    def _create_message(self, vp: int, sint: int, connection: int) -> None:
        self._ports.connect_message_port(
            connection, lambda kind, payload: self._ports.post_message(vp, sint, kind, payload)
        )
        self._messages[connection] = (vp, sint)

    def _destroy_message(self, connection: int) -> None:
        del self._messages[connection]
        self._ports.disconnect_message_port(connection)

    def _create_event(self, vp: int, sint: int, connection: int) -> None:
        eventfd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            self._ports.connect_event_port(connection, eventfd)
        except (ValueError, RuntimeError):
            os.close(eventfd)
            raise
        self._events[connection] = (vp, sint, eventfd)
        if not self._paused:
            self._listen(connection)

    def _listen(self, connection: int) -> None:
        vp, sint, eventfd = self._events[connection]
        self._worker.add_event(eventfd, lambda: self._ports.signal_event(vp, sint, connection))

    def _destroy_event(self, connection: int) -> None:
        _, _, eventfd = self._events.pop(connection)
        self._ports.disconnect_event_port(connection)
        self._worker.run(lambda: self._worker.remove_event(eventfd))
        os.close(eventfd)

    # Life cycle -------------------------------------------------------------------------------------

    def reset(self) -> None:
        with self._lock:
            self._routes.clear()
            for connection in list(self._messages):
                self._destroy_message(connection)
            for connection in list(self._events):
                self._destroy_event(connection)

    def pause(self) -> None:
        """Leave signals in their eventfds until `resume`."""
        with self._lock:
            self._paused = True
            for _, _, eventfd in self._events.values():
                self._worker.run(lambda eventfd=eventfd: self._worker.remove_event(eventfd))  # type: ignore[misc]

    def resume(self) -> None:
        with self._lock:
            self._paused = False
            for connection in self._events:
                self._listen(connection)

    def close(self) -> None:
        """Close the eventfds."""
        self.reset()

    def save(self) -> dict[str, Any]:
        events = []
        for connection, (vp, sint, eventfd) in self._events.items():
            events.append([connection, vp, sint, _is_rung(eventfd)])
        return {
            "version": 1,
            "routes": [list(route) for route in self._routes],
            "messages": [[connection, *target] for connection, target in self._messages.items()],
            "events": events,
        }

    def restore(self, state: dict[str, Any]) -> None:
        check_version(state, 1)
        try:
            for vp, sint in state["routes"]:
                self.write(0, 4, _command(ROUTE_CREATE, vp, sint))
            for connection, vp, sint in state["messages"]:
                self.write(0, 4, _command(MESSAGE_CREATE, vp, sint, connection))
            for connection, vp, sint, rung in state["events"]:
                self.write(0, 4, _command(EVENT_CREATE, vp, sint, connection))
                if rung:
                    os.eventfd_write(self._events[connection][2], 1)
        except (GuestViolation, ValueError, KeyError, TypeError) as error:
            self.reset()
            raise ValueError(f"saved state of {self.name} does not fit: {error}") from error

    def inspect(self) -> dict[str, Any]:
        with self._lock:
            return {
                "routes": sorted(list(route) for route in self._routes),
                "messages": {f"{connection:#x}": list(target) for connection, target in self._messages.items()},
                "events": {f"{connection:#x}": [vp, sint] for connection, (vp, sint, _) in self._events.items()},
            }


def _command(control: int, vp: int, sint: int, connection: int = 0) -> int:
    return int.from_bytes(bytes((sint, vp, control, connection)), "little")


def _is_rung(eventfd: int) -> bool:
    """Whether the eventfd holds a signal, which stays there."""
    try:
        count = os.eventfd_read(eventfd)
    except BlockingIOError:
        return False
    os.eventfd_write(eventfd, count)
    return True
