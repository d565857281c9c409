"""The kit's tests, read from its sources: each one's name and the TLFS section that it names."""

from __future__ import annotations

import re

from guests.conformance.build import SOURCE

#: ``expect("topic.name", "section", ...)`` and its like; names in tables stand there in the same way.
_TEST = re.compile(r'"(?P<name>[a-z0-9]+\.\w+)",\s*"(?P<section>[^"]*)"')


def sections() -> dict[str, str]:
    """Test name to TLFS section, for every test that the kit can print."""
    found: dict[str, str] = {}
    for path in sorted(SOURCE.glob("*.c")):
        found |= {match["name"]: match["section"] for match in _TEST.finditer(path.read_text())}
    return found


def topics() -> list[str]:
    """The topics in the order in which they run."""
    table = (SOURCE / "main.c").read_text().split("} topics[] = {")[1].split("};")[0]
    return re.findall(r'\{"(\w+)",', table)
