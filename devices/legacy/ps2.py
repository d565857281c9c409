"""The PS/2 keyboard and mouse behind the i8042: what they answer to commands.

Commands and replies follow the IBM PS/2 Hardware Interface Technical Reference, "Keyboards" and "Mouse".
"""

from __future__ import annotations

from devices.saved import check_version, saved_bool, saved_bytes, saved_int

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

ACK, RESEND, SELF_TEST_PASSED = 0xFA, 0xFE, 0xAA
_QUEUE_LIMIT = 256

#: Scan code set 2 make codes by set 1 make code, 0x00 (none) to 0x58.
SET2_CODES = bytes.fromhex(
    "00 76 16 1e 26 25 2e 36 3d 3e 46 45 4e 55 66 0d"
    "15 1d 24 2d 2c 35 3c 43 44 4d 54 5b 5a 14 1c 1b"
    "23 2b 34 33 3b 42 4b 4c 52 0e 12 5d 1a 22 21 2a"
    "32 31 3a 41 49 4a 59 7c 11 29 58 05 06 04 0c 03"
    "0b 83 0a 01 09 77 7e 6c 75 7d 7b 6b 73 74 79 69"
    "72 7a 70 71 84 60 61 78 07"
)
_BREAK = 0xF0


class Ps2Device:
    """What keyboard and mouse share: a bounded queue of bytes to the controller, and commands with an argument."""

    def __init__(self) -> None:
        self.output = bytearray()
        self.reset()

    def reset(self) -> None:
        """Power on."""
        self.output.clear()
        self.argument_of = 0  # the command whose argument byte comes next
        self.last_sent = 0
        self.defaults()

    def defaults(self) -> None:
        """Take the settings that the set-default command restores."""
        self.enabled = False

    def send(self, data: bytes) -> None:
        """Queue bytes for the controller; what does not fit is lost, as in a real device."""
        self.output += data[: _QUEUE_LIMIT - len(self.output)]

    def take(self) -> int:
        """Remove the next byte of the queue."""
        self.last_sent = self.output.pop(0)
        return self.last_sent

    def command(self, value: int) -> None:
        """Take a byte from the controller."""
        pending, self.argument_of = self.argument_of, 0
        if pending:
            self.argument(pending, value)
        else:
            self.execute(value)

    def execute(self, value: int) -> None:
        """Do the commands that keyboard and mouse have alike; anything else is refused."""
        if value == RESEND:
            self.send(bytes((self.last_sent,)))
        elif value in (0xF4, 0xF5, 0xF6):
            if value != 0xF4:
                self.output.clear()
                was_enabled = self.enabled
                self.defaults()
                self.enabled = was_enabled and value == 0xF6
            else:
                self.enabled = True
            self.send(bytes((ACK,)))
        else:
            self.send(bytes((RESEND,)))

    def argument(self, command: int, value: int) -> None:
        """Take the argument of `command`."""
        self.send(bytes((ACK,)))

    def expect(self, command: int) -> None:
        """Acknowledge a command and wait for its argument."""
        self.argument_of = command
        self.send(bytes((ACK,)))

    def save(self) -> dict[str, Any]:
        """Return the state as plain data."""
        return {
            "version": 1,
            "output": bytes(self.output),
            "argument_of": self.argument_of,
            "last_sent": self.last_sent,
            "enabled": self.enabled,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what `save` returned; raise ValueError if it does not fit."""
        check_version(state, 1)
        output = saved_bytes(state, "output", 0, _QUEUE_LIMIT)
        argument_of = saved_int(state, "argument_of", 0, 0xFF)
        last_sent = saved_int(state, "last_sent", 0, 0xFF)
        self.enabled = saved_bool(state, "enabled")
        self.output = bytearray(output)
        self.argument_of = argument_of
        self.last_sent = last_sent


class Keyboard(Ps2Device):
    """A 102-key keyboard that knows scan code sets 1 and 2."""

    SET_LEDS, SCAN_CODE_SET, TYPEMATIC = 0xED, 0xF0, 0xF3

    def defaults(self) -> None:
        self.enabled = True
        self.leds = 0
        self.code_set = 2

    def execute(self, value: int) -> None:
        if value == 0xFF:
            self.reset()
            self.send(bytes((ACK, SELF_TEST_PASSED)))
        elif value == 0xF2:
            self.send(bytes((ACK, 0xAB, 0x83)))
        elif value == 0xEE:  # echo
            self.send(bytes((0xEE,)))
        elif value in (self.SET_LEDS, self.SCAN_CODE_SET, self.TYPEMATIC):
            self.expect(value)
        else:
            super().execute(value)

    def argument(self, command: int, value: int) -> None:
        if command == self.SCAN_CODE_SET and value > 2:
            self.send(bytes((RESEND,)))
            return
        super().argument(command, value)
        if command == self.SET_LEDS:
            self.leds = value & 0x07
        elif command == self.SCAN_CODE_SET:
            if value == 0:
                self.send(bytes((self.code_set,)))
            else:
                self.code_set = value

    def press(self, codes: bytes) -> int:
        """Send keys, given as set 1 codes; return how many of them there was room for."""
        if not self.enabled:
            return len(codes)
        for count, code in enumerate(codes):
            sent = bytes((code,)) if self.code_set == 1 else set2_code(code)
            if len(self.output) + len(sent) > _QUEUE_LIMIT:
                return count
            self.send(sent)
        return len(codes)

    def save(self) -> dict[str, Any]:
        return {**super().save(), "leds": self.leds, "code_set": self.code_set}

    def restore(self, state: dict[str, Any]) -> None:
        leds = saved_int(state, "leds", 0, 7)
        code_set = saved_int(state, "code_set", 1, 2)
        super().restore(state)
        self.leds = leds
        self.code_set = code_set


def set2_code(code: int) -> bytes:
    """Return the set 2 bytes of one byte of set 1; codes without a key give nothing."""
    if code in (0xE0, 0xE1):
        return bytes((code,))
    make = SET2_CODES[code & 0x7F] if code & 0x7F < len(SET2_CODES) else 0
    if not make:
        return b""
    return bytes((_BREAK, make)) if code & 0x80 else bytes((make,))


class Mouse(Ps2Device):
    """A two-button mouse that lies still."""

    SAMPLE_RATE, RESOLUTION = 0xF3, 0xE8

    def defaults(self) -> None:
        super().defaults()
        self.rate = 100
        self.resolution = 2
        self.doubled = False  # 2:1 scaling
        self.remote = False

    def execute(self, value: int) -> None:
        if value == 0xFF:
            self.reset()
            self.send(bytes((ACK, SELF_TEST_PASSED, 0x00)))
        elif value == 0xF2:
            self.send(bytes((ACK, 0x00)))
        elif value == 0xEB:  # read data: buttons and movement
            self.send(bytes((ACK, 0x08, 0x00, 0x00)))
        elif value == 0xE9:  # status request
            status = self.remote << 6 | self.enabled << 5 | self.doubled << 4
            self.send(bytes((ACK, status, self.resolution, self.rate)))
        elif value in (0xE6, 0xE7):
            self.doubled = value == 0xE7
            self.send(bytes((ACK,)))
        elif value in (0xEA, 0xF0):  # stream mode, remote mode
            self.remote = value == 0xF0
            self.send(bytes((ACK,)))
        elif value in (self.SAMPLE_RATE, self.RESOLUTION):
            self.expect(value)
        else:
            super().execute(value)

    def argument(self, command: int, value: int) -> None:
        super().argument(command, value)
        if command == self.SAMPLE_RATE:
            self.rate = value
        else:
            self.resolution = value & 0x03

    def save(self) -> dict[str, Any]:
        return {
            **super().save(),
            "rate": self.rate,
            "resolution": self.resolution,
            "doubled": self.doubled,
            "remote": self.remote,
        }

    def restore(self, state: dict[str, Any]) -> None:
        rate = saved_int(state, "rate", 0, 0xFF)
        resolution = saved_int(state, "resolution", 0, 3)
        doubled, remote = saved_bool(state, "doubled"), saved_bool(state, "remote")
        super().restore(state)
        self.rate, self.resolution, self.doubled, self.remote = rate, resolution, doubled, remote
