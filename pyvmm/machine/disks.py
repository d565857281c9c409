"""The disks of one machine: opened from its configuration, each at its place, plugged in and out while it runs."""

from __future__ import annotations

import threading

from pyvmm.machine.config import IDE_CHANNELS, IDE_UNITS, MAX_LUNS, ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from devices.storage.backend import Disk
    from pyvmm.machine.board import Board
    from pyvmm.machine.config import DiskConfig
    from pyvmm.machine.synthetic import SyntheticDevices


class Slot:
    """One disk at its place: `lun` of SCSI controller, or IDE channel, `controller`. A CD or DVD drive may be without
    `disk`."""

    def __init__(self, config: DiskConfig, controller: int, lun: int, disk: Disk) -> None:
        self.config = config
        self.controller = controller
        self.lun = lun
        self.optical = disk.optical
        self.disk: Disk | None = disk


class Disks:
    """Opens `configs`, whose places `validate` has checked; raises ConfigError with nothing left open.

    `synthetic` gives the SCSI controllers and `board` the IDE controller; they are only called for what changes later.
    Methods may be called from any thread; what they refuse is a ConfigError.
    """

    def __init__(
        self, configs: Sequence[DiskConfig], synthetic: Callable[[], SyntheticDevices], board: Callable[[], Board]
    ) -> None:
        self._synthetic = synthetic
        self._board = board
        self._lock = threading.Lock()  # one disk comes or goes at a time
        self._slots: dict[tuple[str, int, int], Slot] = {}
        try:
            # Those that say where they go come first, so that the others do not take their places.
            for config in sorted(configs, key=lambda config: config.lun is None):
                self._open(config)
        except BaseException:
            self.close()
            raise

    def _open(self, config: DiskConfig) -> Slot:
        bus, controller, lun = place = self._place(config)
        disk = _open(config.path, config.readonly, config.format, config.sector_size)
        if bus == "ide" and not disk.optical and disk.sector_size != 512:
            disk.close()
            raise ConfigError(f"{config.path}: sectors of {disk.sector_size} bytes; IDE disks have 512: use bus=scsi")
        slot = self._slots[place] = Slot(config, controller, lun, disk)
        return slot

    def _place(self, config: DiskConfig) -> tuple[str, int, int]:
        controllers = range(config.controller, IDE_CHANNELS) if config.bus == "ide" else (config.controller,)
        luns = range(IDE_UNITS if config.bus == "ide" else MAX_LUNS)
        if config.lun is not None:
            controllers, luns = (config.controller,), range(config.lun, config.lun + 1)
        for controller in controllers:
            for lun in luns:
                if (config.bus, controller, lun) not in self._slots:
                    return config.bus, controller, lun
        if config.bus == "ide":
            raise ConfigError(f"{config.path}: no place is free from IDE channel {config.controller} on")
        if config.lun is None:
            raise ConfigError(f"all {MAX_LUNS} LUNs of controller {config.controller} are taken")
        raise ConfigError(f"LUN {config.lun} of controller {config.controller} is taken")

    def ide(self) -> dict[tuple[int, int], Disk]:
        """The disks of the IDE controller by channel and place."""
        return {
            (slot.controller, slot.lun): slot.disk
            for (bus, _, _), slot in self._slots.items()
            if bus == "ide" and slot.disk is not None
        }

    def controllers(self) -> dict[int, dict[int, Slot]]:
        """The SCSI slots by controller and LUN; the first controller is always there, to be filled later."""
        found: dict[int, dict[int, Slot]] = {0: {}}
        for (bus, controller, lun), slot in sorted(self._slots.items()):
            if bus == "scsi":
                found.setdefault(controller, {})[lun] = slot
        return found

    def add(self, config: DiskConfig) -> dict[str, Any]:
        """Plug a disk in; return its place."""
        if config.bus != "scsi":
            raise ConfigError("IDE disks are there from the start or not at all; leave bus=ide out")
        synthetic = self._synthetic()
        with self._lock:
            slot = self._open(config)
            synthetic.plug(slot)
        return {"controller": slot.controller, "lun": slot.lun, "path": config.path}

    def remove(self, controller: int, lun: int) -> dict[str, Any]:
        """Unplug a disk once no command uses it, and close it."""
        synthetic = self._synthetic()
        with self._lock:
            slot = self._find(controller, lun)
            synthetic.unplug(slot)
            del self._slots["scsi", controller, lun]
            lost = _close(slot.disk)
        if lost is not None:
            raise ConfigError(lost)
        return {"controller": controller, "lun": lun, "path": slot.disk.path if slot.disk is not None else None}

    def insert(self, controller: int, lun: int, path: str, bus: str = "scsi") -> dict[str, Any]:
        """Put the ISO image at `path` into a CD or DVD drive, in place of the disc that may be in it."""
        with self._lock:
            slot = self._find_drive(controller, lun, bus)
            disc = _open(path, True, "iso")
            try:
                self._change(slot, disc, False)
            except BaseException:
                disc.close()
                raise
        return {"controller": controller, "lun": lun, "path": path}

    def eject(self, controller: int, lun: int, force: bool = False, bus: str = "scsi") -> dict[str, Any]:
        """Take the disc out of a CD or DVD drive; with `force` also if the guest has locked it in."""
        with self._lock:
            slot = self._find_drive(controller, lun, bus)
            old = slot.disk
            if old is None:
                raise ConfigError(f"the drive at LUN {lun} of controller {controller} is empty")
            self._change(slot, None, force)
            return {"controller": controller, "lun": lun, "path": old.path}

    def _change(self, slot: Slot, disc: Disk | None, force: bool) -> None:
        from devices.storage.mmc import MediumLocked

        owner = self._board() if slot.config.bus == "ide" else self._synthetic()
        try:
            old = owner.change_disc(slot, disc, force)
        except MediumLocked:
            raise ConfigError(
                "the guest uses the disc and has locked the drive; it has been asked to let go: try again, or --force"
            ) from None
        slot.disk = disc
        if old is not None:
            old.close()

    def _find_drive(self, controller: int, lun: int, bus: str) -> Slot:
        slot = self._find(controller, lun, bus)
        if not slot.optical:
            raise ConfigError(f"at LUN {lun} of controller {controller} is a hard disk, not a CD or DVD drive")
        return slot

    def resize(self, controller: int, lun: int, size: int) -> dict[str, Any]:
        """Make a disk larger, under the guest's eyes."""
        from devices.storage.backend import DiskError

        synthetic = self._synthetic()
        with self._lock:
            slot = self._find(controller, lun)
            try:
                synthetic.resize(slot, size)
            except (DiskError, ValueError) as error:
                raise ConfigError(str(error)) from error
            except OSError as error:
                raise ConfigError(f"{slot.config.path}: cannot be resized: {error.strerror}") from error
        return {"controller": controller, "lun": lun, "path": slot.config.path, "size": size}

    def _find(self, controller: int, lun: int, bus: str = "scsi") -> Slot:
        slot = self._slots.get((bus, controller, lun))
        if slot is None:
            raise ConfigError(f"there is no disk at LUN {lun} of controller {controller}")
        return slot

    def close(self) -> str | None:
        """Close all disks: what was written is on stable storage then, or the line returned tells of the first loss."""
        lost = [_close(slot.disk) for slot in self._slots.values()]
        self._slots.clear()
        return next(filter(None, lost), None)


def _open(path: str, readonly: bool, format: str | None, sector_size: int | None = None) -> Disk:
    from devices.storage.backend import DiskError
    from devices.storage.images import open_image

    try:
        return open_image(path, readonly, format, sector_size=sector_size)
    except DiskError as error:
        raise ConfigError(str(error)) from error


def _close(disk: Disk | None) -> str | None:
    if disk is None:
        return None
    try:
        disk.close()
    except OSError as error:
        return f"{disk.path}: the guest's last writes may be lost: {error.strerror}"
    return None
