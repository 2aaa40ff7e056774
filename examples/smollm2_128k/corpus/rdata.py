"""Read texts out of an R package's lazy-load data base (`Rdata.rdx` and `Rdata.rdb`).

Only what such a file holds of vectors is read: pairlists, strings, numbers and lists with attributes.
"""

import bz2
import gzip
import lzma
import struct
import zlib
from typing import Any

PAIRLIST, SYMBOL, CHARS = 2, 1, 9
INTEGERS, REALS, LISTS = (10, 13), (14,), (16, 19, 20)
NOTHING = (241, 242, 251, 252, 253, 254)
REFERENCE = 255
HAS_ATTRIBUTES, HAS_TAG = 0x200, 0x400


class UnknownItem(ValueError):
    """An object of a kind that is not read."""


class Reader:
    """One serialized object, in R's XDR format."""

    def __init__(self, data: bytes) -> None:
        self.data, self.position = data, 2
        self.symbols: list[Any] = []
        version = self._integer()
        self.position += 8  # versions of R
        if version == 3:
            self._take(self._integer())  # name of the encoding

    def read(self) -> Any:
        """Return the next item; with attributes it is {"v": value, "attr": attributes}."""
        flags = self._integer()
        kind = flags & 255
        if kind in NOTHING:
            return None
        if kind == REFERENCE:
            return self.symbols[(flags >> 8 or self._integer()) - 1]
        if kind == SYMBOL:
            self.symbols.append(self.read())
            return self.symbols[-1]
        if kind == PAIRLIST:
            return self._pairs(flags)
        if kind == CHARS:
            return self._string()
        value = self._vector(kind)
        return {"v": value, "attr": dict(self.read())} if flags & HAS_ATTRIBUTES else value

    def _pairs(self, flags: int) -> list[tuple[Any, Any]]:
        if flags & HAS_ATTRIBUTES:
            self.read()
        name = self.read() if flags & HAS_TAG else None
        pair = (name, self.read())
        return [pair, *(self.read() or [])]

    def _vector(self, kind: int) -> list[Any]:
        if kind not in (*INTEGERS, *REALS, *LISTS):
            raise UnknownItem(kind)
        count = self._integer()
        if kind in LISTS:
            return [self.read() for _ in range(count)]
        code = f">{count}{'d' if kind in REALS else 'i'}"
        return list(struct.unpack(code, self._take(struct.calcsize(code))))

    def _string(self) -> str | None:
        length = self._integer()
        if length == -1:
            return None
        data = self._take(length)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            return data.decode("latin-1")

    def _integer(self) -> int:
        return struct.unpack(">i", self._take(4))[0]

    def _take(self, count: int) -> bytes:
        self.position += count
        return self.data[self.position - count : self.position]


def read_texts(index: bytes, data: bytes) -> dict[str, str]:
    """Return the strings of each object of a data base, a line each.

    Args:
        index: Content of the `.rdx` file.
        data: Content of the `.rdb` file.
    """
    unpack = gzip.decompress if index[:2] == b"\x1f\x8b" else zlib.decompress
    root = Reader(unpack(index)).read()
    variables = root["v"][root["attr"]["names"].index("variables")]
    texts = {}
    for name, (start, length) in zip(variables["attr"]["names"], variables["v"], strict=True):
        try:
            value = Reader(_decompress(data[start : start + length])).read()
        except UnknownItem:
            continue
        items = value["v"] if isinstance(value, dict) else value
        texts[name] = "\n".join(item for item in items if isinstance(item, str))
    return texts


def _decompress(chunk: bytes) -> bytes:
    kind = chunk[4:5]  # after the length
    if kind == b"Z":
        filters = [{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 23}]
        return lzma.decompress(chunk[5:], format=lzma.FORMAT_RAW, filters=filters)
    return bz2.decompress(chunk[5:]) if kind == b"2" else zlib.decompress(chunk[4:])
