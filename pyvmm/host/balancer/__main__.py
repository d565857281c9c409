"""``python -m pyvmm.host.balancer NAME FD``: a load balancer's process, which says at FD whether it listens."""

from __future__ import annotations

import os
import sys

from devices.network.errors import SwitchError
from pyvmm.host.balancer import process
from pyvmm.host.balancer.definition import BalancerError


def main() -> int:
    """Run it and return the exit status."""
    name, ready = sys.argv[1], int(sys.argv[2])

    def say(text: str) -> None:
        os.write(ready, text.encode())
        os.close(ready)

    listens = False

    def listening() -> None:
        nonlocal listens
        listens = True
        say(process.LISTENS)

    try:
        process.serve(name, listening)
    except (BalancerError, SwitchError, OSError) as error:
        if listens:
            print(error, file=sys.stderr)
        else:
            say(" ".join(str(error).split()))
        return 1
    return 0


if os.fork():
    os._exit(0)
sys.exit(main())
