"""The ACPI tables: iasl reads them without complaint, and they say what the board is."""

from __future__ import annotations

import re
import struct
import subprocess
from pathlib import Path

import pytest

from pyvmm.boot import layout
from pyvmm.boot.acpi import aml
from pyvmm.boot.acpi.tables import build_acpi

GIB = 1 << 30
#: "_HID string must be exactly 7 or 8 characters": guests look for "VMBus", which is what it is.
ODD_HID = "6033"


def iasl(*arguments: str, cwd: Path) -> str:
    """Run Debian's acpica-tools, which `make setup` installs; return what it says."""
    result = subprocess.run(["iasl", *arguments], cwd=cwd, capture_output=True, text=True, timeout=60)
    output = result.stdout + result.stderr
    assert result.returncode == 0, output
    return output


def assert_recompiles(tmp_path: Path, dsdt: bytes) -> str:
    """Check that iasl disassembles a DSDT and makes the same AML again; return the source."""
    (tmp_path / "dsdt.aml").write_bytes(dsdt)
    said = iasl("-d", "dsdt.aml", cwd=tmp_path)
    assert not re.search("error|warning|invalid|incorrect", said, re.IGNORECASE), said
    said = iasl("-oa", "-vw", ODD_HID, "-p", "again", "dsdt.dsl", cwd=tmp_path)
    assert "0 Errors, 0 Warnings" in said
    assert (tmp_path / "again.aml").read_bytes()[36:] == dsdt[36:]
    return (tmp_path / "dsdt.dsl").read_text()


def tables(**options: bool) -> dict[str, bytes]:
    """Return the tables of a 4-CPU guest as they are found from the RSDP, with every address followed."""
    placed = dict(build_acpi(65 * GIB, 4, **options))
    rsdp = placed[layout.RSDP_ADDRESS]
    (xsdt_gpa,) = struct.unpack_from("<Q", rsdp, 24)
    found = {"RSDP": rsdp, "XSDT": placed[xsdt_gpa]}
    for (gpa,) in struct.iter_unpack("<Q", placed[xsdt_gpa][36:]):
        found[placed[gpa][:4].decode()] = placed[gpa]
    (facs_gpa,) = struct.unpack_from("<I", found["FACP"], 36)
    (dsdt_gpa,) = struct.unpack_from("<Q", found["FACP"], 140)
    assert struct.unpack_from("<I", found["FACP"], 40) == (dsdt_gpa,)
    assert facs_gpa % 64 == 0
    return found | {"FACS": placed[facs_gpa], "DSDT": placed[dsdt_gpa]}


def test_every_table_has_its_length_and_checksum() -> None:
    found = tables()
    assert sorted(found) == ["APIC", "DSDT", "FACP", "FACS", "RSDP", "XSDT"]
    for signature in ("APIC", "DSDT", "FACP", "XSDT"):
        table = found[signature]
        assert int.from_bytes(table[4:8], "little") == len(table)
        assert sum(table) % 256 == 0
        assert table[10:16] == b"PYVMM "
    rsdp = found["RSDP"]
    assert rsdp[:8] == b"RSD PTR "
    assert (len(rsdp), rsdp[15], sum(rsdp[:20]) % 256, sum(rsdp) % 256) == (36, 2, 0, 0)
    assert (len(found["FACS"]), found["FACS"][4]) == (64, 64)


@pytest.mark.parametrize("cpus", [1, 2, 64])
def test_tables_lie_apart_below_the_smbios_area(cpus: int) -> None:
    placed = sorted(build_acpi(GIB, cpus))
    ends = [gpa + len(table) for gpa, table in placed]
    starts = [gpa for gpa, _ in placed]
    assert all(end <= start for end, start in zip(ends, [*starts[1:], layout.SMBIOS_ADDRESS], strict=True))
    assert starts[0] == layout.RSDP_ADDRESS


@pytest.mark.parametrize("cpus", [0, 65])
def test_other_numbers_of_cpus_are_refused(cpus: int) -> None:
    with pytest.raises(ValueError, match="1 to 64"):
        build_acpi(GIB, cpus)


@pytest.mark.parametrize("signature", ["APIC", "FACP", "FACS", "XSDT"])
def test_iasl_decodes_each_data_table(tmp_path: Path, signature: str) -> None:
    table = tables()[signature]
    (tmp_path / "table.aml").write_bytes(table)
    said = iasl("-d", "table.aml", cwd=tmp_path)
    assert f"[{signature}] decoded" in said
    assert not re.search("error|warning|invalid|incorrect|unknown", said, re.IGNORECASE), said
    # Compiling the decoded text makes the same table, so no byte of it is outside the specification's fields.
    iasl("-p", "again", "table.dsl", cwd=tmp_path)
    assert (tmp_path / "again.aml").read_bytes()[36:] == table[36:]


def decoded(tmp_path: Path, table: bytes) -> list[tuple[str, str]]:
    """Return (field, value) of a data table as iasl reads it."""
    (tmp_path / "table.aml").write_bytes(table)
    iasl("-d", "table.aml", cwd=tmp_path)
    lines = (tmp_path / "table.dsl").read_text().splitlines()
    matches = (re.match(r"(?:\[\w+ \w+ +\d+\])? +([^:]+?) : (.*)", line) for line in lines)
    return [(match[1], match[2].split(" [")[0]) for match in matches if match]


def test_fadt_describes_the_power_management_ports(tmp_path: Path) -> None:
    fields = decoded(tmp_path, tables()["FACP"])
    for expected in [
        ("Revision", "06"),
        ("SCI Interrupt", "0009"),
        ("SMI Command Port", "00000000"),
        ("PM1A Event Block Address", "00000600"),
        ("PM1 Event Block Length", "04"),
        ("PM1A Control Block Address", "00000604"),
        ("PM1 Control Block Length", "02"),
        ("PM Timer Block Address", "00000608"),
        ("PM Timer Block Length", "04"),
        ("RTC Century Index", "32"),
        ("8042 Present on ports 60/64 (V2)", "1"),
        ("Legacy Devices Supported (V2)", "1"),
        ("WBINVD instruction is operational (V1)", "1"),
        ("All CPUs support C1 (V1)", "1"),
        ("Control Method Power Button (V1)", "0"),
        ("RTC can wake system from S4 (V1)", "1"),
        ("32-bit PM Timer (V1)", "1"),
        ("Reset Register Supported (V2)", "1"),
        ("Use Platform Timer (V4)", "1"),
        ("Hardware Reduced (V5)", "0"),
        ("Value to cause reset", "06"),
    ]:
        assert expected in fields
    addresses = [value for field, value in fields if field == "Address"]
    spaces = [value for field, value in fields if field == "Space ID"]
    # Reset, PM1a event, PM1b event, PM1a control, PM1b control, PM2, timer.
    assert [int(value, 16) for value in addresses[:7]] == [0xCF9, 0x600, 0, 0x604, 0, 0, 0x608]
    assert [int(spaces[index]) for index in (0, 1, 3, 6)] == [1, 1, 1, 1]


def test_madt_lists_the_processors_and_how_the_sci_is_wired(tmp_path: Path) -> None:
    madt = tables()["APIC"]
    assert struct.unpack_from("<II", madt, 36) == (layout.LAPIC_ADDRESS, 1)
    entries = []
    offset = 44
    while offset < len(madt):
        entries.append(madt[offset : offset + madt[offset + 1]])
        offset += madt[offset + 1]
    assert [struct.unpack("<BBBBI", entry) for entry in entries if entry[0] == 0] == [
        (0, 8, index, index, 1) for index in range(4)
    ]
    assert [struct.unpack("<BBBBII", entry) for entry in entries if entry[0] == 1] == [(1, 12, 0, 0, 0xFEC00000, 0)]
    # The SCI is active high (1) and level triggered (3 << 2); every other IRQ is as it is on an ISA bus.
    overrides = [struct.unpack("<BBBBIH", entry) for entry in entries if entry[0] == 2]
    assert overrides == [(2, 10, 0, 9, 9, 0x0D)]
    assert [entry for entry in entries if entry[0] == 4] == [b"\x04\x06\xff\0\0\x01"]


@pytest.mark.parametrize("cpus", [1, 64])
def test_iasl_makes_the_same_dsdt_again(tmp_path: Path, cpus: int) -> None:
    dsdt = next(table for _, table in build_acpi(65 * GIB, cpus) if table[:4] == b"DSDT")
    source = assert_recompiles(tmp_path, dsdt)
    assert source.count('"ACPI0007"') == cpus
    assert re.search(r"Name \(_S5, Package \(0x04\).*?\{\s*0x05,\s*0x05,", source, re.DOTALL)
    for identifier in ("PNP0000", "PNP0100", "PNP0B00", "PNP0501", "PNP0303", "PNP0F13"):
        assert source.count(f'EisaId ("{identifier}")') == 1


def test_the_pci_bus_has_windows_that_keep_clear_of_others_and_a_route_for_each_pin(tmp_path: Path) -> None:
    source = assert_recompiles(tmp_path, tables()["DSDT"])
    pci = source[source.index("Device (PCI0)") : source.index("Device (VMOD)")]
    assert 'EisaId ("PNP0A03"' in pci
    windows = re.findall(r"(\w+) \(Resource.*?0x(\w+), +// Range Minimum\s+0x(\w+), +// Range Maximum", pci, re.DOTALL)
    assert [(kind, int(low, 16), int(high, 16)) for kind, low, high in windows] == [
        ("WordBusNumber", 0, 0xFF),
        ("WordIO", 0, 0xCF7),
        ("WordIO", 0xD00, 0xFFFF),
        ("DWordMemory", 0xA_0000, 0xB_FFFF),
        ("DWordMemory", 0xC000_0000, layout.VMBUS_LOW_MMIO - 1),
    ]
    number = r"(Zero|One|0x\w+)"
    routes = re.findall(rf"0x(\w+)FFFF,\s+{number},\s+Zero,\s+0x(\w+)", pci)
    pins = {"Zero": 0, "One": 1, "0x02": 2, "0x03": 3}
    found = {(int(device, 16), pins[pin]): int(irq, 16) for device, pin, irq in routes}
    assert found.keys() == {(device, pin) for device in range(1, 32) for pin in range(4)}
    assert [found[1, pin] for pin in range(4)] == list(layout.PCI_IRQS)
    assert [found[2, pin] for pin in range(4)] == [*layout.PCI_IRQS[1:], layout.PCI_IRQS[0]]


def test_vmbus_is_a_child_of_the_module_device_with_the_windows(tmp_path: Path) -> None:
    source = assert_recompiles(tmp_path, tables()["DSDT"])
    module = source[source.index("Device (VMOD)") :]
    assert '"ACPI0004"' in module[: module.index("Device (VMBS)")]
    windows = re.findall(
        r"QWordMemory \(ResourceProducer, .*?0x(\w+), // Range Minimum\s+0x(\w+), // Range Maximum", module, re.DOTALL
    )
    assert [(int(low, 16), int(high, 16)) for low, high in windows] == [
        (0xF000_0000, 0xF7FF_FFFF),
        (65 * GIB, 65 * GIB + (512 << 20) - 1),
    ]
    bus = module[module.index("Device (VMBS)") :]
    assert 'Name (_HID, "VMBus")' in bus
    assert "Name (_UID, Zero)" in bus
    for method in ("_STA", "_DIS", "_PS0", "_PS3"):
        assert f"Method ({method}, 0, NotSerialized)" in bus


@pytest.mark.parametrize(
    ("option", "absent"), [("vmbus", '"VMBus"'), ("com1", '"PNP0501"'), ("i8042", '"PNP0303"'), ("i8042", '"PNP0F13"')]
)
def test_a_device_that_is_switched_off_is_not_mentioned(tmp_path: Path, option: str, absent: str) -> None:
    assert absent in assert_recompiles(tmp_path, tables()["DSDT"])
    assert absent not in assert_recompiles(tmp_path, tables(**{option: False})["DSDT"])


def test_without_an_i8042_the_fadt_says_so(tmp_path: Path) -> None:
    assert ("8042 Present on ports 60/64 (V2)", "0") in decoded(tmp_path, tables(i8042=False)["FACP"])


@pytest.mark.parametrize(
    ("term", "source"),
    [
        (aml.name("ABCD", aml.integer(0)), "Name (ABCD, Zero)"),
        (aml.name("AB", aml.integer(1)), "Name (AB, One)"),
        (aml.name("A", aml.integer(0xFF)), "Name (A, 0xFF)"),
        (aml.name("A", aml.integer(0x100)), "Name (A, 0x100)"),
        (aml.name("A", aml.integer(0x1_0000)), "Name (A, 0x10000)"),
        (aml.name("A", aml.integer(1 << 40)), "Name (A, 0x10000000000)"),
        (aml.name("A", aml.string("hello")), 'Name (A, "hello")'),
        (aml.name("_HID", aml.eisa_id("PNP0B00")), 'Name (_HID, EisaId ("PNP0B00"))'),
        (aml.name("A", aml.buffer(b"\1\2\3")), "Name (A, Buffer () {1, 2, 3})"),
        (aml.name("A", aml.buffer(b"\5" * 57)), f"Name (A, Buffer () {{{', '.join(57 * ['5'])}}})"),
        (aml.name("A", aml.buffer(b"\5" * 59)), f"Name (A, Buffer () {{{', '.join(59 * ['5'])}}})"),
        (aml.name("A", aml.buffer(b"\5" * 61)), f"Name (A, Buffer () {{{', '.join(61 * ['5'])}}})"),
        (aml.name("A", aml.buffer(b"\5" * 4090)), f"Name (A, Buffer () {{{', '.join(4090 * ['5'])}}})"),
        (aml.name("A", aml.buffer(b"\5" * 4091)), f"Name (A, Buffer () {{{', '.join(4091 * ['5'])}}})"),
        (aml.name("A", aml.package(aml.integer(7), aml.string("x"))), 'Name (A, Package () {7, "x"})'),
        (aml.scope("\\", aml.name("A", aml.integer(2))), "Scope (\\) { Name (A, 2) }"),
        (aml.scope("\\_SB", aml.device("DEV0")), "Scope (\\_SB) { Device (DEV0) {} }"),
        (
            aml.scope("\\_SB", aml.device("BUS"))
            + aml.scope("\\_SB.BUS", aml.device("\\_SB.BUS.DEV", aml.device("X"))),
            "Scope (\\_SB) { Device (BUS) {} } Scope (\\_SB.BUS) { Device (\\_SB.BUS.DEV) { Device (X) {} } }",
        ),
        (
            aml.name("A", aml.integer(3))
            + aml.method("M", aml.bit_and(aml.name_string("A"), aml.integer(2), aml.name_string("A")), serialized=True),
            "Name (A, 3) Method (M, 0, Serialized) { And (A, 2, A) }",
        ),
        (
            aml.name("A", aml.integer(3))
            + aml.method("M", aml.bit_or(aml.name_string("A"), aml.integer(4), aml.name_string("A")))
            + aml.method("N", aml.return_value(aml.name_string("A"))),
            "Name (A, 3) Method (M) { Or (A, 4, A) } Method (N) { Return (A) }",
        ),
        (
            aml.name("R", aml.resources(aml.io(0x3F8, 8), aml.irq_no_flags(4), aml.qword_memory(1 << 32, 1 << 30))),
            "Name (R, ResourceTemplate () { IO (Decode16, 0x3F8, 0x3F8, 1, 8) IRQNoFlags () {4}"
            " QWordMemory (ResourceProducer, PosDecode, MinFixed, MaxFixed, Cacheable, ReadWrite,"
            " 0, 0x100000000, 0x13FFFFFFF, 0, 0x40000000) })",
        ),
    ],
)
def test_aml_is_what_iasl_compiles(tmp_path: Path, term: bytes, source: str) -> None:
    (tmp_path / "term.asl").write_text(f'DefinitionBlock ("", "DSDT", 2, "PYVMM", "TEST", 1) {{ {source} }}')
    iasl("-oa", "-ve", "-p", "term", "term.asl", cwd=tmp_path)
    assert (tmp_path / "term.aml").read_bytes()[36:] == term


def test_names_of_more_than_four_characters_are_refused() -> None:
    with pytest.raises(ValueError, match="more than four"):
        aml.name_string("ABCDE")
