"""Views that are chosen once and kept."""

import io

import numpy as np
import pytest
from PIL import Image

from threedr1.datasets.synthesis.kept_views import INDEX, KeptViews


def picture(number: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.full((4, 4, 3), number % 256, np.uint8)).save(stream, format="PNG")
    return stream.getvalue()


class Moody:
    """Chooses otherwise every time."""

    def __init__(self):
        self.asked: list[tuple[str, str]] = []

    def __call__(self, scene_id: str, question: str) -> list[bytes]:
        self.asked.append((scene_id, question))
        return [picture(len(self.asked)), picture(0)]


def test_views_are_chosen_once_and_shared_pictures_are_kept_once(tmp_path):
    folder, moody = tmp_path / "views", Moody()
    views_of = KeptViews(moody, folder, by="a")
    first = views_of("s", "where?")
    assert first == (picture(1), picture(0)) and views_of("s", "where?") == first
    assert views_of("s", "what?") == (picture(2), picture(0))
    again = KeptViews(moody, folder, by="a")
    assert again("s", "where?") == first and len(moody.asked) == 2
    assert len(list(folder.iterdir())) == 3 + 1
    # another model, or number of views, chooses anew and does not disturb the first
    assert KeptViews(moody, folder, by="b")("s", "where?") == (picture(3), picture(0))
    assert KeptViews(moody, folder, by="a")("s", "where?") == first


@pytest.mark.parametrize("cut", [1, 20])
def test_a_row_cut_off_and_a_broken_picture_are_chosen_again(tmp_path, cut):
    folder, moody = tmp_path / "views", Moody()
    KeptViews(moody, folder, by="a")("s", "one?")
    KeptViews(moody, folder, by="a")("s", "two?")
    index = folder / INDEX
    index.write_bytes(index.read_bytes()[:-cut])
    views_of = KeptViews(moody, folder, by="a")
    assert views_of("s", "one?") == (picture(1), picture(0))
    second = views_of("s", "two?")
    assert second == (picture(2 if cut == 1 else 3), picture(0))  # a row without its end is whole
    assert KeptViews(moody, folder, by="a")("s", "two?") == second
    for path in folder.iterdir():
        if path.read_bytes() == picture(1):
            path.write_bytes(b"")
    assert KeptViews(moody, folder, by="a")("s", "one?")[0] == picture(len(moody.asked))


def test_a_dry_run_keeps_nothing(tmp_path):
    folder, moody = tmp_path / "views", Moody()
    assert KeptViews(moody, folder, by="a", read_only=True)("s", "one?") == (picture(1), picture(0))
    assert not folder.exists()
