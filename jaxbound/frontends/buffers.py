"""Bytes of files: unpacked into one buffer, and large weights of ONNX read where they lie in it.

Protobuf copies every weight twice, into its message and out of it; fresh memory is what loading of large networks takes
longest for. So they are cut out before: a message is a row of fields, a key (number and wire type) and a value each,
and a message within it is a value behind its length. What is cut out is cut by these lengths alone; a file that is
written in any other way than protobuf itself writes goes to protobuf as it is.

Reference: https://protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import numpy as np

gzip: Any
zlib: Any
try:
    from zlib_ng import gzip_ng as gzip
    from zlib_ng import zlib_ng as zlib
except ImportError:  # five times as slow
    import gzip
    import zlib

LARGE = 1 << 16
"""Bytes from which on a weight is not copied."""
_MOST_TIMES, _CHUNK = 1100, 1 << 18
_GRAPH, _INITIALIZER, _RAW_DATA = (number << 3 | 2 for number in (7, 5, 9))
"""The keys of values with a length: of `ModelProto.graph`, `GraphProto.initializer` and `TensorProto.raw_data`."""


def unpacked(content: bytes) -> memoryview:
    """A file's content, decompressed where it is gzipped.

    Raises:
        ValueError: it is gzipped and broken.
    """
    if not content.startswith(b"\x1f\x8b"):
        return memoryview(content)
    # The last bytes say how long the last part is, mostly the only one; NumPy's large arrays lie in large pages.
    size = min(int.from_bytes(content[-4:], "little"), _MOST_TIMES * len(content))
    room, filled = np.empty(size, np.uint8), 0
    try:
        with gzip.open(io.BytesIO(content)) as file:
            while part := file.read(_CHUNK):
                if filled + len(part) > size:
                    return memoryview(b"".join([room[:filled].data, part, file.read()]))
                room[filled : filled + len(part)] = np.frombuffer(part, np.uint8)
                filled += len(part)
    except (OSError, EOFError, zlib.error) as fault:
        raise ValueError(str(fault)) from fault
    return room[:filled].data.toreadonly()


def lightened(content: memoryview) -> tuple[bytes, dict[int, memoryview]]:
    """A model without the raw data of large initializers, and these data, by their place among all initializers."""
    found: list[memoryview | None] = []
    try:
        light = _lightened(content, (_GRAPH, _INITIALIZER, _RAW_DATA), found)
    except ValueError:
        return bytes(content), {}
    large = {place: data for place, data in enumerate(found) if data is not None}
    return (light if large else bytes(content)), large


def _lightened(message: memoryview, path: tuple[int, ...], found: list[memoryview | None]) -> bytes:
    kept: list[bytes | memoryview] = []
    for key, field, value in _fields(message):
        if key != path[0]:
            kept.append(field)
            continue
        if key == _RAW_DATA:  # of several the last counts
            found[-1] = value if len(value) >= LARGE else None
            value = b"" if len(value) >= LARGE else value
        else:
            if key == _INITIALIZER:
                found.append(None)
            value = _lightened(value, path[1:], found)
        kept += [bytes([key]), _written(len(value)), value]
    return b"".join(kept)


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview, memoryview]]:
    """The fields of a message: key, the whole field, and its value."""
    place, end = 0, len(message)
    while place < end:
        start = place
        key, place = _number(message, place)
        kind = key & 7
        size = {1: 8, 5: 4}.get(kind, 0)
        if kind in (0, 2):
            size, behind = _number(message, place)
            place, size = (place, behind - place) if kind == 0 else (behind, size)
        if kind not in (0, 1, 2, 5) or key >= 1 << 32 or place + size > end:
            raise ValueError("not as protobuf writes")
        yield key, message[start : place + size], message[place : place + size]
        place += size


def _number(message: memoryview, place: int) -> tuple[int, int]:
    """The number that begins at a place, in groups of 7 bits, the lowest first; and where it ends."""
    for count, byte in enumerate(message[place : place + 10]):
        if byte < 128:
            if count and not byte:
                break
            groups = enumerate(message[place : place + count + 1])
            return sum((group & 127) << 7 * number for number, group in groups), place + count + 1
    raise ValueError("not as protobuf writes")


def _written(number: int) -> bytes:
    """A number as protobuf writes it."""
    groups = [number >> 7 * place & 127 for place in range(max(1, -(-number.bit_length() // 7)))]
    return bytes([*(group | 128 for group in groups[:-1]), groups[-1]])
