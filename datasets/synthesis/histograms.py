"""Bar pictures for the datasheet, drawn with Pillow: numbers of things by length, and by name."""

from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

WIDTH = 720
_INK, _FAINT, _BAR, _RAIL = (31, 41, 55), (107, 114, 128), (37, 99, 235), (229, 231, 235)
_MARGIN, _ROW, _PLOT_HEIGHT, _BINS = 24, 28, 200, 40
_STEPS = (1, 2, 5)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def bin_width(low: int, high: int, bins: int = _BINS) -> int:
    """The smallest of 1, 2, 5, 10, 20, … that takes at most `bins` bins from `low` to `high`, both included."""
    power = 1
    while True:
        for step in _STEPS:
            width = step * power
            if high // width - low // width + 1 <= bins:
                return width
        power *= 10


def binned(counts: Mapping[int, int]) -> tuple[int, int, list[int]]:
    """Start of the first bin, width of a bin, and how many values fall into each; values are whole and at least 0."""
    low, high = min(counts), max(counts)
    width = bin_width(low, high)
    first = low // width
    bars = [0] * (high // width - first + 1)
    for value, count in counts.items():
        bars[value // width - first] += count
    return first * width, width, bars


def quantile(counts: Mapping[int, int], share: float) -> int:
    """The smallest value that at least `share` of all values do not exceed."""
    left = share * sum(counts.values())
    for value in sorted(counts):
        left -= counts[value]
        if left <= 0:
            return value
    return max(counts)


def histogram(counts: Mapping[int, int], title: str, unit: str) -> Image.Image:
    """How often each length occurs. ValueError where there is nothing to draw."""
    if not counts:
        raise ValueError(f"There is nothing to draw for {title!r}: no record was kept.")
    start, width, bars = binned(counts)
    picture = Image.new("RGB", (WIDTH, _PLOT_HEIGHT + 110), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((_MARGIN, 14), title, fill=_INK, font=_font(18))
    middle = f"median {quantile(counts, 0.5)}, 5th percentile {quantile(counts, 0.05)}, 95th {quantile(counts, 0.95)}"
    draw.text((WIDTH - _MARGIN, 18), f"{middle} {unit}", fill=_FAINT, font=_font(13), anchor="ra")
    bottom = 56 + _PLOT_HEIGHT
    pitch = (WIDTH - 2 * _MARGIN) / len(bars)
    for index, count in enumerate(bars):
        left = _MARGIN + index * pitch
        height = _PLOT_HEIGHT * count / max(bars)
        if count:
            right = max(left + 1, left + min(pitch, 60) - 2)
            draw.rectangle((left, min(bottom - height, bottom - 1), right, bottom), fill=_BAR)
    draw.line((_MARGIN, bottom + 1, WIDTH - _MARGIN, bottom + 1), fill=_FAINT)
    every = -(-len(bars) // 10)
    for index in range(0, len(bars), every):
        draw.text((_MARGIN + index * pitch, bottom + 6), str(start + index * width), fill=_FAINT, font=_font(13))
    legend = f"{unit}; bars of {width}, the highest {max(bars)} of {sum(bars)}"
    draw.text((_MARGIN, bottom + 28), legend, fill=_FAINT, font=_font(13))
    return picture


def bars(rows: Sequence[tuple[str, int]], title: str) -> Image.Image:
    """Named counts as rows, in the order given. ValueError where there is none."""
    if not rows:
        raise ValueError(f"There is nothing to draw for {title!r}.")
    picture = Image.new("RGB", (WIDTH, 56 + _ROW * len(rows) + 12), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((_MARGIN, 14), title, fill=_INK, font=_font(18))
    most = max(count for _, count in rows) or 1
    start, end = 220, WIDTH - 90
    for index, (name, count) in enumerate(rows):
        middle = 56 + index * _ROW + _ROW / 2
        shown = name if len(name) <= 26 else f"{name[:25]}…"
        draw.text((start - 10, middle), shown, fill=_INK, font=_font(14), anchor="rm")
        draw.rectangle((start, middle - 8, end, middle + 8), fill=_RAIL)
        if count:
            draw.rectangle((start, middle - 8, start + (end - start) * count / most, middle + 8), fill=_BAR)
        draw.text((end + 8, middle), str(count), fill=_INK, font=_font(14), anchor="lm")
    return picture
