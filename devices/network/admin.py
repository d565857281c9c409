"""Making, showing and deleting switches, for commands and tools."""

from __future__ import annotations

import os
from typing import Any

from devices.network import client, definition, places, planes, protocol
from devices.network.definition import SwitchDefinition, SwitchType
from devices.network.errors import SwitchError

#: Removing what the host has of a switch may take the kernel a while.
_STOP_S = 60
_TRIES = 3


def create(made: SwitchDefinition) -> None:
    """Define a switch. One that the host is on is there from now on; a private one starts with its first VM.

    Raises SwitchError, and then there is no such switch.
    """
    definition.check(made)
    planes.plane_for(made)
    definition.store(made)
    if made.type is not SwitchType.PRIVATE:
        try:
            client.start(made.name)
        except BaseException:
            definition.remove(made.name)
            lock = places.lock(made.name)
            if lock is not None:
                places.tidy(made.name)
                os.close(lock)
            raise


def describe(name: str) -> dict[str, Any]:
    """All about a switch, as plain data; the same keys whether it runs or not. Raises SwitchError."""
    found = definition.load(name)
    try:
        shown = client.ask(name, protocol.Show())
    except SwitchError as error:
        if error.kind != "stopped":
            raise
        shown = stopped(found)
    del shown["ok"]
    return shown


def stopped(found: SwitchDefinition) -> dict[str, Any]:
    """What `protocol.Show` would give if nothing ran."""
    return {
        "ok": True,
        **definition.plain(found),
        "state": "stopped",
        "pid": None,
        "plane": None,
        "plane_reason": None,
        "host_interface": None,
        "learned_outside": 0,
        "ports": [],
    }


def delete(name: str, force: bool = False) -> None:
    """End and forget a switch; refused while VMs are on it, unless by force. Raises SwitchError."""
    places.check_name(name)
    if name not in definition.names():
        raise SwitchError(f"no switch {name}", "missing")
    for _ in range(_TRIES):
        try:
            client.ask(name, protocol.Stop(force=force, delete=True), _STOP_S)
            return
        except SwitchError as error:
            if error.kind != "stopped":
                raise
        lock = places.lock(name)
        if lock is None:
            client.start(name)  # another process does so just now: wait for that
            continue
        try:
            if not _left_behind(name, force):
                definition.remove(name)
                places.tidy(name)
                return
        finally:
            os.close(lock)
        client.start(name)
    raise SwitchError(f"switch {name}: its service ends again and again; see {places.running(name, 'log')}")


def _left_behind(name: str, force: bool) -> bool:
    """Whether the host has something left of a service that was killed, which a new one would remove."""
    return not force and os.path.lexists(places.running(name, "sock"))
