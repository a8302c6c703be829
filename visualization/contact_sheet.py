"""Contact sheet of candidate views: every view with its scores and its rank in the choice, as a picture and as HTML.

Shapes: V views, H rows, W columns.
"""

import functools
import html
import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .pictures import data_url

# score: its name on the sheet, what it compares, colour of its bar
SCORES = {
    "text_to_3d": ("text", "S text: question and the 3D objects in view", (37, 99, 235)),
    "image_to_3d": ("image", "S image: view and the views that fit the question", (13, 148, 136)),
    "clip": ("CLIP", "S CLIP: question and the picture", (217, 119, 6)),
    "utility": ("utility", "U: weighted sum", (55, 65, 81)),
}
_TILE, _GAP, _MARGIN = 232, 14, 20  # pixels
_LINE, _NUMBER = 18, 46
_CHOSEN, _INK, _FAINT, _RAIL = (190, 24, 93), (31, 41, 55), (107, 114, 128), (229, 231, 235)
_TITLE_LINES, _TITLE_LETTERS, _PAGE_LETTERS = 3, 400, 2000
_FONTS = ("DejaVuSans.ttf", "NotoSansCJK-Regular.ttc", "NotoSans-Regular.ttf", "Arial Unicode.ttf", "msyh.ttc")


def contact_sheet(
    images_VHW3: np.ndarray,
    names: Sequence[str],
    scores: Mapping[str, np.ndarray],
    chosen: Sequence[int],
    *,
    title: str,
    notes: Sequence[str] = (),
    taken_off_V: np.ndarray | None = None,
) -> np.ndarray:
    """Draw a contact sheet [H, W, 3] uint8: the chosen views first, by rank, then the others by falling utility.

    Bars run from the pool's lowest to its highest value of a score.

    Args:
        scores: some of SCORES, each [V]; `utility` must be there.
        chosen: indices of the chosen views, best first.
        title: the question; cut where it does not fit into three lines.
        notes: small lines below the title.
        taken_off_V: what redundancy took off the utility.

    Raises:
        ValueError: no views, or scores, names and pictures that are not as many.
    """
    count = len(images_VHW3)
    if not count or any(len(values) != count for values in (names, *scores.values())):
        sizes = {name: len(values) for name, values in scores.items()}
        raise ValueError(f"A contact sheet needs views, all with scores; there are {count} pictures and {sizes}.")
    order = sheet_order(scores["utility"], chosen)
    columns = min(4 if count < 20 else 6, count) if count > 3 else 3
    width = 2 * _MARGIN + columns * _TILE + (columns - 1) * _GAP
    head = _Header(title, notes, width - 2 * _MARGIN)
    picture_height = round(_TILE * images_VHW3.shape[1] / images_VHW3.shape[2])
    tile_height = picture_height + _LINE * (len(scores) + 1) + 12
    rows = -(-count // columns)
    sheet = Image.new("RGB", (width, head.height + rows * (tile_height + _GAP) + _MARGIN), (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    head.draw(draw)
    for place, view in enumerate(order):
        x = _MARGIN + place % columns * (_TILE + _GAP)
        y = head.height + place // columns * (tile_height + _GAP)
        picture = Image.fromarray(images_VHW3[view]).resize((_TILE, picture_height), Image.Resampling.LANCZOS)
        sheet.paste(picture, (x, y))
        rank = chosen.index(view) + 1 if view in chosen else None
        _frame(draw, (x, y, x + _TILE, y + picture_height), rank)
        taken_off = 0.0 if taken_off_V is None else float(taken_off_V[view])
        _scores(draw, x, y + picture_height + 6, names[view], scores, view, taken_off)
    return np.asarray(sheet)


def sheet_order(utility_V: np.ndarray, chosen: Sequence[int]) -> list[int]:
    """Indices of all views: the chosen ones as they come, then the others by falling utility."""
    others = np.argsort(-np.asarray(utility_V, dtype=np.float64), kind="stable")
    return [*chosen, *(int(view) for view in others if int(view) not in set(chosen))]


def _frame(draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], rank: int | None) -> None:
    """A thin line around a view; around a chosen one a thick one, with its rank in the corner."""
    if rank is None:
        draw.rectangle((box[0], box[1], box[2] - 1, box[3] - 1), outline=_RAIL, width=1)
        return
    draw.rectangle((box[0] - 4, box[1] - 4, box[2] + 3, box[3] + 3), outline=_CHOSEN, width=4)
    size = 30
    draw.rectangle((box[0], box[1], box[0] + size, box[1] + size), fill=_CHOSEN)
    draw.text((box[0] + size / 2, box[1] + size / 2), str(rank), fill=(255, 255, 255), font=_font(18), anchor="mm")


def _scores(
    draw: ImageDraw.ImageDraw,
    x: int,
    y: int,
    name: str,
    scores: Mapping[str, np.ndarray],
    view: int,
    taken_off: float,
) -> None:
    """The lines below a view: its name, then a bar and a number for each score."""
    draw.text((x, y + _LINE / 2), name, fill=_INK, font=_font(14), anchor="lm")
    if taken_off > 5e-4:
        text = f"seen already: -{taken_off:.3f}"
        draw.text((x + _TILE, y + _LINE / 2), text, fill=_FAINT, font=_font(12), anchor="rm")
    for row, (score, (label, _, color)) in enumerate((s for s in SCORES.items() if s[0] in scores), start=1):
        middle = y + row * _LINE + _LINE / 2
        values = np.asarray(scores[score], dtype=np.float64)
        share = (values[view] - values.min()) / np.ptp(values) if np.ptp(values) > 1e-9 else 0.0
        start, end = x + 60, x + _TILE - _NUMBER
        draw.text((x, middle), label, fill=_INK, font=_font(12), anchor="lm")
        draw.rectangle((start, middle - 4, end, middle + 3), fill=_RAIL)
        if share > 0:
            draw.rectangle((start, middle - 4, start + share * (end - start), middle + 3), fill=color)
        draw.text((x + _TILE, middle), f"{values[view]:.3f}", fill=_INK, font=_font(12), anchor="rm")


class _Header:
    """Title and notes, wrapped to a width in pixels."""

    def __init__(self, title: str, notes: Sequence[str], width: int):
        words = " ".join(title.split())[: _TITLE_LETTERS + 1]
        self.title_font = _font(22, words)
        shown = _without_missing(words, self.title_font)
        if shown != words:
            notes = [*notes, "Letters that no font on this machine has are left out of the question"]
        self.title = _wrap(shown, self.title_font, width)
        text = "  ·  ".join(notes)
        self.notes_font = _font(13, text[:_TITLE_LETTERS])
        self.notes = _wrap(text, self.notes_font, width) if text else []
        self.height = _MARGIN + 30 * len(self.title) + 19 * len(self.notes) + 16

    def draw(self, draw: ImageDraw.ImageDraw) -> None:
        for row, line in enumerate(self.title):
            draw.text((_MARGIN, _MARGIN + 30 * row), line, fill=_INK, font=self.title_font)
        for row, line in enumerate(self.notes):
            top = _MARGIN + 30 * len(self.title) + 4 + 19 * row
            draw.text((_MARGIN, top), line, fill=_FAINT, font=self.notes_font)


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """At most three lines no wider than `width`; an ellipsis stands for the rest. Long words and scripts without
    spaces are broken anywhere."""
    shown, rest = text[:_TITLE_LETTERS], len(text) > _TITLE_LETTERS
    lines: list[str] = []
    while shown and len(lines) < _TITLE_LINES:
        fit = next((end for end in range(len(shown), 1, -1) if font.getlength(shown[:end]) <= width), 1)
        space = shown.rfind(" ", 0, fit + 1)
        end = fit if fit == len(shown) or space <= fit // 2 else space
        lines.append(shown[:end].strip())
        shown = shown[end:].strip()
    if (shown or rest) and lines:
        last = lines[-1]
        while last and font.getlength(last + " …") > width:
            last = last[:-1]
        lines[-1] = last.rstrip() + " …"
    return lines


def _font(size: int, text: str = "") -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font, or the first of some system fonts that has the letters of `text`, where its own has not."""
    own = _own_font(size)
    if not isinstance(own, ImageFont.FreeTypeFont) or _covers(own, text):
        return own
    for name in _FONTS:
        try:
            font = ImageFont.truetype(name, size)
        except OSError:
            continue  # not on this machine
        if _covers(font, text):
            return font
    return own


@functools.cache
def _own_font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _covers(font: ImageFont.FreeTypeFont, text: str) -> bool:
    """Whether a font has a glyph for every letter of a text."""
    return _without_missing(text, font) == text


def _without_missing(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """A text in which an ellipsis stands for letters without a glyph, which are drawn as U+FFFF is."""
    missing = _glyph(font, "\uffff")
    lacking = {letter for letter in set(text) if not letter.isspace() and _glyph(font, letter) == missing}
    runs = (("…",) if gone else run for gone, run in itertools.groupby(text, lacking.__contains__))
    return "".join(letter for run in runs for letter in run)


def _glyph(font: ImageFont.FreeTypeFont | ImageFont.ImageFont, letter: str) -> bytes:
    picture = Image.new("L", (64, 64))
    ImageDraw.Draw(picture).text((16, 8), letter, fill=255, font=font)
    return picture.tobytes()


def sheet_section(
    sheet_HW3: np.ndarray,
    names: Sequence[str],
    scores: Mapping[str, np.ndarray],
    chosen: Sequence[int],
    *,
    title: str,
    notes: Sequence[str] = (),
    taken_off_V: np.ndarray | None = None,
) -> str:
    """The sheet as a section of a report: the question in full, the picture, and a table of the numbers."""
    known = [score for score in SCORES if score in scores]
    head = "".join(f"<th title='{SCORES[score][1]}'>{SCORES[score][0]}</th>" for score in known)
    rows = [f"<tr><th>rank</th><th>view</th>{head}<th>seen already</th></tr>"]
    for view in sheet_order(scores["utility"], chosen):
        rank = str(chosen.index(view) + 1) if view in chosen else "–"
        cells = "".join(f"<td>{float(scores[score][view]):.3f}</td>" for score in known)
        taken_off = 0.0 if taken_off_V is None else float(taken_off_V[view])
        rows.append(f"<tr><td>{rank}</td><td>{html.escape(names[view])}</td>{cells}<td>{taken_off:.3f}</td></tr>")
    key = "; ".join(SCORES[score][1] for score in known)
    lines = "".join(f"<p class='note'>{html.escape(line)}</p>" for line in notes)
    shown = html.escape(title if len(title) <= _PAGE_LETTERS else f"{title[:_PAGE_LETTERS]} …")
    return (
        f"<h2>Views for: {shown}</h2>{lines}"
        f"<img alt='contact sheet of candidate views' style='max-width:100%' src='{data_url(sheet_HW3, 92)}'>"
        f"<p class='note'>Bars run from the lowest to the highest value among these views. {key}.</p>"
        f"<details><summary>Numbers</summary><table>{''.join(rows)}</table></details>"
    )
