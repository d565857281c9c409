"""VM files: TOML that is checked against `VmConfig`, and the JSON schema of what may stand in one.

The checking types are made from the annotations of VmConfig, so that a field is declared once. Relative
paths in a VM file count from the file's folder.
"""

from __future__ import annotations

import json
import os
import typing
from typing import Annotated, Any, Literal

import msgspec

from enlightenments.catalog import ENLIGHTENMENTS
from enlightenments.selection import PROFILES, SETTINGS
from pyvmm.core import toml_file
from pyvmm.machine.config import (
    DESCRIPTIONS,
    DISK_BUSES,
    DISK_FORMATS,
    MAX_CONTROLLERS,
    MAX_CPUS,
    MAX_LUNS,
    MAX_NAME,
    MIN_IOPS,
    SECTOR_SIZES,
    SMBIOS_IDENTITIES,
    ConfigError,
    DiskConfig,
    VmConfig,
    format_size,
    parse_size,
    split_com1,
)
from pyvmm.machine.nic_config import (
    MAX_VLAN,
    MIN_VLAN,
    NIC_DESCRIPTIONS,
    NIC_TYPES,
    NicConfig,
    format_rate,
    parse_mac,
    parse_rate,
)

_DESCRIPTIONS = {
    **DESCRIPTIONS,
    "enlightenments": f"{DESCRIPTIONS['enlightenments']}. PROFILE[,+NAME|,-NAME|,SETTING=VALUE]...; "
    f"profiles: {', '.join(PROFILES)}, or a file PATH.toml; names: {', '.join(ENLIGHTENMENTS)}; "
    f"settings: {', '.join(SETTINGS)}",
}


def _struct(cls: type, replaced: dict[str, Any], descriptions: dict[str, str] = _DESCRIPTIONS) -> type[msgspec.Struct]:
    fields: list[tuple[str, Any, Any]] = []
    for name, kind in typing.get_type_hints(cls, localns={"NicConfig": NicConfig}).items():
        kind = Annotated[replaced.get(name, kind), msgspec.Meta(description=descriptions[name])]
        if name in ("disks", "nics"):
            default: Any = msgspec.field(default_factory=list)
        else:
            default = getattr(cls, name, msgspec.NODEFAULT)
        fields.append((name, kind, default))
    return msgspec.defstruct(cls.__name__, fields, forbid_unknown_fields=True)


_Disk = _struct(
    DiskConfig,
    {
        "bus": Literal[*DISK_BUSES],
        "controller": Annotated[int, msgspec.Meta(ge=0, lt=MAX_CONTROLLERS)],
        "lun": Annotated[int, msgspec.Meta(ge=0, lt=MAX_LUNS)] | None,
        "format": Literal[*DISK_FORMATS] | None,
        "sector_size": Literal[*SECTOR_SIZES] | None,
        "iops": Annotated[int, msgspec.Meta(ge=MIN_IOPS)] | None,
        "bandwidth": int | str | None,
    },
)
_Vlan = Annotated[int, msgspec.Meta(ge=MIN_VLAN, le=MAX_VLAN)]
_Nic = _struct(
    NicConfig,
    {
        "type": Literal[*NIC_TYPES],
        "vlan": _Vlan | None,
        "trunk": tuple[_Vlan, ...],
        "native": _Vlan | None,
        "bandwidth": int | str | None,
    },
    NIC_DESCRIPTIONS,
)
_Vm = _struct(
    VmConfig,
    {
        "name": Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_NAME)],
        "cpus": Annotated[int, msgspec.Meta(ge=1, le=MAX_CPUS)],
        "memory": int | str,
        "smbios": Literal[*SMBIOS_IDENTITIES] | None,
        "disks": list[_Disk],  # type: ignore[valid-type]
        "nics": list[_Nic],  # type: ignore[valid-type]
        "timeout": Annotated[float, msgspec.Meta(gt=0)] | None,
    },
)


def load(path: str) -> VmConfig:
    """Read the VM file at `path`; raises ConfigError with the place of the error in it.

    The values fit their types; whether they make a VM is for `validate` to say, after the caller's changes.
    """
    try:
        text = toml_file.read(path)
    except ValueError as error:
        raise ConfigError(f"VM file {error}") from error
    return parse(text, path)


def parse(text: bytes, path: str) -> VmConfig:
    """`load` for a text that stands, or would stand, at `path`."""
    try:
        loaded = toml_file.decode(text, path, _Vm)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    values: dict[str, Any] = msgspec.structs.asdict(loaded)
    folder = os.path.dirname(path)
    if isinstance(values["memory"], str):
        try:
            values["memory"] = parse_size(values["memory"])
        except ConfigError as error:
            raise ConfigError(f"{path}: memory: {error}") from error
    values["disks"] = [_disk(disk, folder, f"{path}: disks[{index}]") for index, disk in enumerate(values["disks"])]
    values["nics"] = [_nic(nic, f"{path}: nics[{index}]") for index, nic in enumerate(values["nics"])]
    for name in ("kernel", "initrd", "firmware", "control"):
        if values[name]:
            values[name] = os.path.join(folder, values[name])
    profile, comma, changes = values["enlightenments"].partition(",")
    if profile.endswith(".toml"):
        profile = os.path.join(folder, profile)
        if "," in profile:
            raise ConfigError(f"{path}: enlightenments: a profile's path cannot hold a comma: {profile}")
        values["enlightenments"] = profile + comma + changes
    try:
        kind, target = split_com1(values["com1"])
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    if target:
        values["com1"] = f"{kind}:{os.path.join(folder, target)}"
    return VmConfig(**values)


def _disk(loaded: Any, folder: str, where: str) -> DiskConfig:
    values: dict[str, Any] = msgspec.structs.asdict(loaded)
    if values["path"]:
        values["path"] = os.path.join(folder, values["path"])
    if isinstance(values["bandwidth"], str):
        try:
            values["bandwidth"] = parse_size(values["bandwidth"])
        except ConfigError as error:
            raise ConfigError(f"{where}.bandwidth: {error}") from error
    return DiskConfig(**values)


def _nic(loaded: Any, where: str) -> NicConfig:
    values: dict[str, Any] = msgspec.structs.asdict(loaded)
    for name, read in (("mac", parse_mac), ("bandwidth", parse_rate)):
        if isinstance(values[name], str):
            try:
                values[name] = read(values[name])
            except ConfigError as error:
                raise ConfigError(f"{where}.{name}: {error}") from error
    return NicConfig(**values)


def schema() -> dict[str, Any]:
    """The JSON schema of a VM file."""
    return msgspec.json.schema(_Vm)


def to_dict(config: VmConfig) -> dict[str, Any]:
    """Every field of `config` as plain data, in the order of its definition."""
    values: dict[str, Any] = {name: getattr(config, name) for name in VmConfig.__annotations__}
    values["disks"] = [dict(vars(disk)) for disk in config.disks]
    for disk in values["disks"]:
        if disk["bandwidth"] is not None:
            disk["bandwidth"] = format_size(disk["bandwidth"])
    values["nics"] = [{name: getattr(nic, name) for name in NicConfig.__annotations__} for nic in config.nics]
    for nic in values["nics"]:
        if nic["bandwidth"] is not None:
            nic["bandwidth"] = format_rate(nic["bandwidth"])
    values["memory"] = format_size(config.memory)
    return values


def to_toml(config: VmConfig) -> str:
    """A VM file that gives `config` again; fields without a value are left out."""
    values = to_dict(config)
    tables = {name: values.pop(name) for name in ("disks", "nics")}
    lines = _lines(values)
    for name, devices in tables.items():
        for device in devices:
            lines += ["", f"[[{name}]]", *_lines(device)]
    return "\n".join(lines) + "\n"


def _lines(values: dict[str, Any]) -> list[str]:
    return [f"{name} = {_toml(value)}" for name, value in values.items() if value is not None]


def _toml(value: bool | float | str | tuple[int | str, ...]) -> str:
    """One TOML value. JSON's forms are TOML's too, except that TOML wants DEL escaped."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
