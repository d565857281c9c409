"""Profiles that users write themselves, in TOML. Imported only where one is asked for: it brings a parser."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from enlightenments import selection
from enlightenments.catalog import ENLIGHTENMENTS
from enlightenments.selection import PROFILES, Selection
from pyvmm.core import toml_file

# `selection` checks the names, with better messages than the type's; the schema has them all the same.
_Name = Annotated[str, msgspec.Meta(extra_json_schema={"enum": list(ENLIGHTENMENTS)})]


class CustomProfile(msgspec.Struct, forbid_unknown_fields=True):
    """What may stand in the file."""

    base: Annotated[
        str, msgspec.Meta(description="profile to start from", extra_json_schema={"enum": list(PROFILES)})
    ] = "full"
    add: Annotated[list[_Name], msgspec.Meta(description="enlightenments to add")] = []
    remove: Annotated[
        list[_Name], msgspec.Meta(description="enlightenments to remove, and with them what needs them")
    ] = []
    spinlocks: Annotated[
        int | str | None,
        msgspec.Meta(description="how often a guest tries for a lock before it tells of that, or never"),
    ] = None
    vendor_id: Annotated[
        str | None,
        msgspec.Meta(description="vendor in CPUID, 1 to 12 printable ASCII characters; Linux wants Microsoft Hv"),
    ] = None
    version: Annotated[str | None, msgspec.Meta(description="version in CPUID, MAJOR.MINOR.BUILD")] = None


def load(path: str) -> Selection:
    """The selection that the file at `path` describes; raises ValueError with file, key and reason."""
    file = toml_file.decode(toml_file.read(path), path, CustomProfile)
    settings: dict[str, Any] = {}
    key = "base"
    try:
        base = selection.profile(file.base)
        for key in ("add", "remove"):
            for name in getattr(file, key):
                selection.check_name(name)
        for key in ("spinlocks", "vendor_id", "version"):
            value = getattr(file, key)
            if value is not None:
                settings.update(selection.parse_setting(key.replace("_", "-"), str(value)))
    except ValueError as error:
        raise ValueError(f"{path}: {key}: {error}") from error
    try:
        return base.changed(file.add, file.remove, settings)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def schema() -> dict[str, Any]:
    """The JSON schema of such a file."""
    return msgspec.json.schema(CustomProfile)
