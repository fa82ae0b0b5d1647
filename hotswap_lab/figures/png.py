"""Small PNG images with few colors, for pictures with too many parts for shapes.

Tests: ``tests/browser/test_front_ends.py``.
"""

import base64
import struct
import zlib
from collections.abc import Sequence


def png(rows: Sequence[Sequence[int]], colors: Sequence[str]) -> bytes:
    """Encode an image, given the index of each pixel's color.

    It follows the PNG specification (third edition): an image with a palette, of 8 bits a pixel.

    >>> from hotswap_lab.figures.palette import BLACK, WHITE
    >>> png([[0, 1]], [BLACK, WHITE])[:4]
    b'\x89PNG'
    """
    palette = b"".join(bytes.fromhex(color[1:]) for color in colors)
    pixels = zlib.compress(b"".join(b"\0" + bytes(row) for row in rows), 9)
    header = struct.pack(">IIBBBBB", len(rows[0]), len(rows), 8, 3, 0, 0, 0)
    chunks = (b"IHDR", header), (b"PLTE", palette), (b"IDAT", pixels), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def address(data: bytes) -> str:
    """Return a PNG as a data URL.

    >>> address(b"...")
    'data:image/png;base64,Li4u'
    """
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"
