"""What one VM is made of: the single definition behind the command line, VM files and their JSON schema.

This module is on the start-up path and so imports little; reading VM files stands in
`pyvmm.machine.config_file`.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pyvmm.machine.nic_config import NicConfig

MIB = 1 << 20
MAX_CPUS = 64
MIN_MEMORY = MIB
MAX_MEMORY = 1 << 40
#: A Hyper-V VM has up to four SCSI controllers with up to 64 disks each.
MAX_CONTROLLERS = 4
MAX_LUNS = 64
#: An IDE controller has two channels with two drives each.
IDE_CHANNELS = IDE_UNITS = 2
MAX_NAME = 64
#: The largest disk of Hyper-V's largest format.
MAX_DISK = 64 << 40
#: The smallest limits of a disk: below them a guest would take its disk for broken.
MIN_IOPS = 10
MIN_BANDWIDTH = 64 << 10
SECTOR_SIZES = (512, 4096)
DISK_FORMATS = ("raw", "vhd", "vhdx", "iso")
DISK_BUSES = ("scsi", "ide")
DISK_FORM = "PATH[,readonly][,bus=ide][,controller=N][,lun=N][,format=F][,sector_size=N][,iops=N][,bandwidth=SIZE]"
NIC_FORM = (
    "switch=NAME|user|tap=INTERFACE|none[,type=legacy][,mac=M][,link=down][,vlan=N|,trunk=N,N...[,native=N]][,bandwidth=RATE]"
    "[,mac_spoofing][,dhcp_guard][,router_guard][,forward=tcp:[ADDRESS:]PORT:PORT]..."
)
#: What guests are told by SMBIOS that they run on.
SMBIOS_IDENTITIES = ("hyper-v", "pyvmm")

_PAGE_SIZE = 4096
_SIZE_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


class ConfigError(Exception):
    """Something the user asked for cannot be done; the message is one line that says what to change."""


class DiskConfig:
    """A disk on one of the VM's synthetic SCSI controllers, by default at the next free LUN there.

    With `bus` "ide" it is a drive of the IDE controller instead: `controller` is its channel and `lun` its place there,
    by default the next free place from that channel on. Optical images are CD drives.
    `format` None is what the path's suffix tells, `sector_size` (bytes) is for a raw image. `iops` (commands/s) and
    `bandwidth` (bytes/s) are limits.
    """

    path: str
    readonly: bool = False
    bus: str = "scsi"
    controller: int = 0
    lun: int | None = None
    format: str | None = None
    sector_size: int | None = None
    iops: int | None = None
    bandwidth: int | None = None

    def __init__(
        self,
        path: str,
        readonly: bool = False,
        controller: int = 0,
        lun: int | None = None,
        format: str | None = None,
        iops: int | None = None,
        bandwidth: int | None = None,
        bus: str = "scsi",
        sector_size: int | None = None,
    ) -> None:
        self.path = path
        self.readonly = readonly
        self.bus = bus
        self.controller = controller
        self.lun = lun
        self.format = format
        self.sector_size = sector_size
        self.iops = iops
        self.bandwidth = bandwidth


class VmConfig:
    """One VM. `memory` is in bytes, `timeout` in seconds."""

    name: str = "vm"
    kernel: str | None = None
    initrd: str | None = None
    cmdline: str = ""
    firmware: str | None = None
    cpus: int = 1
    memory: int = 256 * MIB
    huge_pages: bool = False
    disks: list[DiskConfig]
    nics: list[NicConfig]
    enlightenments: str = "full"
    smbios: str | None = None
    com1: str = "stdio"
    control: str | None = None
    reboot: bool = True
    testdev: bool = False
    timeout: float | None = None

    def __init__(self, **values: Any) -> None:
        self.disks = []
        self.nics = []
        for name, value in values.items():
            if name not in VmConfig.__annotations__:
                raise TypeError(f"a VM has no {name!r}")
            setattr(self, name, value)


#: What each field of VmConfig and DiskConfig (NICs have theirs in nic_config) means, for help texts and the schema.
DESCRIPTIONS = {
    "name": "name of the VM",
    "kernel": "kernel to boot: bzImage, ELF vmlinux or Multiboot",
    "initrd": "initial RAM disk for the kernel; a Multiboot kernel's module",
    "cmdline": "kernel command line",
    "firmware": "raw ROM image, mapped to end at 4 GiB and started at the reset vector",
    "cpus": f"number of virtual processors, 1 to {MAX_CPUS}",
    "memory": "guest memory, such as 512M or 2GiB",
    "huge_pages": "back guest memory with transparent huge pages",
    "disks": "disks on the synthetic SCSI controllers and on the IDE controller",
    "nics": "network adapters, synthetic or legacy",
    "enlightenments": "what the guest sees of Hyper-V: a profile and changes, such as full,-stimer-direct",
    "smbios": f"what SMBIOS calls the machine: {', '.join(SMBIOS_IDENTITIES)}; by default hyper-v if there is VMBus. "
    "Under hyper-v, Linux's ata_piix leaves IDE disks to hv_storvsc",
    "com1": "where the first serial port goes: stdio, file:PATH, unix:PATH or none",
    "control": "unix socket on which 'pyvmm ctl' reaches the VM",
    "reboot": "start again when the guest resets, instead of ending",
    "testdev": "add QEMU's devices for test programs: isa-debug-exit (port 0xf4), pc-testdev, hyperv-testdev, fw_cfg",
    "timeout": "stop the VM after this many seconds",
    "path": "disk image",
    "readonly": "refuse the guest's writes",
    "bus": f"{' or '.join(DISK_BUSES)}",
    "controller": f"SCSI controller, 0 to {MAX_CONTROLLERS - 1}, or IDE channel, 0 or 1",
    "lun": f"place on the controller, 0 to {MAX_LUNS - 1}, or on the IDE channel, 0 or 1; by default the next free one",
    "format": f"format of the image: {', '.join(DISK_FORMATS)}; by default what its suffix tells, else raw",
    "sector_size": "bytes in a sector of a raw image: 512 or 4096; other formats have their own",
    "iops": "limit of commands per second",
    "bandwidth": "limit of bytes per second, such as 50M",
}


def parse_size(text: str) -> int:
    """Bytes from ``4096``, ``512M``, ``2GiB`` and the like, all powers of 1024. Raises ConfigError."""
    number = text.strip()
    upper = number.upper()
    unit = ""
    for suffix in ("IB", ""):
        stem = upper[: -len(suffix)] if suffix and upper.endswith(suffix) else upper
        if stem[-1:] in ("K", "M", "G", "T"):
            number, unit = stem[:-1].strip(), stem[-1]
            break
    if not (number.isascii() and number.isdigit()) or len(number) > 16:
        raise ConfigError(f"{text!r} is not a size: write a whole number with K, M, G or T, such as 512M or 2GiB")
    return int(number) * _SIZE_UNITS[unit]


def format_size(size: int) -> str:
    """The shortest exact form that `parse_size` reads back."""
    for unit in ("T", "G", "M", "K"):
        if size and size % _SIZE_UNITS[unit] == 0:
            return f"{size // _SIZE_UNITS[unit]}{unit}iB"
    return str(size)


_NUMBERS = ("controller", "lun", "sector_size", "iops")


def parse_disk(text: str) -> DiskConfig:
    """A disk from `DISK_FORM`. Raises ConfigError."""
    path, *options = text.split(",")
    disk = DiskConfig(path)
    for option in options:
        key, _, value = option.partition("=")
        if option == "readonly":
            disk.readonly = True
        elif key in _NUMBERS and value.isascii() and value.isdigit() and len(value) < 16:
            setattr(disk, key, int(value))
        elif key in ("format", "bus") and value:
            setattr(disk, key, value)
        elif key == "bandwidth" and value:
            disk.bandwidth = parse_size(value)
        else:
            raise ConfigError(f"disk {text!r}: unknown option {option!r}: write {DISK_FORM}")
    check_disk(disk)
    return disk


def parse_nic(text: str) -> NicConfig:
    """A NIC from `NIC_FORM`. Raises ConfigError."""
    from pyvmm.machine import nic_config  # VMs without NICs start faster without it

    return nic_config.parse_nic(text)


def parse_cdrom(path: str) -> DiskConfig:
    """The image in the IDE CD drive at its usual place, the first of the second channel. Raises ConfigError."""
    disk = DiskConfig(path, readonly=True, controller=1, lun=0, format="iso", bus="ide")
    check_disk(disk)
    return disk


def split_com1(spec: str) -> tuple[str, str]:
    """(kind, path) of a `VmConfig.com1`; the path is empty for ``stdio`` and ``none``. Raises ConfigError."""
    kind, colon, path = spec.partition(":")
    if (kind in ("stdio", "none") and not colon) or (kind in ("file", "unix") and path):
        return kind, path
    raise ConfigError(f"com1 {spec!r}: choose stdio, file:PATH, unix:PATH or none")


def check_disk(disk: DiskConfig) -> None:
    """Raise ConfigError unless the parts of `disk` fit together; looks at no file."""
    if not disk.path:
        raise ConfigError("a disk needs a path")
    if disk.bus not in DISK_BUSES:
        raise ConfigError(f"disk {disk.path}: bus {disk.bus!r}: choose {' or '.join(DISK_BUSES)}")
    controllers, places = (IDE_CHANNELS, IDE_UNITS) if disk.bus == "ide" else (MAX_CONTROLLERS, MAX_LUNS)
    if not 0 <= disk.controller < controllers:
        raise ConfigError(f"disk {disk.path}: controller {disk.controller} is not 0 to {controllers - 1}")
    if disk.lun is not None and not 0 <= disk.lun < places:
        raise ConfigError(f"disk {disk.path}: lun {disk.lun} is not 0 to {places - 1}")
    if disk.bus == "ide" and (disk.iops is not None or disk.bandwidth is not None):
        raise ConfigError(f"disk {disk.path}: an IDE disk has no limits; leave iops and bandwidth out")
    if disk.format is not None and disk.format not in DISK_FORMATS:
        raise ConfigError(f"disk {disk.path}: format {disk.format!r}: choose {', '.join(DISK_FORMATS)}")
    if disk.sector_size not in (None, *SECTOR_SIZES):
        choice = " or ".join(map(str, SECTOR_SIZES))
        raise ConfigError(f"disk {disk.path}: sector_size {disk.sector_size}: choose {choice}")
    if disk.iops is not None and disk.iops < MIN_IOPS:
        raise ConfigError(f"disk {disk.path}: iops {disk.iops} is less than {MIN_IOPS}")
    if disk.bandwidth is not None and disk.bandwidth < MIN_BANDWIDTH:
        raise ConfigError(f"disk {disk.path}: bandwidth {disk.bandwidth} is less than {format_size(MIN_BANDWIDTH)}/s")


def validate(config: VmConfig) -> None:
    """Raise ConfigError unless the parts of `config` make a VM; looks at no file."""
    if not (0 < len(config.name) <= MAX_NAME and config.name.isprintable()):
        raise ConfigError(f"name: {config.name!r} is not 1 to {MAX_NAME} printable characters")
    if not config.kernel and not config.firmware:
        raise ConfigError("nothing to start: give a kernel or a firmware")
    if config.kernel and config.firmware:
        raise ConfigError("give a kernel or a firmware, not both")
    if config.initrd and not config.kernel:
        raise ConfigError("an initrd needs a kernel")
    if config.cmdline and not config.kernel:
        raise ConfigError("a cmdline needs a kernel")
    if "\0" in config.cmdline:
        raise ConfigError("cmdline: it holds a NUL character")
    if not 1 <= config.cpus <= MAX_CPUS:
        raise ConfigError(f"cpus: {config.cpus} is not 1 to {MAX_CPUS}")
    if not MIN_MEMORY <= config.memory <= MAX_MEMORY:
        raise ConfigError(f"memory: {format_size(config.memory)} is not 1MiB to 1TiB")
    if config.memory % _PAGE_SIZE:
        raise ConfigError(f"memory: {config.memory} bytes is not a multiple of {_PAGE_SIZE}")
    if config.timeout is not None and not 0 < config.timeout < 1e9:
        raise ConfigError(f"timeout: {config.timeout} is not a positive number of seconds")
    _check_places(config.disks)
    if config.nics:
        from pyvmm.machine.nic_config import check_nics

        check_nics(config.nics)
    if config.smbios is not None and config.smbios not in SMBIOS_IDENTITIES:
        raise ConfigError(f"smbios {config.smbios!r}: choose {' or '.join(SMBIOS_IDENTITIES)}")
    split_com1(config.com1)
    from enlightenments.selection import parse_spec  # only where a VM is to be built, not for `pyvmm ctl`

    try:
        chosen = parse_spec(config.enlightenments)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if "vmbus" not in chosen and any(disk.bus == "scsi" for disk in config.disks):
        raise ConfigError("a disk needs the enlightenment vmbus, because its controller is a VMBus device, or bus=ide")
    if "vmbus" not in chosen and any(nic.type == "synthetic" for nic in config.nics):
        raise ConfigError("a synthetic NIC needs the enlightenment vmbus; or choose type=legacy")


def _check_places(disks: list[DiskConfig]) -> None:
    on_controller = [0] * MAX_CONTROLLERS
    on_ide = 0
    taken: set[tuple[str, int, int]] = set()
    for disk in disks:
        check_disk(disk)
        if disk.bus == "ide":
            on_ide += 1
            if on_ide > IDE_CHANNELS * IDE_UNITS:
                raise ConfigError(f"more than {IDE_CHANNELS * IDE_UNITS} disks on the IDE controller")
        else:
            on_controller[disk.controller] += 1
            if on_controller[disk.controller] > MAX_LUNS:
                raise ConfigError(f"more than {MAX_LUNS} disks on controller {disk.controller}")
        if disk.lun is not None:
            place = disk.bus, disk.controller, disk.lun
            if place in taken:
                what = "IDE channel" if disk.bus == "ide" else "controller"
                raise ConfigError(f"disk {disk.path}: lun {disk.lun} of {what} {disk.controller} is taken")
            taken.add(place)


def check_files(config: VmConfig) -> None:
    """Raise ConfigError for the first file that `config` names and that cannot be opened as it asks."""
    for what, path in (("kernel", config.kernel), ("initrd", config.initrd), ("firmware", config.firmware)):
        if path is not None:
            _check_file(what, path, os.R_OK)
    for disk in config.disks:
        readonly = disk.readonly or disk.format == "iso" or disk.path.lower().endswith(".iso")
        _check_file("disk", disk.path, os.R_OK if readonly else os.R_OK | os.W_OK)


def _check_file(what: str, path: str, mode: int) -> None:
    if "\0" in path:
        raise ConfigError(f"{what} {path!r}: the path holds a NUL character")
    if os.path.isdir(path):
        raise ConfigError(f"{what} {path}: it is a directory")
    if not os.path.exists(path):
        remedy = "; make it with pyvmm disk create" if what == "disk" else ""
        raise ConfigError(f"{what} {path}: no such file{remedy}")
    if not os.access(path, mode):
        kind = "written (add ,readonly to only read it)" if os.access(path, os.R_OK) else "read"
        raise ConfigError(f"{what} {path}: it cannot be {kind}: permission denied")
