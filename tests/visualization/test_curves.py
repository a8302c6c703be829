"""Curves of several runs in one picture."""

import numpy as np
from PIL import Image

from threedr1.visualization.curves import Panel, draw_panels, mean_curve


def test_the_mean_is_taken_where_all_runs_are():
    assert mean_curve([([10.0, 20.0, 30.0], [1.0, 2.0, 6.0]), ([20.0, 30.0, 40.0], [4.0, 0.0, 9.0])]) == (
        [20.0, 30.0],
        [3.0, 3.0],
    )
    assert mean_curve([([1.0], [2.0])]) == ([1.0], [2.0])
    assert mean_curve([([1.0], [2.0]), ([3.0], [4.0])]) == mean_curve([]) == ([], [])


def test_of_several_runs_the_mean_is_the_thick_line(tmp_path):
    steps = [float(step) for step in range(20)]

    def inked(*levels: float) -> np.ndarray:
        """Pixels of each height that are of a strong blue, the lowest first."""
        curves = [(steps, [level] * len(steps)) for level in (*levels, 0.0, 10.0)]
        path = draw_panels([Panel("rewards", {"all": curves})], tmp_path / "panels.png")
        red, _, blue = np.asarray(Image.open(path).convert("RGB")).astype(int).transpose(2, 0, 1)
        return (blue - red > 100).sum(1)[::-1]

    found = inked(1.0, 1.0)
    strong = np.nonzero(found > 100)[0]
    assert len(strong) and np.ptp(strong) < 6, "one thick line"
    assert strong.mean() < np.nonzero(inked(9.0, 9.0) > 100)[0].mean(), "at the mean"


def test_labels_are_explained_once_and_again_where_they_change(tmp_path, monkeypatch):
    explained = []
    monkeypatch.setattr("matplotlib.axes.Axes.legend", lambda axes, **_: explained.append(axes.get_title()))
    both, one = {"ours": [([1.0, 2.0], [3.0, 4.0])], "blind": [([1.0, 2.0], [2.0, 2.0])]}, {"alone": [([1.0], [1.0])]}
    draw_panels([Panel("a", one), Panel("b", both), Panel("c", both), Panel("d", {**both, **one})], tmp_path / "p.png")
    assert explained == ["b", "d"]
