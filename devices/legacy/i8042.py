"""The i8042 keyboard controller, ports 0x60 and 0x64.

Registers and commands follow the IBM PS/2 Hardware Interface Technical Reference, "Keyboard and Auxiliary
Device Controller"; what is left out is what neither Linux's `drivers/input/serio/i8042.c` nor SeaBIOS uses.
"""

from __future__ import annotations

import threading

from devices.legacy.ports import BytePorts
from devices.legacy.ps2 import SET2_CODES, Keyboard, Mouse
from devices.saved import check_version, saved_bool, saved_bytes, saved_int
from pyvmm.core.device import Device

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from devices.legacy.ports import PortRange
    from pyvmm.core.irq import IrqLine

STATUS_FULL, STATUS_SYSTEM, STATUS_COMMAND, STATUS_UNLOCKED, STATUS_AUX = 0x01, 0x04, 0x08, 0x10, 0x20
# The command byte, RAM byte 0.
KEYBOARD_IRQ, AUX_IRQ, SYSTEM_FLAG, KEYBOARD_OFF, AUX_OFF, TRANSLATE = 0x01, 0x02, 0x04, 0x10, 0x20, 0x40
# The output port.
OUT_NOT_RESET, OUT_A20 = 0x01, 0x02

_REPLY_LIMIT = 16
#: What the controller makes of set 2 bytes: set 1 codes; what is not here passes unchanged.
_TO_SET1 = {code: index for index, code in enumerate(SET2_CODES) if code} | {0x02: 0x41}
_BREAK = 0xF0


class I8042(Device):
    """The controller with its keyboard (IRQ 1) and mouse (IRQ 12).

    `on_reset` is called on the VP's thread when the guest asks for a reset through the controller.
    """

    name = "i8042"

    def __init__(self, keyboard_irq: IrqLine, mouse_irq: IrqLine, on_reset: Callable[[], None]) -> None:
        self._irqs = (keyboard_irq, mouse_irq)
        self._on_reset = on_reset
        self._lock = threading.Lock()
        self._paused = False
        self.keyboard = Keyboard()
        self.mouse = Mouse()
        self._power_on()

    def _power_on(self) -> None:
        self.keyboard.reset()
        self.mouse.reset()
        # As firmware leaves it, for guests that are started without any: keyboard on and translated, mouse off.
        self._ram = bytearray(32)
        self._ram[0] = KEYBOARD_IRQ | SYSTEM_FLAG | AUX_OFF | TRANSLATE
        self._status = STATUS_SYSTEM | STATUS_UNLOCKED
        self._data = 0
        self._replies = bytearray()  # the controller's own, pairs of (1 for the mouse's side, byte)
        self._pending = 0  # the command whose data byte comes next on port 0x60
        self._break = False  # the keyboard has sent a break prefix
        self._output_port = OUT_NOT_RESET | OUT_A20
        self._levels = [False, False]

    def ports(self) -> list[PortRange]:
        """The I/O ports to register."""
        return [
            (0x60, 1, BytePorts(self._read_data, self._write_data), "i8042 data"),
            (0x64, 1, BytePorts(self._read_status, self._write_command), "i8042 command"),
        ]

    # Ports. A wide access reaches past the one port that each handler has: nobody is there.

    def _read_status(self, offset: int) -> int:
        return 0xFF if offset else self._status

    def _read_data(self, offset: int) -> int:
        if offset:
            return 0xFF
        with self._lock:
            value = self._data
            self._status &= ~(STATUS_FULL | STATUS_AUX)
            self._update_lines()
            self._fill()
            return value

    def _write_data(self, offset: int, value: int) -> None:
        if offset:
            return
        reset = False
        with self._lock:
            self._status &= ~STATUS_COMMAND
            command, self._pending = self._pending, 0
            if 0x60 <= command < 0x80:
                self._ram[command & 0x1F] = value
                self._status = self._status & ~STATUS_SYSTEM | value & SYSTEM_FLAG
            elif command == 0xD1:
                reset = self._write_output_port(value)
            elif command == 0xD2:
                self._reply(value)
            elif command == 0xD3:
                self._reply(value, aux=True)
            elif command == 0xD4:
                self._ram[0] &= ~AUX_OFF & 0xFF
                self.mouse.command(value)
            else:
                self._ram[0] &= ~KEYBOARD_OFF & 0xFF
                self.keyboard.command(value)
            self._update_lines()
            self._fill()
        if reset:
            self._on_reset()

    def _write_command(self, offset: int, value: int) -> None:
        if offset:
            return
        if value >= 0xF0:  # pulse the output lines whose bits are 0 for 6 us
            if not value & 1:
                self._on_reset()
            return
        with self._lock:
            self._status |= STATUS_COMMAND
            self._pending = 0
            self._execute(value)
            self._update_lines()
            self._fill()

    def _execute(self, command: int) -> None:
        ram = self._ram
        if 0x20 <= command < 0x40:
            self._reply(ram[command & 0x1F])
        elif 0x60 <= command < 0x80 or 0xD1 <= command <= 0xD4:
            self._pending = command
        elif command == 0xA7:
            ram[0] |= AUX_OFF
        elif command == 0xA8:
            ram[0] &= ~AUX_OFF & 0xFF
        elif command in (0xA9, 0xAB):  # test the mouse's, the keyboard's lines: no fault
            self._reply(0x00)
        elif command == 0xAA:
            self._status |= STATUS_SYSTEM
            ram[0] |= SYSTEM_FLAG
            self._reply(0x55)
        elif command == 0xAD:
            ram[0] |= KEYBOARD_OFF
        elif command == 0xAE:
            ram[0] &= ~KEYBOARD_OFF & 0xFF
        elif command == 0xC0:  # input port: the keyboard is not locked
            self._reply(0x80)
        elif command == 0xD0:
            full = self._status & STATUS_FULL
            aux = self._status & STATUS_AUX
            self._reply(self._output_port | (0x10 if full and not aux else 0) | (0x20 if full and aux else 0))
        elif command in (0xDD, 0xDF):
            self._output_port = self._output_port & ~OUT_A20 | (OUT_A20 if command == 0xDF else 0)

    def _write_output_port(self, value: int) -> bool:
        """Take A20; return whether the reset line goes low."""
        self._output_port = OUT_NOT_RESET | value & OUT_A20
        return not value & OUT_NOT_RESET

    # The output buffer; the lock is held.

    def _reply(self, value: int, *, aux: bool = False) -> None:
        if len(self._replies) < 2 * _REPLY_LIMIT:
            self._replies += bytes((aux, value))

    def _fill(self) -> None:
        """Put the next byte, if any, into an empty output buffer."""
        while not self._status & STATUS_FULL:
            if self._replies:
                aux, value = self._replies[0], self._replies[1]
                del self._replies[:2]
            elif self.keyboard.output and not self._ram[0] & KEYBOARD_OFF:
                translated = self._translate(self.keyboard.take())
                if translated is None:
                    continue
                aux, value = 0, translated
            elif self.mouse.output and not self._ram[0] & AUX_OFF:
                aux, value = 1, self.mouse.take()
            else:
                return
            self._data = value
            self._status |= STATUS_FULL | (STATUS_AUX if aux else 0)
            self._update_lines()

    def _translate(self, value: int) -> int | None:
        """Turn a set 2 byte into set 1, if that is on; None for a break prefix, which becomes bit 7."""
        if not self._ram[0] & TRANSLATE or self.keyboard.code_set == 1:
            return value
        if value == _BREAK:
            self._break = True
            return None
        released, self._break = self._break, False
        code = _TO_SET1.get(value, value)
        return code | 0x80 if released else code

    def _update_lines(self) -> None:
        full, aux = self._status & STATUS_FULL, self._status & STATUS_AUX
        wanted = (
            bool(full and not aux and self._ram[0] & KEYBOARD_IRQ),
            bool(full and aux and self._ram[0] & AUX_IRQ),
        )
        for index in (0, 1):
            if wanted[index] != self._levels[index]:
                self._levels[index] = wanted[index]
                if not self._paused:
                    self._irqs[index].set(wanted[index])

    # What the host does.

    def type_scancodes(self, codes: bytes) -> int:
        """Press and release keys, given as set 1 codes; return how many bytes there was room for. Any thread."""
        with self._lock:
            taken = self.keyboard.press(codes)
            if not self._paused:
                self._fill()
            return taken

    @property
    def a20(self) -> bool:
        """Whether address line 20 is on. It is only remembered: KVM guests always have it on."""
        return bool(self._output_port & OUT_A20)

    @a20.setter
    def a20(self, on: bool) -> None:
        self._output_port = self._output_port & ~OUT_A20 | (OUT_A20 if on else 0)

    # Life cycle.

    def reset(self) -> None:
        with self._lock:
            self._power_on()
            for irq in self._irqs:
                irq.set(False)

    def pause(self) -> None:
        with self._lock:
            self._paused = True

    def resume(self) -> None:
        with self._lock:
            self._paused = False
            for irq, level in zip(self._irqs, self._levels, strict=True):
                irq.set(level)
            self._fill()

    def save(self) -> dict[str, Any]:
        with self._lock:
            return {
                "version": 1,
                "ram": bytes(self._ram),
                "status": self._status,
                "data": self._data,
                "replies": bytes(self._replies),
                "pending": self._pending,
                "break": self._break,
                "output_port": self._output_port,
                "keyboard": self.keyboard.save(),
                "mouse": self.mouse.save(),
            }

    def restore(self, state: dict[str, Any]) -> None:
        check_version(state, 1)
        ram = saved_bytes(state, "ram", 32, 32)
        status = saved_int(state, "status", 0, 0xFF)
        data = saved_int(state, "data", 0, 0xFF)
        replies = saved_bytes(state, "replies", 0, 2 * _REPLY_LIMIT)
        pending = saved_int(state, "pending", 0, 0xFF)
        broken = saved_bool(state, "break")
        output_port = saved_int(state, "output_port", 0, 0xFF)
        keyboard, mouse = state.get("keyboard"), state.get("mouse")
        if len(replies) % 2 or not isinstance(keyboard, dict) or not isinstance(mouse, dict):
            raise ValueError("saved state: keyboard controller is incomplete")
        with self._lock:
            self.keyboard.restore(keyboard)
            self.mouse.restore(mouse)
            self._ram = bytearray(ram)
            self._status = status
            self._data = data
            self._replies = bytearray(replies)
            self._pending = pending
            self._break = broken
            self._output_port = output_port
            self._update_lines()

    def inspect(self) -> dict[str, Any]:
        with self._lock:
            return {
                "command_byte": self._ram[0],
                "status": self._status,
                "a20": self.a20,
                "keyboard": {
                    "waiting": len(self.keyboard.output),
                    "leds": self.keyboard.leds,
                    "code_set": self.keyboard.code_set,
                    "enabled": self.keyboard.enabled,
                },
                "mouse": {"waiting": len(self.mouse.output), "enabled": self.mouse.enabled},
            }
