"""A JPEG's header, and the JPEG of the upper part of a picture made by cutting bytes: no pixel is decoded here.

A decoder stops at the height that the header states: with a smaller one written into it, the rows below a crop cost nothing.
Source: ITU-T T.81, annex B (markers), A.2 (order of blocks). Restart markers would let the rows above and the columns beside a
crop go too; measured, decoding the markers and joining the pieces took the time that it saved.
"""

from __future__ import annotations

from typing import NamedTuple

from triscale.data.decode import _orientation

START, END = b"\xff\xd8\xff", b"\xff\xd9"
MARGIN = 2  # rows kept below a crop: interpolated chroma looks one row further
FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # SOF0 .. SOF15
SEQUENTIAL = (0xC0, 0xC1)  # Huffman-coded; of SOF2 (progressive) every scan is needed for any row


class Header(NamedTuple):
    """What the bytes before the first scan say. Sizes in pixels as stored, offsets in bytes.

    unit: height of a row of the smallest coded units (MCU). size_at: where the frame's height stands. orientation: EXIF's, 1..8.
    plain: 8 bits, Huffman-coded, sequential, grey or of three colours, in one scan, upright, and with an end: what may be cut.
    """

    height: int
    width: int
    unit: int
    size_at: int
    orientation: int
    plain: bool


def header(data: bytes) -> Header | None:
    """The header of a JPEG's bytes; None for anything else and for one that is damaged or too odd to be sure of."""
    if not data.startswith(START):
        return None
    at, frame, orientation, exifs = 2, 0, 1, 0
    try:
        while True:
            marker = data[at + 1]
            if data[at] != 0xFF or marker < 0xC0:
                return None
            if marker == 0xFF:  # padding
                at += 1
                continue
            length = data[at + 2] << 8 | data[at + 3]
            if marker == 0xDA:
                break
            if marker in FRAMES:
                if frame:
                    return None
                frame = at
            elif marker == 0xE1 and data.startswith(b"Exif\0\0", at + 4):
                orientation, exifs = _orientation(data[at + 4 : at + 2 + length]), exifs + 1
            if length < 2:
                return None
            at += 2 + length
        if not frame:
            return None
        size_at, count, scan = frame + 5, data[frame + 9], at + 2 + length
        height, width = data[size_at] << 8 | data[size_at + 1], data[size_at + 2] << 8 | data[size_at + 3]
        factors = [data[frame + 11 + 3 * i] for i in range(count)]
        unit = 8 * max(f & 15 for f in factors) if count > 1 else 8
        plain = data[frame + 1] in SEQUENTIAL and data[frame + 4] == 8 and count in (1, 3) and data[at + 4] == count
    except (IndexError, ValueError):  # the bytes end in the header, or it counts no components
        return None
    # A file cut short lacks the end marker: in entropy-coded data these two bytes can't follow each other.
    plain = plain and orientation == 1 and exifs < 2 and min(height, width, unit) > 0 and data.rfind(END, scan) >= 0
    return Header(height, width, unit, size_at, orientation, plain)


def cut(data: bytes, head: Header, bottom: int) -> tuple[bytes, int]:
    """A JPEG without what lies below row `bottom`, as far as whole coded units allow, and its height.

    Each row above `bottom` decodes as it does in the whole. `head` has to be plain.
    """
    height = -(-(bottom + MARGIN) // head.unit) * head.unit
    if height >= head.height:
        return data, head.height
    return b"".join((data[: head.size_at], height.to_bytes(2, "big"), data[head.size_at + 2 :])), height
