"""Colours of what is in a box, and that they reach the language model."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from threedr1.models.connector import Connector
from threedr1.models.scene_encoder.object_color import colors_in_boxes
from threedr1.utils.boxes import points_in_boxes


def test_mean_and_deviation_of_the_points_in_a_box_its_faces_included():
    points = torch.tensor([[0.0, 0, 0], [0.5, 0, 0], [0.51, 0, 0], [3.0, 3.0, 3.0]])
    colors = torch.tensor([[0.2, 0.4, 1.0], [0.6, 0.4, 0.0], [1.0, 1.0, 1.0], [0.1, 0.2, 0.3]])
    boxes = torch.tensor([[0.0, 0, 0, 1.0, 1.0, 1.0, 0.0], [3.0, 3, 3, 0.1, 0.1, 0.1, 0.3], [9.0, 9, 9, 1, 1, 1, 0]])
    found = colors_in_boxes(boxes, points, colors)
    expected = [[0.4, 0.4, 0.5, 0.2, 0.0, 0.5], [0.1, 0.2, 0.3, 0.0, 0.0, 0.0], [0.0] * 6]
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-6, rtol=0)


def test_a_turned_box_holds_other_points():
    points = torch.tensor([[0.9, 0.0, 0.0], [0.9 * math.cos(1.0), 0.9 * math.sin(1.0), 0.0]])
    colors = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    boxes = torch.tensor([[0.0, 0, 0, 2.0, 0.2, 0.2, heading] for heading in (0.0, 1.0)])
    assert colors_in_boxes(boxes, points, colors)[:, :3].tolist() == [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_as_the_points_that_lie_in_each_box_one_by_one(seed):
    rng = np.random.default_rng(seed)
    points = torch.from_numpy(rng.uniform(-2, 2, (200, 3)).astype(np.float32))
    colors = torch.from_numpy(rng.random((200, 3), np.float32))
    boxes = torch.from_numpy(
        np.concatenate([rng.uniform(-2, 2, (5, 3)), rng.uniform(0, 2, (5, 3)), rng.uniform(-4, 4, (5, 1))], 1)
    ).float()
    inside = points_in_boxes(points, boxes)
    for box, row in enumerate(colors_in_boxes(boxes, points, colors)):
        own = colors[inside[:, box]]
        expected = torch.cat([own.mean(0), own.std(0, unbiased=False)]) if len(own) else torch.zeros(6)
        torch.testing.assert_close(row, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("object_color", [True, False])
def test_a_proposals_token_tells_its_colours_where_it_is_to(object_color):
    torch.manual_seed(0)
    sizes = {"encoder_width": 2, "language_width": 8, "num_classes": 3, "num_proposals": 2, "num_layout_tokens": 0}
    made = Connector(**sizes, object_color=object_color)
    features, boxes, probs = torch.randn(1, 2, 2), torch.rand(1, 2, 7), torch.rand(1, 2, 3)
    red, green = torch.zeros(1, 2, 6), torch.zeros(1, 2, 6)
    red[0, 0, 0], green[0, 0, 1] = 1, 1
    apart_K = (
        (made.objects(features, boxes, probs, red) - made.objects(features, boxes, probs, green)).abs().amax(-1)[0]
    )
    assert (float(apart_K[0].detach()) > 1e-4) == object_color and float(apart_K[1].detach()) == 0


def test_what_a_proposal_is_outweighs_its_place_at_the_start():
    """Else a model of random weights learns for long that names are names, and not what they stand for."""
    torch.manual_seed(0)
    made = Connector(encoder_width=256, language_width=384, num_classes=18, num_proposals=48, num_layout_tokens=0)
    features, boxes = torch.randn(1, 48, 256), torch.rand(1, 48, 7) * 4 - 2
    described_KD = made._described(features, boxes, torch.full((1, 48, 18), 1 / 18), torch.rand(1, 48, 6))[0].detach()
    assert float(described_KD.std(0).mean()) > 1.5 * float(made.place_embedding.weight.detach().std(0).mean())
