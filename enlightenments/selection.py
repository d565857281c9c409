"""Which enlightenments a VM has: profiles, and the specification that a user writes."""

from __future__ import annotations

from enlightenments.catalog import ENLIGHTENMENTS, HOST_FEATURES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection

#: Never notify of long spin waits.
SPINLOCKS_NEVER = 0xFFFF_FFFF

#: Shootdowns and IPIs through user space are slower than those of the guest's own APIC, unless many VPs are idle.
_ON_REQUEST = {"tlbflush", "tlbflush-ext", "ipi"}
_FULL = frozenset(ENLIGHTENMENTS) - _ON_REQUEST

#: Named sets to start from.
PROFILES: dict[str, frozenset[str]] = {
    "full": _FULL,
    "minimal": frozenset({"base", "vpindex"}),
    "none": frozenset(),
    # Hyper-V of Windows Server 2008: no reference TSC consumers, no frequencies, no direct timers, no crash report.
    "windows-2008": frozenset({"base", "vpindex", "reset", "runtime", "time", "synic", "stimer", "relaxed", "vmbus"}),
}


class Selection:
    """The enlightenments of one VM and their settings.

    `wanted` are the names that the user asked for one by one. `spinlocks` is how often a guest tries for a lock before
    it tells of that; `version` is (build, major, minor) and `vendor_id` 12 bytes, both for CPUID.
    """

    __slots__ = ("names", "spinlocks", "vendor_id", "version", "wanted")

    def __init__(
        self,
        names: Collection[str],
        *,
        wanted: Collection[str] = (),
        spinlocks: int = 4095,
        # The build of Windows Server 2022, whose interface this is a subset of.
        version: tuple[int, int, int] = (20348, 10, 0),
        vendor_id: bytes = b"Microsoft Hv",
    ) -> None:
        self.names = frozenset(names)
        self.wanted = frozenset(wanted)
        self.spinlocks = spinlocks if "spinlocks" in self.names else SPINLOCKS_NEVER
        self.version = version
        self.vendor_id = vendor_id

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def on_host(self, features: Collection[str]) -> Selection:
        """What a host with `features` (of `HOST_FEATURES`) can offer of this.

        Raises ValueError if something is missing that the user asked for by name.
        """
        lacking = {name for name in self.names if ENLIGHTENMENTS[name].host not in (None, *features)}
        for name in sorted(lacking & self.wanted):
            host = ENLIGHTENMENTS[name].host
            assert host is not None
            raise ValueError(f"the enlightenment {name} needs {HOST_FEATURES[host]}; this host has none")
        return Selection(
            self.names - lacking,
            wanted=self.wanted,
            spinlocks=self.spinlocks,
            version=self.version,
            vendor_id=self.vendor_id,
        )


def parse_spec(spec: str) -> Selection:
    """Turn ``PROFILE[,+NAME|,-NAME]...`` into a selection; the first word may also be left out (full).

    Raises ValueError that says what is unknown or contradictory.
    """
    chosen: set[str] | None = None
    wanted: set[str] = set()
    for word in filter(None, (part.strip() for part in spec.split(","))):
        if word[0] not in "+-":
            if chosen is not None:
                raise ValueError(f"enlightenments {spec!r}: {word!r} is not the first word; write +NAME or -NAME")
            if word not in PROFILES:
                raise ValueError(f"unknown enlightenment profile {word!r}; choose from {', '.join(PROFILES)}")
            chosen = set(PROFILES[word])
            continue
        if chosen is None:
            chosen = set(PROFILES["full"])
        if word[1:] not in ENLIGHTENMENTS:
            raise ValueError(f"unknown enlightenment {word[1:]!r}; choose from {', '.join(ENLIGHTENMENTS)}")
        if word[0] == "+":
            chosen.add(word[1:])
            wanted.add(word[1:])
        else:
            chosen.discard(word[1:])
            wanted.discard(word[1:])
            _discard_dependents(chosen, word[1:])
    if chosen is None:
        raise ValueError("the enlightenments are empty; write 'none' for none")
    for name in chosen:
        for need in ENLIGHTENMENTS[name].needs:
            if need not in chosen:
                raise ValueError(f"enlightenments {spec!r}: {name} needs {need}; add +{need}")
    return Selection(chosen, wanted=wanted)


def _discard_dependents(chosen: set[str], name: str) -> None:
    for other in [other for other in chosen if name in ENLIGHTENMENTS[other].needs]:
        chosen.discard(other)
        _discard_dependents(chosen, other)
