"""List the members of a tar file by reading its headers only, and read a member where it lies.

Python's tarfile would take three times as long, keeps an object of half a kilobyte for each member, and takes a file
that was cut off within a header for a complete one. Here a file that ends before its end-of-archive block is an
error: a shard cut off by a failed download would otherwise shrink the dataset in silence. Format: POSIX.1-2017 pax
(ustar with `x` records), and GNU's long names.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NamedTuple

from ssl_bench.errors import UserError

_BLOCK = 512
_REGULAR, _GNU_LONG_NAME, _PAX = (b"0", b"\0"), b"L", b"x"


class Member(NamedTuple):
    """A regular file in a tar file."""

    shard: str
    name: str
    offset: int  # of its data
    size: int


def read_member(shard: str, offset: int, size: int) -> bytes:
    """The bytes of one member; safe in any number of processes, since nothing is kept open."""
    handle = os.open(shard, os.O_RDONLY)
    try:
        return os.pread(handle, size, offset)
    finally:
        os.close(handle)


def tar_members(shard: str) -> Iterator[Member]:
    """Every regular member, in order."""
    handle = os.open(shard, os.O_RDONLY)
    try:
        yield from _members(shard, handle, os.fstat(handle).st_size)
    finally:
        os.close(handle)


def _members(shard: str, handle: int, total: int) -> Iterator[Member]:
    """Walk from header to header."""
    position = 0
    attributes: dict[str, str] = {}  # what a preceding pax or GNU record says of the next member
    while True:
        header = os.pread(handle, _BLOCK, position)
        if len(header) < _BLOCK:
            raise _truncated(shard, total, "it ends without the end-of-archive block")
        if header == bytes(_BLOCK):
            return
        _verify(shard, header, position)
        kind, size = header[156:157], int(attributes.get("size", 0)) or _number(shard, header[124:136])
        data = position + _BLOCK
        if data + size > total:
            name = attributes.get("path", _name(header))
            raise _truncated(shard, total, f"its member {name} ends at byte {data + size:,}")
        if kind == _GNU_LONG_NAME:
            attributes["path"] = _text(os.pread(handle, size, data))
        elif kind == _PAX:
            attributes |= _pax(os.pread(handle, size, data))
        else:
            if kind in _REGULAR:
                yield Member(shard, attributes.get("path", _name(header)), data, size)
            attributes = {}
        position = data + (size + _BLOCK - 1) // _BLOCK * _BLOCK


def _verify(shard: str, header: bytes, position: int) -> None:
    """Compare the header's checksum: the sum of its bytes, with the checksum's own field counted as spaces."""
    given = _number(shard, header[148:156])
    if given != sum(header) - sum(header[148:156]) + 8 * ord(" "):
        raise UserError(
            f"{shard} is not a tar file, or is damaged at byte {position:,}: the header's checksum is wrong. "
            "Expected an uncompressed tar; fetch or write the shard again."
        )


def _number(shard: str, field: bytes) -> int:
    """A header's number: octal digits, or big-endian binary where the first bit is set (files over 8 GiB)."""
    if field[0] & 0x80:
        return int.from_bytes(field, "big") & ((1 << (8 * len(field) - 1)) - 1)
    try:
        return int(field.strip(b" \0") or b"0", 8)
    except ValueError as error:
        raise UserError(f"{shard} is not a tar file. Expected an uncompressed tar; write the shard again.") from error


def _name(header: bytes) -> str:
    """A member's name, with ustar's prefix; GNU headers have other things in that place."""
    name, prefix = _text(header[:100]), _text(header[345:500])
    return f"{prefix}/{name}" if prefix and header[257:263] == b"ustar\0" else name


def _text(field: bytes) -> str:
    """Text up to the first zero byte."""
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _pax(data: bytes) -> dict[str, str]:
    """Records of the form "LENGTH KEY=VALUE", each ending in a line feed; LENGTH counts itself."""
    records = {}
    while data.strip(b"\0"):
        length = int(data[: data.index(b" ")])
        key, _, value = data[data.index(b" ") + 1 : length - 1].partition(b"=")
        records[key.decode()] = value.decode("utf-8", "surrogateescape")
        data = data[length:]
    return records


def _truncated(shard: str, total: int, where: str) -> UserError:
    """The file is shorter than it says."""
    return UserError(f"{shard} is truncated: it has {total:,} bytes, and {where}. Fetch or write the shard again.")
