"""The VMBus of a machine with its devices: SCSI controllers and integration components.

Imported when a guest, or the user, first needs it; it costs start-up time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from devices.synthetic.ic.heartbeat import Heartbeat
from devices.synthetic.ic.shutdown import Shutdown
from devices.synthetic.ic.timesync import TimeSync
from devices.synthetic.storvsp.ide import IdeAccelerator
from devices.synthetic.storvsp.qos import Limits
from devices.synthetic.storvsp.vsp import StorVsp, subchannels_for
from devices.vmbus.bus import VmBus

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from typing import Any

    from devices.storage.backend import Disk
    from devices.synthetic.netvsp.vsp import NetVsp
    from enlightenments.partition import Partition
    from pyvmm.core.clock import Clock
    from pyvmm.core.memory import GuestMemory
    from pyvmm.core.trace import GuestLog, Tracer
    from pyvmm.machine.disks import Slot
    from pyvmm.machine.nics import Slot as NicSlot

_SHUTDOWN_MESSAGES = {
    "accepted": "the guest is shutting down",
    "refused": "the guest refused",
    "no-driver": "the guest has no driver for the shutdown integration service",
    "busy": "another request is waiting for the guest's answer",
    "no-answer": "the guest did not answer in time",
    "disconnected": "the guest's integration service went away",
}


class SyntheticDevices:
    """Made running. The first controller is always there, so that a disk can be plugged in later."""

    def __init__(
        self,
        partition: Partition,
        memory: GuestMemory,
        controllers: dict[int, dict[int, Slot]],
        ide_disks: Mapping[tuple[int, int], Disk],
        nics: Iterable[NicSlot],
        tracer: Tracer,
        log: GuestLog,
        clock: Clock,
        on_error: Callable[[BaseException], None],
    ) -> None:
        assert partition.reference is not None
        self._vp_count = partition.vp_count
        self.bus = VmBus(memory, partition, on_error, clock, tracer, log)
        self.shutdown_component = Shutdown(clock)
        # The other components are served by the first one's thread.
        self.heartbeat = Heartbeat(clock, self.shutdown_component)
        self.timesync = TimeSync(clock, partition.reference.now, self.shutdown_component)
        for component in (self.shutdown_component, self.heartbeat, self.timesync):
            self.bus.add_device(component)
        self._controllers: dict[int, StorVsp] = {}
        for index, slots in controllers.items():
            self._add_controller(index, slots.values())
        for (channel, unit), disk in ide_disks.items():
            if not disk.optical:  # CDs are the IDE controller's alone, as on Hyper-V
                self.bus.add_device(IdeAccelerator(channel, unit, disk))
        self._nics: dict[int, NetVsp] = {}
        for nic in nics:
            self.plug_nic(nic)

    def change_disc(self, slot: Slot, disc: Disk | None, force: bool) -> Disk | None:
        """Change what is in a CD or DVD drive; see `StorVsp.change_disc`."""
        return self._controllers[slot.controller].change_disc(slot.lun, disc, force)

    def _add_controller(self, index: int, slots: Iterable[Slot]) -> None:
        controller = StorVsp(index, {}, subchannels_for(self._vp_count))
        for slot in slots:
            _plug(controller, slot)
        self._controllers[index] = controller
        self.bus.add_device(controller)

    def plug(self, slot: Slot) -> None:
        """Show the guest a disk that was not there, on a new controller if it must be."""
        controller = self._controllers.get(slot.controller)
        if controller is None:
            self._add_controller(slot.controller, [slot])
        else:
            _plug(controller, slot)

    def unplug(self, slot: Slot) -> None:
        """Take a disk away from the guest; return once no command uses it."""
        self._controllers[slot.controller].remove_disk(slot.lun)

    def resize(self, slot: Slot, size: int) -> None:
        """Make a disk larger and have the guest notice; raises what `StorVsp.resize_disk` raises."""
        self._controllers[slot.controller].resize_disk(slot.lun, size)

    def plug_nic(self, slot: NicSlot) -> None:
        """Show the guest a NIC that was not there."""
        from devices.synthetic.netvsp import vsp as netvsp  # VMs without NICs start faster without it

        nic = self._nics[slot.number] = netvsp.NetVsp(slot.number, slot.mac, netvsp.subchannels_for(self._vp_count))
        slot.attach(nic)
        self.bus.add_device(nic)

    def unplug_nic(self, slot: NicSlot) -> None:
        """Take a NIC away from the guest."""
        self.bus.remove_device(self._nics.pop(slot.number))

    def shutdown(self, timeout: float, restart: bool) -> dict[str, Any]:
        """Ask the guest to shut down; tell whether it obeyed."""
        result = self.shutdown_component.request(restart=restart, timeout_s=timeout)
        message = _SHUTDOWN_MESSAGES[result.outcome]
        if result.status is not None and not result.accepted:
            message += f" (status {result.status:#010x})"
        return {"obeyed": result.accepted, "message": message}

    def reset(self) -> None:
        """The guest is gone: all channels closed, devices as at power-on."""
        self.bus.reset()

    def pause(self) -> None:
        """Stop all devices and their threads."""
        self.bus.pause()

    def resume(self) -> None:
        """Go on."""
        self.bus.resume()

    def close(self) -> None:
        """End all threads."""
        self.bus.stop()

    def inspect(self) -> dict[str, Any]:
        """The bus with its devices."""
        return self.bus.inspect()


def _plug(controller: StorVsp, slot: Slot) -> None:
    assert slot.disk is not None, "a drive is only plugged in with a disc"
    iops, bandwidth = slot.config.iops, slot.config.bandwidth
    limits = Limits(iops, bandwidth) if iops is not None or bandwidth is not None else None
    controller.add_disk(slot.lun, slot.disk, limits)
