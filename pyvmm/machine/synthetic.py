"""The VMBus of a machine with its devices: SCSI controllers and integration components.

Imported when a guest, or the user, first needs it; it costs start-up time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from devices.synthetic.ic.heartbeat import Heartbeat
from devices.synthetic.ic.shutdown import Shutdown
from devices.synthetic.ic.timesync import TimeSync
from devices.synthetic.storvsp.vsp import LUNS, StorVsp, subchannels_for
from devices.vmbus.bus import VmBus

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from devices.storage.backend import Disk
    from enlightenments.partition import Partition
    from pyvmm.core.clock import Clock
    from pyvmm.core.memory import GuestMemory
    from pyvmm.core.trace import GuestLog, Tracer
    from pyvmm.machine.config import DiskConfig

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
        disks: list[tuple[DiskConfig, Disk]],
        tracer: Tracer,
        log: GuestLog,
        clock: Clock,
        on_error: Callable[[BaseException], None],
    ) -> None:
        assert partition.reference is not None
        self._vp_count = partition.vp_count
        self._disks: dict[int, dict[int, Disk]] = {0: {}}
        for config, disk in disks:
            luns = self._disks.setdefault(config.controller, {})
            luns[_free_lun(luns)] = disk
        self.bus = VmBus(memory, partition, on_error, clock, tracer, log)
        self.shutdown_component = Shutdown(clock)
        # The other components are served by the first one's thread.
        self.heartbeat = Heartbeat(clock, self.shutdown_component)
        self.timesync = TimeSync(clock, partition.reference.now, self.shutdown_component)
        for component in (self.shutdown_component, self.heartbeat, self.timesync):
            self.bus.add_device(component)
        self._controllers: dict[int, StorVsp] = {}
        for index, luns in sorted(self._disks.items()):
            self._add_controller(index, luns)

    def _add_controller(self, index: int, luns: dict[int, Disk]) -> StorVsp:
        controller = StorVsp(index, luns, subchannels_for(self._vp_count))
        self._controllers[index] = controller
        self.bus.add_device(controller)
        return controller

    def add_disk(self, config: DiskConfig, disk: Disk) -> dict[str, Any]:
        """Plug in a disk at the controller's next free LUN; raises ValueError if there is none."""
        luns = self._disks.setdefault(config.controller, {})
        lun = _free_lun(luns)
        luns[lun] = disk
        controller = self._controllers.get(config.controller)
        if controller is None:
            self._add_controller(config.controller, luns)
        else:
            controller.add_disk(lun, disk)
        return {"controller": config.controller, "lun": lun, "path": config.path}

    def remove_disk(self, controller: int, lun: int) -> dict[str, Any]:
        """Unplug a disk and close it; raises ValueError if there is none."""
        if controller not in self._controllers:
            raise ValueError(f"there is no SCSI controller {controller}")
        disk = self._controllers[controller].remove_disk(lun)
        del self._disks[controller][lun]
        disk.close()
        return {"controller": controller, "lun": lun, "path": disk.path}

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
        """End all threads; close the disks."""
        self.bus.stop()
        for luns in self._disks.values():
            for disk in luns.values():
                disk.close()

    def inspect(self) -> dict[str, Any]:
        """The bus with its devices."""
        return self.bus.inspect()


def _free_lun(luns: dict[int, Disk]) -> int:
    for lun in range(LUNS):
        if lun not in luns:
            return lun
    raise ValueError(f"all {LUNS} LUNs of the controller are taken")
