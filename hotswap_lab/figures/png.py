"""Small images with few colors, as PNG, for pictures whose parts are too many for shapes."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Sequence


def png(rows: Sequence[Sequence[int]], colors: Sequence[str | None]) -> str:
    """An image as a ``data:`` address: for each pixel, the number of its color; None is transparent.

    Follows the PNG specification (third edition): an image with a palette, of 8 bits a pixel.

    >>> png([[0, 1]], ["#ff0000", None])[:36]
    'data:image/png;base64,iVBORw0KGgoAAA'
    """
    palette = b"".join(bytes.fromhex((color or "#ffffff")[1:]) for color in colors)
    pixels = zlib.compress(b"".join(b"\0" + bytes(row) for row in rows), 9)
    header = struct.pack(">IIBBBBB", len(rows[0]), len(rows), 8, 3, 0, 0, 0)
    alpha = bytes(0 if color is None else 255 for color in colors)
    chunks = (b"IHDR", header), (b"PLTE", palette), (b"tRNS", alpha), (b"IDAT", pixels), (b"IEND", b"")
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return "data:image/png;base64," + base64.b64encode(data).decode()
