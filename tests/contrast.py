"""The contrast of two colors, as WCAG defines it: text can be read from 4.5 on."""

from __future__ import annotations


def luminance(color: str) -> float:
    parts = [int(color[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(share * part for share, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(*colors: str) -> float:
    low, high = sorted(map(luminance, colors))
    return (high + 0.05) / (low + 0.05)
