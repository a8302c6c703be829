"""The contact sheet: order, marks, bars and words, by the pixels and by the page."""

import numpy as np
import pytest

from threedr1.visualization.contact_sheet import (
    _CHOSEN,
    _TILE,
    SCORES,
    _covers,
    _font,
    _without_missing,
    _wrap,
    contact_sheet,
    sheet_order,
    sheet_section,
)


def sheet_input(count: int = 6):
    """Pictures of one grey each, so that a tile says which view it is."""
    images = np.stack([np.full((40, 40, 3), 40 + 30 * view, np.uint8) for view in range(count)])
    rng = np.random.default_rng(0)
    scores = {name: rng.uniform(-1, 1, count) for name in SCORES}
    return images, [f"rendered {view}" for view in range(count)], scores


def tile_greys(sheet_HW3: np.ndarray) -> list[int]:
    """The grey of each picture on a sheet, in reading order."""
    grey = (sheet_HW3 == sheet_HW3[..., :1]).all(-1)
    found = []
    for value in np.unique(sheet_HW3[..., 0]):
        rows, columns = np.nonzero(grey & (sheet_HW3[..., 0] == value))
        if 40 <= value <= 220 and len(rows) > 0.8 * _TILE**2:
            found.append((rows.min() // 100, columns.min(), int(value)))
    return [value for _, _, value in sorted(found)]


def test_order_is_the_choice_then_falling_utility():
    assert sheet_order(np.array([0.1, 0.5, 0.3, 0.9]), [2, 0]) == [2, 0, 3, 1]
    assert sheet_order(np.array([0.2, 0.2, 0.2]), []) == [0, 1, 2]


def test_tiles_stand_in_order_and_chosen_ones_are_marked():
    images, names, scores = sheet_input()
    sheet = contact_sheet(images, names, scores, [4, 1], title="Where?")
    assert tile_greys(sheet) == [40 + 30 * view for view in sheet_order(scores["utility"], [4, 1])]
    marked = (sheet == _CHOSEN).all(-1)
    per_tile = 4 * 4 * (_TILE + 4)  # the line around; the rank's corner comes on top
    assert 2 * per_tile < marked.sum() < 2 * (per_tile + 31 * 31 + 50)
    assert not (contact_sheet(images, names, scores, [], title="Where?") == _CHOSEN).all(-1).any()


def test_bars_are_as_long_as_the_scores_are_high():
    images, names, scores = sheet_input(3)
    scores["clip"] = np.array([0.0, 0.5, 1.0])
    sheet = contact_sheet(images, names, scores, [0, 1, 2], title="Where?")
    bars = (sheet == SCORES["clip"][2]).all(-1)
    rows = np.nonzero(bars.any(1))[0]
    lengths = [int(bars[rows[3], start : start + _TILE].sum()) for start in (20, 20 + 246, 20 + 492)]
    assert lengths[0] == 0 and lengths[2] == pytest.approx(2 * lengths[1], abs=2) and lengths[2] > 100


@pytest.mark.parametrize("count", [1, 2, 16, 40])
@pytest.mark.parametrize(
    "title", ["Where?", "word " * 2000, "x" * 10_000, "红色的椅子在哪里?" * 300, "a\nb\t\x00c", "🪑"]
)
def test_any_number_of_views_and_any_title_fits(count, title):
    images, names, scores = sheet_input(1)
    images, names = np.repeat(images, count, 0), names * count
    scores = {name: np.repeat(values, count) for name, values in scores.items()}  # all alike: bars stay empty
    sheet = contact_sheet(images, names, scores, list(range(min(6, count))), title=title, notes=["note " * 200])
    assert sheet.dtype == np.uint8 and 500 < sheet.shape[1] < 1600
    assert (sheet[:, :14] == 255).all() and (sheet[:, -6:] == 255).all(), "nothing runs over the margin"


def test_lines_are_wrapped_at_words_and_cut_with_an_ellipsis():
    font = _font(22)
    text = " ".join(f"word{number}" for number in range(200))
    lines = _wrap(text, font, 300)
    assert len(lines) == 3 and lines[-1].endswith("…") and all(font.getlength(line) <= 300 for line in lines)
    assert all(word.startswith("word") for line in lines for word in line.rstrip(" …").split())
    assert _wrap("short", font, 300) == ["short"] and _wrap("", font, 300) == []
    assert _wrap("w" * 30, font, 100)[0].startswith("www"), "a long word is broken"


def test_letters_that_the_own_font_lacks_are_noticed():
    assert _covers(_font(22), "Where is the green chair (no. 2)?") and not _covers(_font(22), "椅子")
    assert _without_missing("椅子 Where 椅?", _font(22)) == "… Where …?"
    assert _font(22, "plain words") is _font(22), "a system font is taken only where it is needed"


def test_views_without_scores_and_no_views_are_refused():
    images, names, scores = sheet_input()
    with pytest.raises(ValueError, match="there are 6 pictures"):
        contact_sheet(images, names, {"utility": np.zeros(5)}, [], title="Where?")
    with pytest.raises(ValueError, match="needs views"):
        contact_sheet(images[:0], [], {"utility": np.zeros(0)}, [], title="Where?")


def test_the_section_holds_the_question_the_numbers_and_what_was_taken_off():
    images, names, scores = sheet_input(2)
    scores.pop("clip")
    scores["utility"] = np.array([0.25, 0.75])
    sheet = contact_sheet(images, names, scores, [1], title="Where?")
    text = sheet_section(
        sheet, ["a", "<b>"], scores, [1], title="Where is <it>?", notes=["x & y"], taken_off_V=np.array([0.125, 0.0])
    )
    assert "Where is &lt;it&gt;?" in text and "x &amp; y" in text and "CLIP" not in text
    rows = text.split("<tr>")[2:]
    assert rows[0].startswith("<td>1</td><td>&lt;b&gt;</td>") and "0.750" in rows[0]
    assert rows[1].startswith("<td>–</td><td>a</td>") and "0.250" in rows[1] and "0.125" in rows[1]
