"""The objects of a synthetic NIC: what queries answer, and what sets change."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import pytest

from devices.network.port import OFFLOAD_CHECKSUM, OFFLOAD_TSO4, OFFLOAD_TSO6, OFFLOAD_TSO_ECN
from devices.synthetic.netvsp import ndis
from devices.synthetic.netvsp.ndis import RSS_NONE, Offload, Rss
from devices.synthetic.netvsp.rndis import Refused
from tests.fakes import netvsc
from tests.fakes.netvsc import OFFLOAD_CURRENT, OFFLOAD_PARAMETERS, config_parameter, rss_parameters, start_linux
from tests.fakes.netvsp_rig import MAC, PEER, frame
from tests.fakes.netvsp_rig import make as make

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.fakes.netvsc import NetVsc
    from tests.fakes.netvsp_rig import Rig

    Make = Callable[..., Rig]

NOT_SUPPORTED, INVALID_LENGTH, INVALID_DATA, MULTICAST_FULL = 0xC00000BB, 0xC0010014, 0xC0010015, 0xC0010009
ALL_RECEIVED = OFFLOAD_CHECKSUM | OFFLOAD_TSO4 | OFFLOAD_TSO6 | OFFLOAD_TSO_ECN


@pytest.fixture(name="driver")
def make_driver(make: Make) -> NetVsc:
    driver = make(receive_pages=64).driver
    driver.handshake()
    driver.initialize()
    return driver


def offload_parameters(size: int = 28, revision: int = 3, kind: int = 0x80, **values: int) -> bytes:
    """NDIS_OFFLOAD_PARAMETERS; what is not named stays as it is."""
    names = ("ip4", "tcp4", "udp4", "tcp6", "udp6", "lso_v1", "ipsec", "lso4", "lso6", "conn4", "conn6", "pad")
    body = bytes(values.get(name, 0) for name in names)
    body += bytes((0, 0, 0, 0, 0, 0, values.get("rsc4", 0), values.get("rsc6", 0)))
    return (struct.pack("<BBH", kind, revision, size) + body).ljust(size, b"\0")[:size]


def test_every_object_on_the_list_answers_or_can_be_set(driver: NetVsc) -> None:
    status, data = driver.query(netvsc.SUPPORTED_LIST)
    assert status == 0
    oids = [oid for (oid,) in struct.iter_unpack("<I", data)]
    assert oids == sorted(set(oids)) and len(oids) > 45
    only_set = {0x00010112, 0x00010118, 0x00010204, 0x00010208, 0x0001021B, 0xFC01020C}
    for oid in oids:
        assert driver.query(oid).status == (NOT_SUPPORTED if oid in only_set else 0), hex(oid)


@pytest.mark.parametrize(
    ("oid", "expected"),
    [
        (0x00010102, struct.pack("<I", 0)),
        (0x00010106, struct.pack("<I", 1500)),
        (0x00010111, struct.pack("<I", 1514)),
        (0x00010107, struct.pack("<I", 100_000_000)),
        (0x00010206, struct.pack("<QQ", 10**10, 10**10)),
        (0x0001010D, b"Microsoft Corporation"),
        (0x0001010E, struct.pack("<I", 0)),
        (0x01010101, MAC),
        (0x01010102, MAC),
        (0x00010207, struct.pack("<BBHIIIQQII", 0x80, 1, 40, 1, 2, 0, 10**10, 10**10, 0, 0)),
        (0x0101010A, struct.pack("<BBH6I", 0xA8, 1, 28, 1, 2, 14, 1, 2, 14)),
    ],
)
def test_objects_have_the_values_of_hyper_v(driver: NetVsc, oid: int, expected: bytes) -> None:
    assert driver.query(oid) == (0, expected)


def test_the_friendly_name_is_the_one_that_linux_takes_for_none(driver: NetVsc) -> None:
    data = driver.query(netvsc.FRIENDLY_NAME).data
    assert len(data) == 512 and data.decode("utf-16-le").rstrip("\0") == "Network Adapter"


def test_unknown_objects_are_refused(driver: NetVsc) -> None:
    for oid in (0, 0xFD010101, 0x00010999):
        assert driver.query(oid) == (NOT_SUPPORTED, b"")
        assert driver.set(oid, b"data") == NOT_SUPPORTED


def test_statistics_are_the_ports_and_as_wide_as_the_guest_asks(make: Make) -> None:
    rig = make()
    start_linux(rig.driver)
    for _ in range(3):
        assert rig.driver.transmit(frame()) == netvsc.SUCCESS
    rig.port.arrive(frame(to=MAC, source=PEER))
    rig.driver.frame()
    assert rig.driver.query(0x00020101, bytes(4)) == (0, struct.pack("<I", 3))
    assert rig.driver.query(0x00020102, bytes(8)) == (0, struct.pack("<Q", 1))
    assert rig.driver.query(0x0002021A) == (0, struct.pack("<Q", 3 * 60))
    assert rig.driver.query(0x00020219) == (0, struct.pack("<Q", 60))
    assert rig.driver.query32(0x00020104) == 0


# Groups -----------------------------------------------------------------------------------------------------


def test_the_list_of_groups_is_kept_and_bounded(driver: NetVsc) -> None:
    groups = b"".join(bytes((1, 0, 0x5E, 0, 0, index)) for index in range(64))
    assert driver.set(netvsc.MULTICAST_LIST, groups) == 0
    assert driver.query(netvsc.MULTICAST_LIST) == (0, groups)
    assert driver.set(netvsc.MULTICAST_LIST, groups + groups[:6]) == MULTICAST_FULL
    assert driver.set(netvsc.MULTICAST_LIST, groups[:-1]) == INVALID_LENGTH
    assert driver.query(netvsc.MULTICAST_LIST) == (0, groups)
    assert driver.set(netvsc.MULTICAST_LIST, b"") == 0
    assert driver.query(netvsc.MULTICAST_LIST) == (0, b"")


# Offloads ---------------------------------------------------------------------------------------------------


def current(driver: NetVsc) -> Offload:
    """The offloads that are on, taken out of NDIS_OFFLOAD."""
    data = driver.query(OFFLOAD_CURRENT).data
    _, s4, _, r4, _, s6, _, r6 = struct.unpack_from("<8I", data, 4)
    lso4, _, _, lso6 = struct.unpack_from("<4I", data, 80)
    found = Offload(0)
    for flags, mask, bit in (
        (s4, 0x100, Offload.SEND_IP4),
        (s4, 0x10, Offload.SEND_TCP4),
        (s4, 0x40, Offload.SEND_UDP4),
        (s6, 0x10, Offload.SEND_TCP6),
        (s6, 0x40, Offload.SEND_UDP6),
        (r4, 0x100, Offload.RECEIVE_IP4),
        (r4, 0x10, Offload.RECEIVE_TCP4),
        (r4, 0x40, Offload.RECEIVE_UDP4),
        (r6, 0x10, Offload.RECEIVE_TCP6),
        (r6, 0x40, Offload.RECEIVE_UDP6),
        (lso4, 2, Offload.LSO4),
        (lso6, 2, Offload.LSO6),
        (data[144], 1, Offload.RSC4),
        (data[145], 1, Offload.RSC6),
    ):
        found |= bit if flags & mask else Offload(0)
    return found


def test_the_guest_switches_offloads_and_is_told_what_is_on(driver: NetVsc) -> None:
    start = current(driver)
    assert start == ndis.SEND | ndis.LSO
    assert driver.set(OFFLOAD_PARAMETERS, offload_parameters(tcp4=4, udp4=3, tcp6=2, udp6=1, lso4=1, rsc4=2)) == 0
    expected = start & ~(Offload.SEND_UDP4 | Offload.SEND_UDP6 | Offload.LSO4)
    expected |= Offload.RECEIVE_TCP4 | Offload.RECEIVE_UDP4 | Offload.RSC4
    assert current(driver) == expected
    assert driver.indication() == (netvsc.OFFLOAD_CONFIG, driver.query(OFFLOAD_CURRENT).data)
    assert driver.set(OFFLOAD_PARAMETERS, offload_parameters()) == 0
    assert current(driver) == expected


def test_what_the_guest_cannot_have_stays_off(make: Make) -> None:
    rig = make()
    rig.driver.handshake(capabilities=8)  # without RSC
    rig.driver.initialize()
    assert rig.driver.set(OFFLOAD_PARAMETERS, offload_parameters(rsc4=2, rsc6=2)) == 0
    assert not current(rig.driver) & ndis.RSC
    assert rig.driver.set(OFFLOAD_PARAMETERS, offload_parameters(lso_v1=2)) == NOT_SUPPORTED


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"", INVALID_LENGTH),
        (offload_parameters()[:19], INVALID_LENGTH),
        (offload_parameters(size=19), INVALID_LENGTH),
        (struct.pack("<BBH", 0x80, 3, 400).ljust(28, b"\0"), INVALID_LENGTH),
        (offload_parameters(kind=0x81), INVALID_DATA),
        (offload_parameters(revision=0), INVALID_DATA),
    ],
)
def test_malformed_offload_parameters_change_nothing(driver: NetVsc, data: bytes, status: int) -> None:
    before = current(driver)
    assert driver.set(OFFLOAD_PARAMETERS, data) == status
    assert current(driver) == before and driver.indications == []


def test_offloads_are_switched_by_name_as_windows_does(make: Make) -> None:
    rig = make()
    driver = rig.driver
    driver.handshake(capabilities=0xFF)
    driver.initialize()
    assert rig.port.offloads == [0]
    for name in ("TCPChecksumOffloadIPv4", "TCPChecksumOffloadIPv6", "UDPChecksumOffloadIPv4"):
        assert driver.set(netvsc.CONFIG_PARAMETER, config_parameter(f"*{name}", "3")) == 0
    assert rig.port.offloads[-1] == 0  # a partial checksum might be of UDP over IPv6
    assert driver.set(netvsc.CONFIG_PARAMETER, config_parameter("*UDPChecksumOffloadIPv6", "2")) == 0
    assert rig.port.offloads[-1] == OFFLOAD_CHECKSUM
    for name in ("*RscIPv4", "*RscIPv6"):
        assert driver.set(netvsc.CONFIG_PARAMETER, config_parameter(name, "1")) == 0
    assert rig.port.offloads[-1] == ALL_RECEIVED
    assert driver.set(netvsc.CONFIG_PARAMETER, config_parameter("*LsoV2IPv4", "0")) == 0
    assert not current(driver) & Offload.LSO4
    assert not current(driver) & Offload.SEND_UDP6
    assert driver.set(netvsc.CONFIG_PARAMETER, config_parameter("*LsoV2IPv4", "yes")) == INVALID_DATA
    assert driver.set(netvsc.CONFIG_PARAMETER, config_parameter("*SomethingElse", "yes")) == 0


@pytest.mark.parametrize(
    "data",
    [
        b"",
        struct.pack("<5I", 20, 256, 2, 20, 0).ljust(400, b"\0"),
        struct.pack("<5I", 20, 0, 2, 20, 256).ljust(400, b"\0"),
        struct.pack("<5I", 20, 40, 2, 20, 0),
        struct.pack("<5I", 0xFFFFFFFF, 2, 2, 20, 0).ljust(64, b"\0"),
        struct.pack("<5I", 20, 2, 2, 0xFFFFFFF0, 2).ljust(64, b"\0"),
        struct.pack("<5I", 20, 2, 2, 22, 0) + b"\x00\xd8",
    ],
)
def test_malformed_configuration_parameters_are_refused(driver: NetVsc, data: bytes) -> None:
    assert driver.set(netvsc.CONFIG_PARAMETER, data) in (INVALID_LENGTH, INVALID_DATA)


def test_the_guest_may_have_another_address_until_it_begins_again(make: Make) -> None:
    rig = make()
    driver = rig.driver
    start_linux(driver)
    other = bytes.fromhex("02aabbccddee")
    assert driver.set(netvsc.CONFIG_PARAMETER, config_parameter("NetworkAddress", other.hex())) == 0
    assert driver.query(0x01010102) == (0, other)
    assert driver.query(netvsc.PERMANENT_ADDRESS) == (0, MAC)
    rig.port.arrive(frame(to=MAC, source=PEER))
    rig.port.arrive(frame(to=other, source=PEER))
    assert driver.frame().data == frame(to=other, source=PEER)
    for value in ("02aabbccdde", "02aabbccddeeff", "02aabbccddeg", "01aabbccddee", "02 aabbccdde", "0\u0662aabbccddee"):
        assert driver.set(netvsc.CONFIG_PARAMETER, config_parameter("NetworkAddress", value)) == INVALID_DATA
    assert driver.query(0x01010102) == (0, other)
    driver.halt()
    driver.initialize()
    assert driver.query(0x01010102) == (0, MAC)


@pytest.mark.parametrize(("ndis_version", "revision", "size"), [((6, 0), 1, 112), ((6, 1), 2, 144), ((6, 30), 3, 156)])
def test_what_can_be_offloaded_is_told_in_the_revision_of_the_guest(
    make: Make, ndis_version: tuple[int, int], revision: int, size: int
) -> None:
    driver = make().driver
    driver.handshake(ndis=ndis_version)
    driver.initialize()
    data = driver.query(netvsc.OFFLOAD_CAPABILITIES).data
    assert (data[:4], len(data)) == (struct.pack("<BBH", 0xA7, revision, size), size)
    assert struct.unpack_from("<8I", data, 4) == (2, 0x155, 2, 0x155, 2, 0x55, 2, 0x55)
    assert struct.unpack_from("<7I", data, 80) == (2, 0xF53C, 2, 2, 0xF53C, 2, 5)
    assert revision < 3 or data[144:146] == b"\1\1"


@pytest.mark.parametrize(
    ("change", "status"), [((4, 1), NOT_SUPPORTED), ((8, 18), NOT_SUPPORTED), ((0, 9), INVALID_DATA)]
)
def test_another_encapsulation_is_refused(driver: NetVsc, change: tuple[int, int], status: int) -> None:
    data = bytearray(driver.query(netvsc.ENCAPSULATION).data)
    assert driver.set(netvsc.ENCAPSULATION, bytes(data)) == 0
    at, value = change
    data[at + 4 if at else 0] = value
    assert driver.set(netvsc.ENCAPSULATION, bytes(data)) == status
    assert driver.set(netvsc.ENCAPSULATION, bytes(data[:27])) == (INVALID_LENGTH if at else INVALID_DATA)


# Receive side scaling ---------------------------------------------------------------------------------------


def test_parts_of_rss_that_the_guest_leaves_unchanged_stay() -> None:
    first = ndis.change_rss(RSS_NONE, rss_parameters([0, 1, 2, 3]), 4)
    assert first == Rss(netvsc.RSS_KEY, (0, 1, 2, 3), 0x1700)
    again = ndis.change_rss(first, rss_parameters([3, 2], key=bytes(40), flags=0x2 | 0x8, hashes=0), 4)
    assert again == (netvsc.RSS_KEY, (3, 2), 0x1700)
    assert ndis.change_rss(first, rss_parameters([1], key=bytes(40), flags=0x4), 4) == (bytes(40), (0, 1, 2, 3), 0x1700)


@pytest.mark.parametrize(("flags", "hashes"), [(0x10, 0x1701), (0, 0)])
def test_rss_is_switched_off(flags: int, hashes: int) -> None:
    first = ndis.change_rss(RSS_NONE, rss_parameters([0, 1]), 2)
    assert ndis.change_rss(first, rss_parameters([0, 1], flags=flags, hashes=hashes), 2) == RSS_NONE


@pytest.mark.parametrize(
    "data",
    [
        b"",
        rss_parameters([])[:27],
        rss_parameters([]),
        rss_parameters([4]),
        rss_parameters([0xFFFFFFFF]),
        rss_parameters([0] * 129),
        rss_parameters([0], key=bytes(39)),
        rss_parameters([0])[:-1],
        rss_parameters([0], hashes=0x1702),
        rss_parameters([0])[:12] + struct.pack("<HHI", 4, 0, 0xFFFFFFF0) + rss_parameters([0])[20:],
        rss_parameters([0])[:12] + struct.pack("<HHI", 3, 0, 40) + rss_parameters([0])[20:],
    ],
)
def test_malformed_rss_parameters_are_refused(data: bytes) -> None:
    before = ndis.change_rss(RSS_NONE, rss_parameters([0, 1]), 4)
    with pytest.raises(Refused):
        ndis.change_rss(before, data, 4)


# RNDIS ------------------------------------------------------------------------------------------------------


def test_keepalives_are_answered(driver: NetVsc) -> None:
    assert driver.request(netvsc.KEEPALIVE) == struct.pack("<I", 0)


def test_reset_takes_back_what_the_guest_has_set(make: Make) -> None:
    rig = make()
    start_linux(rig.driver)
    assert rig.driver.query32(netvsc.FILTER) != 0
    assert rig.driver.request(netvsc.RESET) == struct.pack("<I", 1)  # its addresses are to be set again
    assert rig.driver.query32(netvsc.FILTER) == 0
    assert current(rig.driver) == ndis.SEND | ndis.LSO
    assert rig.port.offloads[-1] == 0
