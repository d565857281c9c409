"""The control messages of RNDIS without I/O: a message in, messages out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from devices.synthetic.netvsp import rndis
from devices.synthetic.netvsp.oids import Oid, oid_name
from devices.synthetic.netvsp.rndis import Indication, Refused, Status, Type

if TYPE_CHECKING:
    from collections.abc import Callable

    from devices.synthetic.netvsp.adapter import Adapter


class Control:
    """Answers a guest's messages about `adapter`; `begin` is called when it initializes. One thread at a time.

    `trace` gets a line about each message, if that is wanted.
    """

    def __init__(self, adapter: Adapter, begin: Callable[[], None], trace: Callable[[str], None] | None) -> None:
        self._adapter = adapter
        self._begin = begin
        self._trace = trace
        #: The guest has initialized, and not halted since.
        self.operational = False

    def handle(self, message: bytes) -> list[bytes]:
        """Carry a message out and return what the guest is to be sent; raises ValueError for a malformed one."""
        request = rndis.parse(message)
        match request.type:
            case Type.INITIALIZE:
                if self.operational:
                    raise ValueError("RNDIS INITIALIZE for the second time")
                self._begin()
                self.operational = True
                answer = rndis.initialize_complete(request.id)
            case Type.HALT:
                self._note(request)
                self.halt()
                return []
            case Type.QUERY:
                return [self._query(request)]
            case Type.SET:
                return self._set(request)
            case Type.RESET:
                self._adapter.reset()
                answer = rndis.reset_complete()
            case _:  # KEEPALIVE, as nothing else is parsed
                answer = rndis.keepalive_complete(request.id)
        self._note(request)
        return [answer]

    def halt(self) -> None:
        """The guest wants nothing more until it initializes again."""
        self.operational = False
        self._adapter.reset()

    def _query(self, request: rndis.Request) -> bytes:
        status, data = Status.SUCCESS, b""
        try:
            self._check_ready()
            data = self._adapter.query(request.oid, request.data)
        except Refused as refused:
            status = refused.status
        self._note(request, f"-> {status.name} {data[:32].hex(' ')}{' ...' if len(data) > 32 else ''}")
        return rndis.query_complete(request.id, status, data)

    def _set(self, request: rndis.Request) -> list[bytes]:
        status = Status.SUCCESS
        try:
            self._check_ready()
            self._adapter.set(request.oid, request.data)
        except Refused as refused:
            status = refused.status
        self._note(request, f"{request.data[:64].hex(' ')} -> {status.name}")
        answers = [rndis.set_complete(request.id, status)]
        if request.oid == Oid.TCP_OFFLOAD_PARAMETERS and status is Status.SUCCESS:
            current = self._adapter.current_config()
            answers.append(rndis.indicate_status(Indication.OFFLOAD_CURRENT_CONFIG, current))
        return answers

    def _check_ready(self) -> None:
        if not self.operational:
            raise Refused(Status.ADAPTER_NOT_READY)

    def _note(self, request: rndis.Request, text: str = "") -> None:
        if self._trace is not None:
            name = oid_name(request.oid) if request.oid else ""
            self._trace(" ".join(("RNDIS", request.type.name, name, text)).strip())
