"""The contract of the C extension: paths too hot for Python. Built from pyvmm/core/hot/*.c."""

from collections.abc import Sequence
from mmap import mmap
from typing import Any, Protocol

class Memory:
    """Guest memory for C code: the one place where a GPA becomes an address, with its bounds checked."""

    def add(self, gpa: int, buffer: mmap | bytearray | memoryview, readonly: bool, /) -> None:
        """Add a region. The buffer stays exported (and so mapped) as long as this object lives."""

class RingError(ValueError):
    """The other side left a ring in a state that no correct guest leaves it in."""

Packet = tuple[int, int, int, bytes, bytes]
"""(type, flags, transaction id, extra header bytes after the 16-byte descriptor, payload)."""

class Ring:
    """One direction of a VMBus channel: a control page and its data pages in guest memory.

    `pages` are the guest page numbers, control page first. Raises ValueError unless there are a control
    page and at least one data page, all inside writable guest RAM.
    """

    size: int
    """Bytes of the data area."""

    def __init__(self, memory: Memory, pages: Sequence[int], /) -> None: ...
    def init_incoming(self) -> None:
        """Host is reader: set the interrupt mask, as a host does before the channel opens."""

    def init_outgoing(self) -> None:
        """Host is writer: announce pending-send-size support (feature bit 0)."""

    def read(self, limit: int, /) -> tuple[list[Packet], bool]:
        """Take up to `limit` packets off the ring (host is reader).

        Returns them and whether the writer must be signalled because it waits for the room that this
        read made. Raises RingError for indices or packet lengths out of range; nothing is consumed then.
        """

    def mask(self, masked: bool, /) -> bool:
        """Set the reader's interrupt mask, then return whether the ring holds data (re-checked after a full fence)."""

    def write(self, packets: Sequence[Packet], /) -> tuple[int, bool]:
        """Append whole packets in order while they fit (host is writer) and publish them at once.

        The type-specific extra header stands between descriptor and payload; both are padded to 8 bytes
        together. Returns how many were written and whether the reader must be signalled (empty to
        non-empty and not masked). A packet larger than the ring raises ValueError.
        """

    def await_space(self, needed: int, /) -> bool:
        """Set pending_send_size so that the reader signals once `needed` bytes are free; 0 clears it.

        Returns whether that much is free already (re-checked after a full fence).
        """

    def inspect(self) -> dict[str, int]:
        """Indices, mask, pending send size, size and free bytes as they are now."""

def crc32c(data: bytes | bytearray | memoryview, before: int = 0, portable: bool = False, /) -> int:
    """CRC-32C (Castagnoli) of `data`, going on from that of what comes `before`; `portable` is for tests."""

class BlockTable:
    """The block allocation table of a VHDX image: its 64-bit entries as they are in the file. MS-VHDX 2.5.

    Bits 0 to 2 of an entry are the block's state (0 not present, 1 undefined, 2 zero, 3 unmapped, 6 fully and 7
    partially present), bits 20 to 63 its offset in the file in MiB. After every `chunk_ratio` entries of data blocks
    there is one of a sector bitmap: block `n` has entry ``n + n // chunk_ratio``. All entries are 0 at first, and
    runs of zeros cost no memory. Any thread; an index out of range raises IndexError.
    """

    def __init__(self, entries: int, /) -> None: ...
    def __len__(self) -> int: ...
    def load(self, first: int, data: bytes | bytearray | memoryview | mmap, /) -> None:
        """Take over entries as they stand in the file, from entry `first` on."""

    def get(self, index: int, /) -> int: ...
    def set(self, index: int, entry: int, /) -> None:
        """Change one entry, for C at once."""

    def entries(self, first: int, count: int, /) -> bytes:
        """Entries as they stand in the file."""

    def check(
        self,
        chunk_ratio: int,
        block_size: int,
        file_size: int,
        reserved: Sequence[tuple[int, int]],
        *,
        has_parent: bool = False,
        limit: int = 1,
    ) -> list[tuple[int, str]]:
        """What is wrong: up to `limit` pairs of index and kind.

        Sizes are in bytes; `reserved` has up to 64 (offset, length) where no block may be. Kinds are

        - ``state``: no state of that kind of entry (partially present only with `has_parent`);
        - ``outside``: not wholly inside the file (or beyond 128 TiB, which no disk of 64 TiB needs);
        - ``reserved``: in one of the reserved ranges;
        - ``overlap``: on storage of an earlier entry;
        - ``bitmap``: partially present in a chunk whose sector bitmap isn't; told at the chunk's first such block.
        """

    def drain(self) -> None:
        """Return once I/O that C began by the entries as they were before this call is over.

        Called after a block was taken away with `set` and before its storage is used for something else. Other Python
        threads run meanwhile.
        """

def data_runs(data: bytes | bytearray | memoryview | mmap, block: int, /) -> list[tuple[int, int]]:
    """(start, end) of what is not zeros in `data`, in whole blocks of `block` bytes, the last cut where the data ends.

    Other Python threads run meanwhile.
    """

class FastDisk:
    """What C code needs to reach a disk's data without Python: a file, and where in it each block is.

    Without a `table` the disk's bytes are the file's. With one, blocks that are fully present are read and written in
    place; blocks in states 0 to 3 are read as zeros if `zero_when_absent` says so (a disk without a parent); the
    rest is for Python. Durable writes and flushes of a disk with a table are for Python too. Sizes are in bytes.
    """

    size: int
    """Capacity; may change while the disk is in use."""
    writable: bool
    """Whether C may write. Python gets all writes while this is False."""
    @property
    def flush_failed(self) -> bool:
        """Whether a flush or durable write in C has failed: none succeeds there any more, nor may one in Python."""

    def __init__(
        self,
        fd: int,
        size: int,
        sector_size: int,
        writable: bool,
        *,
        table: BlockTable | None = None,
        block_size: int = 0,
        chunk_ratio: int = 0,
        zero_when_absent: bool = False,
    ) -> None: ...
    def close(self) -> None:
        """Leave everything to Python from now on; return once C no longer uses the file, which may be closed then."""

#: Requests, bytes, and how many took less than 2**n us but not less than half of that, by n.
StorageCounters = tuple[int, int, list[int]]

class StorageQueue:
    """A storage channel's requests, carried out without Python as long as nothing is out of the ordinary.

    Reads, writes and flushes to the disks given with `set_disk` go between the rings, the file and guest memory; what
    the host has to wait for goes through io_uring, which also writes to the eventfd `doorbell`. Everything else is left
    to Python: packets unlike these stay in the ring, and requests that fail come back from `serve`.
    """

    any_target: bool
    """Whether requests are served whatever their path and target, and not for 0 and 0 only; off at first."""
    io_uring: bool
    """Whether the host has io_uring for us; without it, `serve` waits for each read and write itself."""
    @property
    def name(self) -> str:
        """``io_uring`` or ``synchronous``."""

    def __init__(
        self, memory: Memory, incoming: Ring, outgoing: Ring, doorbell: int, *, io_uring: bool = True
    ) -> None: ...
    def serve(self) -> tuple[bool, int, list[Packet], list[Packet], bool]:
        """Carry out what is in the incoming ring; one thread at a time.

        Returns

        - whether there is nothing more to do until the doorbell rings;
        - how many packets at the head of the incoming ring are for Python to read now;
        - requests that were taken, but that Python must carry out;
        - completions for which the outgoing ring has no room;
        - whether the guest must be signalled (never, once it has a target).
        """

    def quiesce(self) -> tuple[list[Packet], list[Packet]]:
        """Return once nothing is under way; any thread.

        Returns requests that Python must carry out, and completions that were not sent.
        """

    def drain(self) -> None:
        """Return once nothing is under way; any thread. What is to be told of it waits for `serve`."""

    def set_disk(self, lun: int, disk: FastDisk | None, /) -> None:
        """Serve the disk of a LUN (0 to 63) from now on, or leave it to Python; any thread.

        Returns once the queue uses the disk before no longer.
        """

    def set_target(self, synic: SynIC | None, sint: int, flag: int, /) -> None:
        """Signal the guest by this event flag from now on, without Python; any thread."""

    def take_counters(self, lun: int, /) -> tuple[StorageCounters, StorageCounters, StorageCounters]:
        """Reads, writes and flushes of a LUN that needed no Python, since the last call; any thread."""

    def inspect(self) -> dict[str, int]:
        """``packets_in``, ``packets_out`` and ``signals``."""

#: What a guest takes from its NIC, for `NetDevice.set_offloads`: being told that checksums are right (TCP and UDP over
#: IPv4 and IPv6, and of IPv4's header), TCP segments put together (RSC), and 802.1Q tags beside the frame, not in it.
RECEIVE_TCP4: int
RECEIVE_UDP4: int
RECEIVE_TCP6: int
RECEIVE_UDP6: int
RECEIVE_IP4: int
RECEIVE_RSC4: int
RECEIVE_RSC6: int
RECEIVE_VLAN: int

class NetDevice:
    """A synthetic NIC: what its channels' queues share. All methods may be called from any thread.

    Changes apply from when a method returns; what was there before is not used any more then.
    """

    message_size: int
    """Bytes of an NVSP message to the guest: 28, or 40 from NVSP 6.1 on."""

    def __init__(self, memory: Memory, /) -> None: ...
    def set_port(self, fd: int, /) -> None:
        """Move frames through `fd`, as in `devices.network.port`, or -1 for none; OSError if it can't be watched."""

    def set_link(self, up: bool, /) -> None:
        """Down, as at first: nothing is received, and what the guest sends is completed and dropped."""

    def set_receive_buffer(
        self, runs: Sequence[tuple[int, int]] | None, buffer_id: int = 0, section_size: int = 0, /
    ) -> int:
        """Use a receive buffer of these (GPA, bytes), or none.

        What the guest holds of the one before is forgotten, and so are control messages that wait. Returns how many
        sections there are. Raises ValueError for memory that isn't guest RAM, runs that don't meet at ends of pages, or
        no sections for data beside the 16 for control messages.
        """

    def set_send_buffer(self, runs: Sequence[tuple[int, int]] | None, section_size: int = 0, /) -> int:
        """Use a send buffer, or none; returns how many sections there are. Raises ValueError as above."""

    def set_filter(self, packet_filter: int, mac: bytes, multicast: Sequence[bytes] = (), /) -> None:
        """Receive what these NDIS_PACKET_TYPE_* bits say, of up to 64 groups; 0, as at first, is nothing."""

    def set_frame_size(self, size: int, /) -> None:
        """The largest frame either way without its tags; 1514 at first."""

    def set_offloads(self, receive: int, /) -> None:
        """What the guest takes, RECEIVE_* bits; 0 at first. What it may send is up to it, packet by packet."""

    def set_rss(self, key: bytes, table: Sequence[int], hashes: int, /) -> None:
        """Spread frames over channels: Toeplitz `key` (40 bytes), up to 128 sub-channel indices, NDIS_HASH_* bits.

        An empty table: all go to channel 0, as do those whose channel is not open. Raises ValueError.
        """

    def statistics(self) -> dict[str, int]:
        """``sent_frames``, ``sent_bytes``, ``received_frames``, ``received_bytes``, and what was not, by reason."""

    def save(self) -> dict[str, Any]:
        """The sections that the guest holds, and control messages that wait; while no queue is serving."""

    def restore(self, state: dict[str, Any], /) -> None:
        """Take over what `save` returned, once the receive buffer is set. Raises ValueError."""

class NetQueue:
    """The data of one channel of a synthetic NIC; used as ``channel.make_engine(partial(NetQueue, device, index))``.

    RNDIS packets (NVSP message 107, channel type 0) and completions of what was received (108, or empty) are dealt with
    here, all else is left to Python. Queue 0 also reads the port, and deals frames out to the rings of all. A guest
    that breaks the protocol makes `serve` raise RingError. A new queue takes the place of the channel's one before.

    To be used with ``channel.use_engine(queue, queue.event)``.
    """

    event: int
    """A file that becomes readable when there is something to do; it is the queue's own."""
    @property
    def name(self) -> str:
        """``direct``."""

    def __init__(
        self, device: NetDevice, index: int, memory: Memory, incoming: Ring, outgoing: Ring, doorbell: int, /
    ) -> None: ...
    def serve(self) -> tuple[bool, int, list[Packet], list[Packet], bool]:
        """As `StorageQueue.serve`; no packet is taken that Python must carry out."""

    def quiesce(self) -> tuple[list[Packet], list[Packet]]:
        """As `StorageQueue.quiesce`; nobody touches the rings until the next `serve`."""

    def set_target(self, synic: SynIC | None, sint: int, flag: int, /) -> None:
        """Signal the guest by this event flag from now on, without Python; any thread."""

    def send_control(self, message: bytes, /) -> bool:
        """Send an RNDIS control message to the guest, in order; any thread.

        Up to 64 wait until the guest gives receive sections back. False for one more, or one larger than a section.
        """

    def inspect(self) -> dict[str, int]:
        """``packets_in``, ``packets_out`` and ``signals``."""

class ReferenceTime:
    """Reference time of a partition: 100 ns units on the guest's TSC. TLFS chapter 12.4.

    `tsc_offset` is guest TSC minus host TSC modulo 2**64; `elapsed` what reference time is right now.
    ``time = (tsc * scale >> 64) + offset`` holds for the guest's TSC.
    """

    scale: int
    offset: int

    def __init__(self, tsc_khz: int, tsc_offset: int, elapsed: int = 0, /) -> None: ...
    def now(self) -> int: ...

class SynIC:
    """The synthetic interrupt controller and the four synthetic timers of one VP. TLFS chapters 11 and 12.

    MSR access and `scan` belong to the VP's own thread; `post`, `signal_event` and `raise_sint` to anybody. Times are
    reference time in 100 ns. With `vm_fd` -1 interrupts are not sent to KVM but kept for `take_interrupts`.
    """

    direct_timers: bool
    """Whether timers may be set to direct mode; off at first, which makes their direct bit a reserved one."""

    kvm_timers: bool
    """Whether KVM runs the timers and knows the SINTs: KVM's SynIC is on, and accesses of COUNT do not exit.

    To be set before the VP runs. What others than the VP read of its timers while it runs may be out of date.
    """

    def __init__(self, memory: Memory, vm_fd: int, vp_index: int, apic_id: int, /) -> None: ...
    def set_space_event(self, eventfd: int, /) -> None:
        """Write to `eventfd` when a queue that refused a message has room again; -1 for none."""

    def read_msr(self, index: int, /) -> int | None:
        """Return the MSR's value, or None where the guest must get #GP."""

    def write_msr(self, index: int, value: int, now: int, /) -> bool:
        """Write an MSR; False where the guest must get #GP."""

    def post(self, sint: int, message_type: int, payload: bytes, /) -> bool:
        """Queue a message; False if the queue is full. Masked SINT or SynIC off: dropped, as counted in `inspect`."""

    def signal_event(self, sint: int, flag: int, /) -> bool:
        """Set an event flag and interrupt on 0 to 1; False if the SynIC, its event page or the SINT is off."""

    def raise_sint(self, sint: int, /) -> bool:
        """Interrupt with no message and no event flag; False if the SynIC or the SINT is off."""

    def interrupt(self, vector: int, /) -> None:
        """Interrupt the VP past all SINTs; any thread."""

    def scan(self, now: int, /) -> int:
        """Deliver queued messages and due timers; return the next deadline in reference time, 0 for none."""

    def take_interrupts(self) -> list[int]:
        """Vectors raised since the last call (only with `vm_fd` -1)."""

    def reset(self) -> None: ...
    def save(self) -> dict[str, object]: ...
    def restore(self, state: dict[str, object], /) -> None: ...
    def inspect(self) -> dict[str, Any]: ...

class Switch:
    """The in-process data plane of one virtual switch: learns addresses, keeps VLANs apart, never waits for a port.

    One thread is inside `run`; all else may be called by any thread at any time, and has happened when it returns.
    Ports have numbers of the caller's choice. KeyError: no port has that number.
    """

    def __init__(self, mtu: int = 1500, /, *, manual_time: bool = False, patient: bool = False) -> None:
        """`mtu` is the most payload of a frame. With `manual_time` it is the time that `set_time` says.

        A `patient` switch reads from no port while many frames wait for another, and so loses none: for pairs of ports.
        """

    def add_port(
        self,
        number: int,
        kind: str,
        fd: int,
        /,
        *,
        vlan: int = 0,
        tagged: Sequence[int] = (),
        mac: bytes | None = None,
        mac_spoofing: bool = True,
        dhcp_guard: bool = False,
        router_guard: bool = False,
        bandwidth: int = 0,
        link: bool = True,
    ) -> None:
        """Add a port over `fd`, made non-blocking; the switch closes it when the port goes, and when this fails.

        ``socket``: sequenced packets of virtio_net_hdr and frame. ``tap``: the same by read and write. ``packet``: the
        same on an AF_PACKET socket with PACKET_VNET_HDR and PACKET_AUXDATA. ``stream``: 4 bytes of length, big-endian,
        and a frame without header, and never a limit of what it sends. Sockets get complete frames only, until
        `set_offloads`, and streams always. Raises ValueError if the number is taken or there are 1024 ports.

        `vlan` is of frames without a tag, 0 for the one without a number; `tagged` are those that have one on the link.
        `mac` is an address that is known to be there; it is the only one that the port's frames may have as source,
        unless `mac_spoofing`. `bandwidth` in bits/s, each way, 0 for no limit.
        """

    def set_port(
        self,
        number: int,
        /,
        *,
        vlan: int = 0,
        tagged: Sequence[int] = (),
        mac: bytes | None = None,
        mac_spoofing: bool = True,
        dhcp_guard: bool = False,
        router_guard: bool = False,
        bandwidth: int = 0,
        link: bool = True,
    ) -> None:
        """Set the port as `add_port` does, whole. What waits for it and would not pass any more is dropped."""

    def set_offloads(self, number: int, offloads: int, /) -> None:
        """What the port takes, OFFLOAD_* of `devices.network.port`."""

    def remove_port(self, number: int, /) -> None:
        """Close the port's descriptor and forget it."""

    def mirror(self, number: int, fd: int, limit: int, /) -> None:
        """Write the port's frames, both ways and as on a wire, to the empty pcap file `fd`, up to `limit` bytes.

        -1 stops that. The switch closes the descriptor.
        """

    def statistics(self, number: int, /) -> dict[str, Any]:
        """As ``devices.network.settings.PortStatistics`` has them."""

    def learned(self) -> list[tuple[int, bytes, int]]:
        """VLAN, address and port number, where it was seen within 300 s."""

    def set_time(self, nanoseconds: int, /) -> None:
        """Only with `manual_time`; it starts at 0 and never goes back."""

    def run(self) -> list[tuple[int, str]]:
        """Carry frames, without the GIL, until `stop` or until something ends: what, as number of the port and reason.

        A port that is lost has been closed and passes nothing, but is there until it's removed. Only its mirror has
        ended where the reason starts with ``mirror:``. After `stop` the list is empty.
        """

    def stop(self) -> None:
        """Make the current or else the next `run` return."""

class Doorbells:
    """Event ports of one partition: connection id to eventfd, looked up by the VPs without the GIL."""

    def __init__(self) -> None: ...
    def connect(self, connection_id: int, eventfd: int, /) -> None:
        """Raises ValueError if the id is taken, or RuntimeError if the table is full."""

    def disconnect(self, connection_id: int, /) -> None:
        """After this returns no VP writes to the eventfd any more."""

    def signal(self, connection_id: int, flag: int, /) -> int:
        """What HvSignalEvent does; returns the hypercall status."""

    def inspect(self) -> dict[int, int]:
        """Signals counted by connection id."""

class Vp:
    """The run loop of one VP over its KVM file descriptor and run page.

    `pio` and `mmio` have the methods ``read(address, size)`` and ``write(address, size, value)``, `pio` also
    ``read_string(address, size, count)``, which returns `size` * `count` bytes, and ``write_string(address, size,
    data)``; `hypervisor` has those of `HypervisorCalls`. They are called on the thread that called `run`, with the GIL.
    """

    hypercalls_enabled: bool
    """Whether the hypercall page's ports trap; off until the guest enables the page."""
    xmm_input: bool
    """Whether fast hypercalls may have input in XMM0 to XMM5."""
    extended_ranges: bool
    """Whether lists of TLB flushes may have ranges of large pages."""
    trace_msr: bool
    trace_hypercall: bool

    def __init__(
        self,
        fd: int,
        index: int,
        run_map: mmap,
        memory: Memory,
        synic: SynIC,
        doorbells: Doorbells,
        reference: ReferenceTime,
        pio: object,
        mmio: object,
        hypervisor: HypervisorCalls,
        /,
    ) -> None: ...
    def run(self) -> int:
        """Run the guest until `stop` (return KVM_EXIT_INTR) or an exit that nobody here answers (return its reason).

        What a handler raises ends the run and comes out here.
        """

    def stop(self) -> None:
        """Make the current or else the next `run` return; any thread."""

    def offer_msrs(self, bitmap: bytes, /) -> None:
        """Which of the 512 MSRs from 0x40000000 exist, a bit each; the others give the guest #GP."""

    def offer_hypercalls(self, layouts: Sequence[tuple[int, int, int, int, int, bool]], /) -> None:
        """Which hypercalls exist, as in ``enlightenments.hypercalls.LAYOUTS``; the others are status 2."""

    def hypercall(self, control: int, input: int, output: int, xmm: bytes = ..., /) -> int:
        """Answer a hypercall as if the guest had made it, with these registers; return the result value."""

    def set_peers(self, vps: tuple[Vp, ...], /) -> None:
        """Introduce all VPs of the partition by index, this one too, for flushes and interrupts; once."""

    def set_lazy_eoi(self, gpa: int, /) -> bool:
        """Where KVM tells the guest of EOIs that it may leave out (0: nowhere); False if this KVM does not do that."""

    def counts(self) -> dict[str, Any]:
        """Counters since the VP was made.

        Dicts by number: ``exits``, ``msr_reads``, ``msr_writes`` and ``hypercalls``; a number: ``hypercalls_unknown``.
        ``msr_read_errors``, ``msr_write_errors`` (#GP) and ``hypercall_errors`` have by number how many there were and
        the last one's reference time and value (written, or the result of the call).
        """

class HypervisorCalls(Protocol):
    """What `Vp` asks Python for. Results are what the guest sees."""

    def read_msr(self, vp: int, index: int, /) -> int | None:
        """The value, or None for #GP."""

    def write_msr(self, vp: int, index: int, value: int, /) -> bool:
        """False for #GP."""

    def hypercall(self, vp: int, code: int, input: bytes, start: int, count: int, /) -> tuple[int, int, bytes]:
        """Status, completed repetitions, and the output of the elements from `start` up to the completed ones.

        `input` is whole and of the size that the call's layout and `count` give; `start` and `count` are 0 for a
        simple call.
        """

    def trace_msr(self, vp: int, write: bool, index: int, value: int, valid: bool, /) -> None: ...
    def trace_hypercall(self, vp: int, control: int, input: int, result: int, /) -> None: ...
