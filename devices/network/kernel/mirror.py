"""A pcap file of an interface's frames, written by the in-process switch, which has them as on a wire."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
import time

from devices.network.process_plane import MIRROR_LIMIT, new_file, open_packets
from pyvmm.core._hot import Switch

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_PAUSE_S = 0.001
_PATIENCE_S = 2.0


class Mirror:
    """Writes what passes the interface, both ways, to the new file `path`, until `stop`. Raises PlaneError."""

    def __init__(self, interface: str, path: str, mtu: int, on_trouble: Callable[[str], None]) -> None:
        file = new_file(path)
        try:
            self._packets = socket.socket(fileno=open_packets(interface, both_ways=True)[0])
        except BaseException:
            os.close(file)
            raise
        self._on_trouble = on_trouble
        self._switch = Switch(mtu)
        self._switch.add_port(0, "packet", os.dup(self._packets.fileno()))
        self._switch.mirror(0, file, MIRROR_LIMIT)
        self._thread = threading.Thread(target=self._main, name=f"mirror {interface}", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End once all that has passed so far is in the file."""
        with contextlib.suppress(OSError):  # the interface has gone
            self._packets.bind((self._packets.getsockname()[0], 0))
        deadline = time.monotonic() + _PATIENCE_S
        while select.select([self._packets], [], [], 0)[0] and time.monotonic() < deadline and self._thread.is_alive():
            time.sleep(_PAUSE_S)
        with contextlib.suppress(KeyError):  # it has ended already
            self._switch.mirror(0, -1, 0)
        self._switch.stop()
        self._thread.join()
        self._packets.close()

    def _main(self) -> None:
        while ended := self._switch.run():
            for _, why in ended:
                self._on_trouble(why)
