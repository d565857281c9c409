"""The switch in C against a model of it in a few lines: who gets which frame, and with which tag."""

from __future__ import annotations

import os
import socket
from typing import NamedTuple

from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.core._hot import Switch
from tests.fakes import frames

PORTS, VLANS = range(4), (0, 10, 20)
ADDRESSES = [f"00:15:5d:00:00:{number:02x}" for number in range(6)]  # a port's own, and two of nobody's
GROUPS = [frames.BROADCAST, "33:33:00:00:00:01", "01:80:c2:00:00:02"]


class Rules(NamedTuple):
    """Of one port, whose own address is that of its number."""

    vlan: int
    tagged: tuple[int, ...]
    spoofing: bool
    link: bool

    def carries(self, vlan: int) -> bool:
        return vlan == self.vlan or vlan in self.tagged


class Model:
    def __init__(self) -> None:
        self.rules: dict[int, Rules] = {}
        self.seen: dict[tuple[int, str], int] = {}

    def set(self, number: int, rules: Rules) -> None:
        was = self.rules.get(number)
        self.rules[number] = rules
        if was is None or was[:2] != rules[:2] or not rules.link:
            self.seen = {key: port for key, port in self.seen.items() if port != number}

    def _owner(self, vlan: int, address: str) -> int | None:
        number = ADDRESSES.index(address) if address in ADDRESSES else len(PORTS)
        return number if number in self.rules and self.rules[number].carries(vlan) else None

    def send(self, number: int, source: str, to: str, tag: int | None, body: bytes) -> dict[int, bytes]:
        """What comes out of which ports."""
        rules = self.rules[number]
        vlan = tag or rules.vlan
        if not rules.link or (tag and tag not in rules.tagged) or to == GROUPS[2]:
            return {}
        if not rules.spoofing and source != ADDRESSES[number]:
            return {}
        if self._owner(vlan, source) in (None, number):
            self.seen[vlan, source] = number
        goal = None
        if to in ADDRESSES:
            goal = self._owner(vlan, to)
            if goal is None:
                goal = self.seen.get((vlan, to))
        goals = [goal] if goal is not None else [port for port, each in self.rules.items() if each.carries(vlan)]
        frame = frames.ethernet(body, 0x88B6, to=to, source=source)
        return {
            port: frame if self.rules[port].vlan == vlan else frames.tagged(frame, vlan)
            for port in goals
            if port != number and self.rules[port].link
        }


_RULES = st.builds(
    Rules,
    st.sampled_from(VLANS),
    st.sampled_from([(), (10,), (20,), (10, 20)]),
    st.booleans(),
    st.sampled_from([True, True, True, False]),
)
_CHANGE = st.tuples(st.sampled_from(PORTS), _RULES)
_FRAME = st.tuples(
    st.sampled_from(PORTS),
    st.sampled_from([*ADDRESSES, *[None] * 6]),  # None: its own
    st.sampled_from([*ADDRESSES, *GROUPS]),
    st.sampled_from([None, None, 0, 10, 20, 30]),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(_RULES, min_size=4, max_size=4), st.lists(st.one_of(_FRAME, _FRAME, _FRAME, _CHANGE), max_size=40))
def test_frames_go_where_the_model_sends_them(
    first: list[Rules],
    actions: list[tuple[int, str | None, str, int | None] | tuple[int, Rules]],
) -> None:
    switch, model = Switch(), Model()
    ends: dict[int, socket.socket] = {}

    def set_port(number: int, rules: Rules) -> None:
        model.set(number, rules)
        mac = frames.mac_bytes(ADDRESSES[number])
        switch.set_port(
            number, vlan=rules.vlan, tagged=rules.tagged, mac=mac, mac_spoofing=rules.spoofing, link=rules.link
        )

    for number, rules in enumerate(first):
        ours, ends[number] = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ends[number].setblocking(False)
        switch.add_port(number, "socket", ours.detach())
        set_port(number, rules)
    try:
        for turn, action in enumerate(actions):
            if len(action) == 2:
                set_port(*action)
                continue
            number, source, to, tag = action
            source = source or ADDRESSES[number]
            frame = frames.ethernet(b"%d" % turn, 0x88B6, to=to, source=source)
            ends[number].send(frames.vnet() + (frame if tag is None else frames.tagged(frame, tag)))
            switch.stop()
            assert switch.run() == []  # one turn
            assert taken(ends) == model.send(number, source, to, tag, b"%d" % turn)
        learned = {(vlan, mac.hex(":")): number for vlan, mac, number in switch.learned()}
        assert learned == model.seen
    finally:
        for end in ends.values():
            end.close()


def taken(ends: dict[int, socket.socket]) -> dict[int, bytes]:
    """What waits at the ends, one frame each."""
    result = {}
    for number, end in ends.items():
        try:
            result[number] = os.read(end.fileno(), 2000)[10:]
            os.read(end.fileno(), 2000)
        except BlockingIOError:
            continue
        raise AssertionError(f"more than one frame at {number}")
    return result
