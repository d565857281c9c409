"""The 21140's registers and configuration space, its serial ROM, its PHY, and what tells of a link."""

from __future__ import annotations

import struct
import zlib
from typing import TYPE_CHECKING

import pytest

from devices.legacy.dec21140 import phy, serial_rom
from devices.legacy.dec21140 import registers as reg
from devices.legacy.pci import COMMAND
from tests.fakes.tulip import MAC, MMIO, PORTS, TulipGuest

if TYPE_CHECKING:
    from collections.abc import Iterator

SROM, SROM_READ = 1 << 11, 1 << 14


@pytest.fixture
def guest() -> Iterator[TulipGuest]:
    guest = TulipGuest()
    yield guest
    guest.close()


def rom_bits(guest: TulipGuest, bits: str, select: bool = True) -> str:
    """Clock bits into the serial ROM; return what it says after each."""
    pins = SROM | SROM_READ | (serial_rom.SELECT if select else 0)
    said = ""
    for bit in bits:
        data = serial_rom.TO_ROM if bit == "1" else 0
        guest.put(reg.SERIAL, pins | data)
        guest.put(reg.SERIAL, pins | data | serial_rom.CLOCK)
        said += "1" if guest.get(reg.SERIAL) & serial_rom.FROM_ROM else "0"
    guest.put(reg.SERIAL, pins)
    return said


def rom_word(guest: TulipGuest, address: int) -> int:
    """Read a word as drivers do."""
    guest.put(reg.SERIAL, SROM | SROM_READ)
    said = rom_bits(guest, f"00110{address:06b}{0:016b}")
    guest.put(reg.SERIAL, 0)
    return int(said[11:], 2)


def rom(guest: TulipGuest) -> bytes:
    return struct.pack("<64H", *(rom_word(guest, address) for address in range(64)))


def mdio(guest: TulipGuest, bits: str) -> None:
    """Send bits to the PHY, after a preamble."""
    for bit in "1" * 32 + bits:
        data = phy.TO_PHY if bit == "1" else 0
        guest.put(reg.SERIAL, data)
        guest.put(reg.SERIAL, data | phy.CLOCK)


def mdio_read(guest: TulipGuest, register: int, address: int = phy.ADDRESS) -> int:
    mdio(guest, f"0110{address:05b}{register:05b}")
    bits = ""
    for _ in range(19):
        guest.put(reg.SERIAL, phy.READING)
        bits += "1" if guest.get(reg.SERIAL) & phy.FROM_PHY else "0"
        guest.put(reg.SERIAL, phy.READING | phy.CLOCK)
    assert bits[0] == bits[-1] == "1"
    assert bits[1] == ("0" if address == phy.ADDRESS else "1")
    return int(bits[2:18], 2)


def mdio_write(guest: TulipGuest, register: int, value: int, address: int = phy.ADDRESS) -> None:
    mdio(guest, f"0101{address:05b}{register:05b}10{value:016b}")


# Registers.


def test_registers_are_as_the_manual_says_after_a_reset(guest: TulipGuest) -> None:
    found = [guest.get(number) for number in range(16)]
    assert found[0:3] == [0xFE00_0000, 0xFFFF_FFFF, 0xFFFF_FFFF]
    assert found[5:9] == [0xFC00_0000, 0x3200_0040, 0xF3FE_0000, 0xE000_0000]
    assert found[9] & ~(phy.FROM_PHY | serial_rom.FROM_ROM) == 0xFFF4_83F7
    assert found[10:12] == [0xFFFF_FFFF, 0xFFFE_0000]
    assert found[13:16] == [0xFFFF_FFFF, 0xFFFF_FFFF, 0xFFFF_FEC8]


def test_bits_that_are_not_there_stay_as_they_were(guest: TulipGuest) -> None:
    for number in (0, 6, 7, 11, 15):
        guest.put(number, 0xFFFF_FFFE)
        guest.put(number, 0)
    assert [guest.get(number) for number in (0, 6, 7, 11, 15)] == [
        *(0xFE00_0000, 0x3000_0000, 0xF3FE_0000, 0xFFFE_0000, 0xFFFF_FEC8)
    ]
    guest.put(reg.BUS_MODE, 1 << 7 | 1 << 20)
    assert guest.get(reg.BUS_MODE) == 0xFE00_0000, "big-endian modes are refused"


def test_registers_are_in_ports_and_in_memory_and_double_words_only(guest: TulipGuest) -> None:
    guest.put(reg.INTERRUPTS, 0x1_2345)
    assert guest.mmio.read(MMIO + 0x38, 4) == 0xF3FE_0000 | 0x1_2345
    assert guest.mmio.read(MMIO + 0x38, 8) == 0xF3FE_0000 | 0x1_2345
    assert guest.pio.read(PORTS + 0x39, 1) == 0x23
    guest.pio.write(PORTS + 0x38, 2, 0)
    guest.pio.write(PORTS + 0x3C, 4, 0)
    assert guest.get(reg.INTERRUPTS) & 0x1_FFFF == 0x1_2345
    guest.mmio.write(MMIO + 0x38, 4, 0)
    assert guest.get(reg.INTERRUPTS) & 0x1_FFFF == 0
    assert guest.mmio.read(MMIO + 0x800, 4) == 0xFFFF_FFFF


def config(guest: TulipGuest, register: int) -> int:
    guest.pio.write(0xCF8, 4, 1 << 31 | 10 << 11 | register)
    return guest.pio.read(0xCFC, 4)


def test_the_adapter_is_the_one_of_hyper_v(guest: TulipGuest) -> None:
    assert config(guest, 0) == 0x0009_1011
    assert config(guest, 8) == 0x0200_0020
    assert config(guest, 0x2C) == 0x2114_0A00
    assert config(guest, 0x3C) == 0x2814_010A
    assert (config(guest, 0x10), config(guest, 0x14)) == (PORTS | 1, MMIO)
    assert config(guest, COMMAND) & 0x7 == 3


def test_base_addresses_and_the_one_of_the_boot_rom_tell_their_sizes(guest: TulipGuest) -> None:
    for register, size in ((0x10, 0xFFFF_FF81), (0x14, 0xFFFF_F000), (0x30, 0xFFFC_0001)):
        guest.config(register, 0xFFFF_FFFF, 4)
        assert config(guest, register) == size
    guest.config(0x30, 0xC100_0001, 4)
    assert guest.mmio.read(0xC100_0000, 4) == 0xFFFF_FFFF, "there is no ROM"


# The serial ROM.


def test_the_serial_rom_holds_address_and_media(guest: TulipGuest) -> None:
    data = rom(guest)
    assert data[:4] == bytes.fromhex("000a1421")
    assert data[18:20] == b"\x01\x01"
    assert data[20:26] == MAC
    leaf = data[27] | data[28] << 8
    selected, pins, blocks = struct.unpack_from("<HBB", data, leaf)
    assert selected & 0x3F == 5, "100BASE-TX full duplex"
    media = [struct.unpack_from("<BBH", data, leaf + 4 + 4 * index) for index in range(blocks)]
    assert [medium for medium, _, _ in media] == [0, 4, 3, 5]
    assert pins == 0


def test_the_checksums_of_the_serial_rom_are_right(guest: TulipGuest) -> None:
    data = rom(guest)
    assert int.from_bytes(data[126:], "little") == zlib.crc32(data[:126]) & 0xFFFF
    # The identification block's, bit by bit as the format's specification has it.
    crc = 0xFF
    words = struct.unpack("<9H", data[:18])
    for bit in "".join(f"{word:016b}" for word in words)[: 8 * 16 + 8]:
        crc = (crc << 1 ^ (7 if int(bit) ^ crc >> 7 else 0)) & 0xFF
    assert data[16] == crc


def test_its_size_can_be_found_out(guest: TulipGuest) -> None:
    """It answers with a zero behind the last bit of the address, as drivers look for."""
    guest.put(reg.SERIAL, SROM | SROM_READ)
    assert rom_bits(guest, "110" + "111111") == "1" * 8 + "0"


def test_commands_that_would_write_do_nothing(guest: TulipGuest) -> None:
    before = rom(guest)
    guest.put(reg.SERIAL, SROM | SROM_READ)
    rom_bits(guest, "100110000")  # erase and write enable
    guest.put(reg.SERIAL, SROM | SROM_READ)
    assert rom_bits(guest, "101000000" + "1" * 16)[-1] == "1", "ready"
    assert rom(guest) == before


def test_a_rom_that_is_not_selected_says_nothing(guest: TulipGuest) -> None:
    assert rom_bits(guest, "110000000" + "0" * 16, select=False) == "1" * 25


# The PHY.


def test_the_phy_has_negotiated_full_duplex_with_its_partner(guest: TulipGuest) -> None:
    guest.plug()
    assert mdio_read(guest, phy.CONTROL) == 0x3100
    assert mdio_read(guest, phy.STATUS) & phy.LINK_UP == 0, "the link was down before"
    assert mdio_read(guest, phy.STATUS) == 0x782D
    assert mdio_read(guest, phy.ADVERTISEMENT) & mdio_read(guest, phy.PARTNER) & 0x1E0 == 0x1E0
    assert mdio_read(guest, phy.EXPANSION) == 1
    assert (mdio_read(guest, 2), mdio_read(guest, 3)) == (0x2000, 0x5C01)


def test_there_is_one_phy(guest: TulipGuest) -> None:
    found = [address for address in range(32) if mdio_read_any(guest, address) != 0xFFFF]
    assert found == [phy.ADDRESS]


def mdio_read_any(guest: TulipGuest, address: int) -> int:
    return mdio_read(guest, phy.STATUS, address)


def test_its_registers_are_written_and_reset(guest: TulipGuest) -> None:
    mdio_write(guest, phy.ADVERTISEMENT, 0x0061)
    mdio_write(guest, phy.ADVERTISEMENT, 0x0101, address=2)
    mdio_write(guest, phy.STATUS, 0)
    assert mdio_read(guest, phy.ADVERTISEMENT) == 0x0061
    mdio_write(guest, phy.CONTROL, 0x1200)
    assert mdio_read(guest, phy.CONTROL) == 0x1000, "negotiation is over at once"
    mdio_write(guest, phy.CONTROL, 0x8000)
    assert (mdio_read(guest, phy.CONTROL), mdio_read(guest, phy.ADVERTISEMENT)) == (0x3100, 0x01E1)


@pytest.mark.parametrize("noise", ["0" * 40, "00", "01" * 20, "0110", "0100" + "0" * 28, "0111" + "1" * 28])
def test_noise_before_a_preamble_does_no_harm(guest: TulipGuest, noise: str) -> None:
    mdio(guest, noise)
    assert mdio_read(guest, phy.CONTROL) == 0x3100


def test_both_buses_go_on_in_the_middle_after_a_restore(guest: TulipGuest) -> None:
    guest.put(reg.SERIAL, SROM | SROM_READ)
    rom_bits(guest, "110" + f"{10:06b}" + "0000")
    other = TulipGuest()
    other.bus.restore(guest.bus.save())
    assert rom_bits(other, "0" * 12) == f"{struct.unpack('<H', MAC[:2])[0]:016b}"[4:]
    mdio(guest, f"0110{phy.ADDRESS:05b}{3:05b}1")
    other = TulipGuest()
    other.bus.restore(guest.bus.save())
    bits = ""
    for _ in range(16):
        other.put(reg.SERIAL, phy.READING)
        other.put(reg.SERIAL, phy.READING | phy.CLOCK)
        bits += "1" if other.get(reg.SERIAL) & phy.FROM_PHY else "0"
    assert int(bits, 2) == 0x5C01


# The link.


def signal(guest: TulipGuest) -> bool:
    """What the media blocks of the serial ROM have drivers look at."""
    return bool(guest.get(reg.PINS) & serial_rom.PIN_SIGNAL)


def test_a_pin_tells_of_the_link(guest: TulipGuest) -> None:
    assert not signal(guest)
    guest.plug()
    assert signal(guest)
    guest.nic.set_link(False)
    assert not signal(guest) and not signal(guest)
    assert guest.get(reg.PINS) & serial_rom.PIN_NO_LINK_10


def test_a_loss_of_link_is_seen_though_it_is_over(guest: TulipGuest) -> None:
    guest.plug()
    mdio_read(guest, phy.STATUS)
    assert signal(guest) and mdio_read(guest, phy.STATUS) & phy.LINK_UP
    guest.nic.set_link(False)
    guest.nic.set_link(True)
    assert not signal(guest) and signal(guest)
    assert not mdio_read(guest, phy.STATUS) & phy.LINK_UP
    assert mdio_read(guest, phy.STATUS) & phy.LINK_UP


@pytest.mark.parametrize("way", ["software", "board"])
def test_a_driver_that_starts_is_not_told_of_an_earlier_loss(guest: TulipGuest, way: str) -> None:
    guest.plug()
    guest.nic.set_link(False)
    guest.nic.set_link(True)
    if way == "software":
        guest.put(reg.BUS_MODE, reg.SOFTWARE_RESET)
    else:
        guest.bus.reset()
    assert signal(guest)


def test_pins_that_the_guest_drives_read_as_it_does(guest: TulipGuest) -> None:
    guest.put(reg.PINS, reg.PIN_DIRECTIONS | 0xC0)
    guest.put(reg.PINS, 0x41)
    assert guest.get(reg.PINS) & 0xFF == 0x40
    guest.put(reg.PINS, reg.PIN_DIRECTIONS)
    assert guest.get(reg.PINS) == 0xFFFF_FE00 | serial_rom.PIN_NO_LINK_10
