from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import pytest

from devices.storage import chain, images
from devices.storage.backend import DATA, PARENT, ZERO, DiskError, Extent
from devices.storage.chain import Layer, ParentLink, absolute_name, parent_paths, relative_name
from devices.storage.file import HostFile
from devices.storage.views import Pieces

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from devices.storage.backend import Disk

SECTOR = 512


class Toy(Layer):
    """A layer whose file holds the wanted paths of its parent, then its name; its sectors are a dict of the class."""

    format = "toy"
    stored: ClassVar[dict[str, dict[int, bytes]]] = {}
    sizes: ClassVar[dict[str, int]] = {}
    closed: ClassVar[list[str]] = []

    def __init__(self, file: HostFile) -> None:
        self.file, self.path = file, file.path
        *paths, wanted, self.name = file.read_bytes(0, file.size()).decode().split("\n")
        self.size = self.sizes.get(self.name, 8 * SECTOR)
        self.sector_size, self.readonly = SECTOR, file.readonly
        self.sectors = self.stored.get(self.name, {})
        if wanted:
            self.link = ParentLink(wanted, paths, "toy", lambda parent: self.unlike(wanted, parent))

    def unlike(self, wanted: str, parent: Layer) -> str:
        assert isinstance(parent, Toy)
        return "" if parent.name == wanted else f"it is {parent.name}, not {wanted}"

    def read_layer(self, offset: int, views: Sequence[memoryview]) -> list[tuple[int, list[memoryview]]]:
        pieces, rest = Pieces(views), []
        for at in range(offset, offset + sum(map(len, views)), SECTOR):
            assert at < self.size
            piece = pieces.take(SECTOR)
            if at // SECTOR not in self.sectors:
                rest.append((at, piece))
                continue
            content = memoryview(self.sectors[at // SECTOR] * SECTOR)
            for view in piece:
                view[:] = content[: len(view)]
        return rest

    def layer_extents(self, offset: int, length: int) -> Iterator[Extent]:
        for at in range(offset, offset + length, SECTOR):
            yield Extent(at, SECTOR, DATA if at // SECTOR in self.sectors else PARENT if self.link else ZERO)

    def close(self) -> None:
        self.closed.append(self.path)
        self.file.close()
        if self.parent is not None:
            self.parent.close()


@pytest.fixture(autouse=True)
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "DIFFERENCING", ("toy",))
    monkeypatch.setattr(images, "open_layer", lambda file, kind: Toy(file))
    monkeypatch.setattr(Toy, "stored", {})
    monkeypatch.setattr(Toy, "sizes", {})
    monkeypatch.setattr(Toy, "closed", [])


def toy(tmp_path: Path, name: str, parent: str = "", paths: Sequence[str] = ()) -> str:
    path = tmp_path / f"{name}.toy"
    path.write_text("\n".join([*(paths or ([str(tmp_path / f"{parent}.toy")] if parent else [])), parent, name]))
    return str(path)


def opened(path: str) -> Disk:
    return images.open_file(HostFile(path), "toy")


def refusal(path: str) -> str:
    before = sorted(os.listdir("/proc/self/fd"))
    with pytest.raises(DiskError) as caught:
        opened(path)
    assert sorted(os.listdir("/proc/self/fd")) == before
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    return message


def test_each_sector_comes_from_the_highest_layer_that_has_it(tmp_path: Path) -> None:
    toy(tmp_path, "base")
    toy(tmp_path, "middle", "base")
    Toy.stored.update(base={0: b"a", 1: b"a", 2: b"a"}, middle={1: b"b", 3: b"b"}, leaf={2: b"c", 4: b"c"})
    disk = opened(toy(tmp_path, "leaf", "middle"))
    data = bytearray(b"?" * 6 * SECTOR)
    disk.read(0, [memoryview(data)[at : at + 700] for at in range(0, len(data), 700)])
    assert [data[at : at + SECTOR] for at in range(0, len(data), SECTOR)] == [
        letter * SECTOR for letter in (b"a", b"b", b"c", b"b", b"c", b"\0")
    ]
    kinds = [extent.kind for extent in disk.extents(0, 6 * SECTOR)]
    assert kinds == [DATA] * 5 + [ZERO]


@pytest.mark.parametrize("smaller", ["base", "middle"])
def test_beyond_the_end_of_a_smaller_parent_are_zeros(tmp_path: Path, smaller: str) -> None:
    toy(tmp_path, "base")
    toy(tmp_path, "middle", "base")
    Toy.stored.update(base=dict.fromkeys(range(8), b"a"))
    Toy.sizes.update({smaller: 3 * SECTOR})
    disk = opened(toy(tmp_path, "leaf", "middle"))
    data = bytearray(b"?" * 8 * SECTOR)
    disk.read(0, [memoryview(data)])
    assert data == b"a" * 3 * SECTOR + bytes(5 * SECTOR)
    data = bytearray(b"?" * SECTOR)
    disk.read(5 * SECTOR, [memoryview(data)])
    assert data == bytes(SECTOR)


def test_parents_are_opened_readonly_and_closed_with_the_child(tmp_path: Path) -> None:
    base = toy(tmp_path, "base")
    disk, sibling = opened(toy(tmp_path, "one", "base")), opened(toy(tmp_path, "two", "base"))
    assert disk.parent is not None and disk.parent.readonly and not disk.readonly
    assert "in use by another VM" in refusal(base)
    disk.close()
    sibling.close()
    assert Toy.closed.count(base) == 2
    opened(base).close()


def test_chain_of_many_parents_reads_and_one_too_long_is_refused(tmp_path: Path) -> None:
    toy(tmp_path, "0")
    Toy.stored.update({"0": {3: b"z"}})
    last = [toy(tmp_path, str(depth), str(depth - 1)) for depth in range(1, chain.MAX_PARENTS + 2)]
    disk = opened(last[-2])
    data = bytearray(SECTOR)
    disk.read(3 * SECTOR, [memoryview(data)])
    assert data == b"z" * SECTOR
    assert [extent.kind for extent in disk.extents(2 * SECTOR, 2 * SECTOR)] == [ZERO, DATA]
    disk.close()
    assert "more than 256 parents" in refusal(last[-1])


def test_chain_that_comes_back_to_itself_is_refused(tmp_path: Path) -> None:
    one = toy(tmp_path, "one", "two")
    two = toy(tmp_path, "two", "one")
    with pytest.raises(DiskError, match="never ends") as caught:
        opened(one)
    assert one in str(caught.value) and two in str(caught.value)
    (tmp_path / "link.toy").symlink_to(tmp_path / "self.toy")
    alone = toy(tmp_path, "self", "self", [str(tmp_path / "link.toy")])
    assert "never ends" in refusal(alone)


def test_missing_parent_is_named_with_the_places_where_it_was_sought(tmp_path: Path) -> None:
    message = refusal(toy(tmp_path, "leaf", "lost", [str(tmp_path / "a.toy"), "/none/b.toy"]))
    assert "its parent 'lost' is missing" in message and f"{tmp_path}/a.toy, /none/b.toy" in message


def test_right_parent_is_found_behind_a_wrong_one(tmp_path: Path) -> None:
    wrong, right = toy(tmp_path, "wrong"), toy(tmp_path, "right")
    disk = opened(toy(tmp_path, "leaf", "right", [wrong, "/none", right]))
    assert disk.parent is not None and disk.parent.path == right
    disk.close()
    message = refusal(toy(tmp_path, "leaf", "right", [wrong]))
    assert f"{wrong} is not the parent that it was made from: it is wrong, not right" in message


def test_parent_that_cannot_be_used_is_named_with_its_child(tmp_path: Path) -> None:
    base = toy(tmp_path, "base")
    child = toy(tmp_path, "leaf", "base")
    disk = opened(base)
    assert f"its parent cannot be used: {base}: in use by another VM" in refusal(child)
    disk.close()


@pytest.mark.parametrize(
    ("relative", "absolute", "expected"),
    [
        ([".\\base.vhd"], [], ["/vms/leaf/base.vhd"]),
        (["..\\gold\\base.vhd"], [], ["/vms/gold/base.vhd", "/vms/leaf/base.vhd"]),
        (["base.vhd"], ["\\srv\\base.vhd"], ["/vms/leaf/base.vhd", "/srv/base.vhd"]),
        ([], ["C:\\gold\\base.vhd"], ["/mnt/c/gold/base.vhd", "/gold/base.vhd", "/vms/leaf/base.vhd"]),
        ([], ["\\\\?\\D:\\base.vhd"], ["/mnt/d/base.vhd", "/base.vhd", "/vms/leaf/base.vhd"]),
        ([], ["\\\\server\\share\\base.vhd"], ["/vms/leaf/base.vhd"]),
        ([], ["\\\\?\\Volume{0}\\base.vhd"], ["/vms/leaf/base.vhd"]),
        ([], ["/srv/gold/base.vhd"], ["/srv/gold/base.vhd", "/vms/leaf/base.vhd"]),
        (["\\..\\base.vhd"], [], ["/vms/base.vhd", "/vms/leaf/base.vhd"]),
        (["", ".", "a\0b", "a\nb", "\ud800", "x" * 5000], [], []),
    ],
)
def test_names_of_windows_become_paths_of_the_host(
    relative: list[str], absolute: list[str], expected: list[str]
) -> None:
    assert parent_paths("/vms/leaf/leaf.vhd", relative, absolute) == expected


def test_names_that_we_write_lead_back(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    (tmp_path / "link").symlink_to(folder)
    for parent in (tmp_path / "base.vhd", folder / "base.vhd", tmp_path / "c" / "base.vhd"):
        child = str(tmp_path / "link" / "leaf.vhd")
        assert parent_paths(child, [relative_name(child, str(parent))], [])[0] == str(parent)
        assert parent_paths(child, [], [absolute_name(str(parent))])[0] == str(parent)
    assert relative_name("/vms/leaf.vhd", "/vms/base.vhd") == ".\\base.vhd"
    with pytest.raises(DiskError, match="rename it"):
        relative_name("/vms/leaf.vhd", "/vms/ba\\se.vhd")


def test_pieces_are_taken_in_order_and_not_copied() -> None:
    data = bytearray(range(30))
    pieces = Pieces([memoryview(data)[:7], memoryview(data)[7:7], memoryview(data)[7:20], memoryview(data)[20:]])
    taken = [pieces.take(length) for length in (3, 4, 0, 20, 3)]
    assert [b"".join(views) for views in taken] == [
        bytes(data[a:b]) for a, b in ((0, 3), (3, 7), (7, 7), (7, 27), (27, 30))
    ]
    taken[0][0][0] = 99
    assert data[0] == 99
