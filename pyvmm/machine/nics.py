"""The NICs of one machine: made from its configuration, plugged in and out and changed while it runs.

Only loaded by VMs that have a NIC, or are given one.
"""

from __future__ import annotations

import threading

from devices.network.errors import SwitchError
from pyvmm.core.worker import Worker
from pyvmm.machine.cable import Cable
from pyvmm.machine.config import ConfigError
from pyvmm.machine.nic_config import MAX_NICS, change_nic, check_nics, make_mac
from pyvmm.machine.outcome import EXIT_FAILED, EXIT_HOST, EXIT_USAGE, MachineError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

    from devices.network.port import Nic
    from pyvmm.core.clock import Clock
    from pyvmm.core.trace import GuestLog
    from pyvmm.machine.config import VmConfig
    from pyvmm.machine.nic_config import NicConfig
    from pyvmm.machine.synthetic import SyntheticDevices

_EXIT_CODES = {"host": EXIT_HOST, "usage": EXIT_USAGE, "missing": EXIT_USAGE}


class Slot:
    """One NIC: its number, its address (six bytes), its cable, and its device once somebody has made that."""

    def __init__(self, number: int, type: str, mac: str, cable: Cable) -> None:
        self.number = number
        self.type = type
        self.mac = bytes.fromhex(mac.replace(":", ""))
        self.cable = cable
        self.nic: Nic | None = None

    @property
    def name(self) -> str:
        """As switches know it."""
        return f"nic{self.number}"

    def attach(self, nic: Nic) -> None:
        """Join the device to the cable."""
        self.nic = nic
        self.cable.attach(nic)

    def inspect(self) -> dict[str, Any]:
        """What it is and what its cable leads to, as plain JSON data."""
        return {"nic": self.number, "type": self.type, "mac": self.mac.hex(":"), **self.cable.inspect()}


class Nics:
    """Plugs in the NICs of `config`, which `validate` has checked; raises MachineError with nothing left open.

    `synthetic` gives the VMBus devices; it is only called for what changes later. Any thread may call the methods; what
    they refuse is a ConfigError or a SwitchError.
    """

    def __init__(
        self,
        config: VmConfig,
        synthetic: Callable[[], SyntheticDevices],
        log: GuestLog,
        clock: Clock,
        on_error: Callable[[BaseException], None],
    ) -> None:
        self._vm = config.name
        self._synthetic = synthetic
        self._log = log
        self._clock = clock
        self._lock = threading.Lock()  # one NIC comes, goes or changes at a time
        self._slots: dict[int, Slot] = {}
        # Ports tell of themselves there, as their own threads must not wait for who waits for them.
        self._worker = Worker("nics", on_error, clock)
        self._worker.start()
        # Those that say their address come first, so that no other one is given it.
        for number, nic in sorted(enumerate(config.nics), key=lambda item: item[1].mac is None):
            self._slots[number] = self._make(number, nic)
        try:
            for slot in self._slots.values():
                slot.cable.plug_in()
        except SwitchError as error:
            self.close()
            raise MachineError(str(error), _EXIT_CODES.get(error.kind, EXIT_FAILED)) from error
        except BaseException:
            self.close()
            raise

    def _make(self, number: int, config: NicConfig) -> Slot:
        mac = config.mac or make_mac(self._vm, number, {slot.mac.hex(":") for slot in self._slots.values()})
        cable = Cable(self._vm, f"nic{number}", mac, config, self._worker, self._clock, self._log)
        return Slot(number, config.type, mac, cable)

    def slots(self, type: str) -> list[Slot]:
        """The synthetic or the legacy ones, by number."""
        with self._lock:
            return [slot for _, slot in sorted(self._slots.items()) if slot.type == type]

    # While the VM runs -----------------------------------------------------------------------------

    def add(self, config: NicConfig) -> dict[str, Any]:
        """Plug a synthetic NIC in."""
        if config.type != "synthetic":
            raise ConfigError("legacy NICs are there from the start or not at all; leave type=legacy out")
        synthetic = self._synthetic()
        with self._lock:
            check_nics([*self._configs(), config])
            number = next(number for number in range(MAX_NICS) if number not in self._slots)
            if config.mac in [slot.mac.hex(":") for slot in self._slots.values()]:
                raise ConfigError(f"another NIC of the VM has MAC address {config.mac}")
            slot = self._make(number, config)
            slot.cable.plug_in()
            try:
                synthetic.plug_nic(slot)
            except BaseException:
                slot.cable.cut()
                raise
            self._slots[number] = slot
            return slot.inspect()

    def remove(self, number: int) -> dict[str, Any]:
        """Unplug a synthetic NIC, and give its port back."""
        synthetic = self._synthetic()
        with self._lock:
            slot = self._find(number)
            if slot.type != "synthetic":
                raise ConfigError(f"nic {number} is a legacy NIC, which stays")
            told = slot.inspect()
            synthetic.unplug_nic(slot)
            del self._slots[number]
            slot.cable.cut()
            return told

    def change(self, number: int, text: str) -> dict[str, Any]:
        """Connect a NIC elsewhere, or set its port; `text` is what `change_nic` reads."""
        with self._lock:
            slot = self._find(number)
            now = slot.cable.config
            config = change_nic(now, text)
            if (config.type, config.mac) != (now.type, now.mac):
                raise ConfigError("type and mac of a NIC stay as they are")
            check_nics([config, *self._configs(but=slot)])
            slot.cable.change(config)
            return slot.inspect()

    def _configs(self, but: Slot | None = None) -> Iterable[NicConfig]:
        return (slot.cable.config for slot in self._slots.values() if slot is not but)

    def _find(self, number: int) -> Slot:
        if number not in self._slots:
            known = ", ".join(map(str, sorted(self._slots))) or "none"
            raise ConfigError(f"the VM has no nic {number}; it has {known}")
        return self._slots[number]

    def inspect(self) -> list[dict[str, Any]]:
        """All NICs with their cables."""
        return [slot.inspect() for _, slot in sorted(self._slots.items())]

    def close(self) -> None:
        """Give all ports back; the devices don't run any more."""
        self._worker.stop()
        for slot in self._slots.values():
            slot.cable.cut()
