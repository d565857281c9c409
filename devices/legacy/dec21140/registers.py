"""The command and status registers (CSRs) of the 21140A: bits, and what they hold after a reset.

Source: DIGITAL Semiconductor 21140A PCI Fast Ethernet LAN Controller, Hardware Reference Manual, EC-QN7NF-TE, chapter 3
(as CSRs); names of bits are the manual's.
"""

from __future__ import annotations

#: CSR n is 32 bits at 8 * n.
CSRS = 16
SPACE = CSRS * 8

(
    BUS_MODE,
    TRANSMIT_POLL,
    RECEIVE_POLL,
    RECEIVE_LIST,
    TRANSMIT_LIST,
    STATUS,
    OPERATION,
    INTERRUPTS,
    MISSED,
    SERIAL,
    BOOT_ROM,
    TIMER,
    PINS,
) = range(13)
WATCHDOG = 15

ONES = 0xFFFF_FFFF
#: CSR0 to CSR15; what CSR3 to CSR5 and CSR12 return is made up of more.
AFTER_RESET = (
    *(0xFE00_0000, ONES, ONES, 0, 0, 0, 0x3200_0040, 0xF3FE_0000),
    *(0xE000_0000, 0xFFF4_83FF, ONES, 0xFFFE_0000, 0xFFFF_FE00, ONES, ONES, 0xFFFF_FEC8),
)
#: Bits that the guest may set; the others stay as after a reset. Big-endian buffers and descriptors (CSR0<7>, CSR0<20>)
#: are not among them.
WRITABLE = (
    *(0x01AE_FF7E, 0, 0, ONES & ~3, ONES & ~3, 0, 0xC3EE_FEEA, 0x0001_FFFF),
    *(0, 0x0007_7C07, 0, 0x0001_FFFF, 0, 0, 0, 0x0000_0137),
)

# CSR0.
SOFTWARE_RESET = 1 << 0
SKIP_SHIFT, SKIP_MASK = 2, 0x1F
AUTO_POLL_SHIFT, AUTO_POLL_MASK = 17, 7

# CSR5, and CSR7 for the lower 17.
TI, TPS, TU, TJT, UNF = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 5
RI, RU, RPS, RWT, ETI = 1 << 6, 1 << 7, 1 << 8, 1 << 9, 1 << 10
GTE, FBE, ERI = 1 << 11, 1 << 13, 1 << 14
AIS, NIS = 1 << 15, 1 << 16
NORMAL = TI | TU | RI | GTE | ERI
ABNORMAL = TPS | TJT | UNF | RU | RPS | RWT | ETI | FBE
EVENTS = NORMAL | ABNORMAL
#: States of the processes, and what ended access to the bus: a master abort.
RECEIVE_SHIFT, TRANSMIT_SHIFT, ERROR_SHIFT = 17, 20, 23
STOPPED, RECEIVE_WAITING, RECEIVE_SUSPENDED, TRANSMIT_RUNNING, TRANSMIT_SUSPENDED = 0, 3, 4, 2, 6
MASTER_ABORT = 1
STATUS_ONES = 0xFC00_0000

# CSR6.
HP, SR, HO, IF, PR, PM = 1 << 0, 1 << 1, 1 << 2, 1 << 4, 1 << 6, 1 << 7
FD = 1 << 9
LOOPBACK_SHIFT, LOOPBACK_MASK = 10, 3
ST, PS, TTM, RA = 1 << 13, 1 << 18, 1 << 22, 1 << 30
FILTER_BITS = HP | HO | IF

# CSR8.
MISSED_MASK, MISSED_OVERFLOW = 0xFFFF, 1 << 16
# CSR11.
TIMER_MASK, TIMER_CONTINUOUS = 0xFFFF, 1 << 16
# CSR12.
PIN_DIRECTIONS = 1 << 8
