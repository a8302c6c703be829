"""What the point operations say to wrong arguments: which one it is, and what it was.

Shapes: B scenes, N points, M centres, K neighbours, C or F channels.
"""

import re

import pytest
import torch

from threedr1.third_party import pointnet2

RADIUS = 0.5


def points(num_scenes=2, num_points=6, width=3, dtype=torch.float32):
    return torch.zeros(num_scenes, num_points, width, dtype=dtype)


def idx(*shape, dtype=torch.int32):
    return torch.zeros(*shape, dtype=dtype)


def fps(points_BN3=None, num_samples=3):
    return pointnet2.furthest_point_sample(points() if points_BN3 is None else points_BN3, num_samples)


def ball(points_BN3=None, centers_BM3=None, radius=RADIUS, num_samples=4):
    centers_BM3 = points(num_points=5) if centers_BM3 is None else centers_BM3
    return pointnet2.ball_query(radius, num_samples, points() if points_BN3 is None else points_BN3, centers_BM3)


def fused(points_BN3=None, centers_BM3=None, features_BNF=None, radius=RADIUS, num_samples=4):
    points_BN3 = points() if points_BN3 is None else points_BN3
    centers_BM3 = points(num_points=5) if centers_BM3 is None else centers_BM3
    return pointnet2.query_and_group(radius, num_samples, points_BN3, centers_BM3, features_BNF)


def nearest(query_BN3=None, points_BM3=None):
    points_BM3 = points(num_points=5) if points_BM3 is None else points_BM3
    return pointnet2.three_nn(points() if query_BN3 is None else query_BN3, points_BM3)


def group(features_BCN=None, idx_BMK=None):
    features_BCN = points(width=6) if features_BCN is None else features_BCN
    return pointnet2.group_points(features_BCN, idx(2, 3, 4) if idx_BMK is None else idx_BMK)


def gather(features_BCN=None, idx_BM=None):
    features_BCN = points(width=6) if features_BCN is None else features_BCN
    return pointnet2.gather_points(features_BCN, idx(2, 3) if idx_BM is None else idx_BM)


def mix(features_BCM=None, idx_BN3=None, weight_BN3=None):
    features_BCM = points(width=6) if features_BCM is None else features_BCM
    idx_BN3 = idx(2, 5, 3) if idx_BN3 is None else idx_BN3
    return pointnet2.three_interpolate(
        features_BCM, idx_BN3, points(num_points=5) if weight_BN3 is None else weight_BN3
    )


COORDINATES = [  # a function, the name of an argument that holds coordinates
    (fps, "points_BN3"),
    (ball, "points_BN3"),
    (ball, "centers_BM3"),
    (fused, "points_BN3"),
    (fused, "centers_BM3"),
    (nearest, "query_BN3"),
    (nearest, "points_BM3"),
]


def refused(message, function, **arguments):
    """The ValueError of a call: one sentence that holds all of `message`, a part or several."""
    with pytest.raises(ValueError) as raised:
        function(**arguments)
    text = str(raised.value)
    for part in message:
        assert part in text, text
    assert text.endswith(".") and "\n" not in text and not re.search(r"\.\s", text), text


@pytest.mark.parametrize(("function", "name"), COORDINATES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int32])
def test_coordinates_of_another_type(function, name, dtype):
    refused([name, "float32", str(dtype)], function, **{name: points(dtype=dtype)})


@pytest.mark.parametrize(("function", "name"), COORDINATES)
@pytest.mark.parametrize("shape", [(6, 3), (2, 6, 4), (2, 3, 6), (1, 2, 6, 3), (3,), ()])
def test_coordinates_of_another_shape(function, name, shape):
    refused([name, str(list(shape))], function, **{name: torch.zeros(shape)})


@pytest.mark.parametrize(("function", "name"), [pair for pair in COORDINATES if pair[0] is not fps])
def test_scenes_of_coordinates_that_disagree(function, name):
    refused([name, "scenes", "[3, 6, 3]"], function, **{name: points(num_scenes=3)})


@pytest.mark.parametrize(
    ("function", "name"), [(fps, "points_BN3"), (ball, "points_BN3"), (fused, "points_BN3"), (nearest, "points_BM3")]
)
def test_clouds_without_points(function, name):
    refused([name, "at least one point", "[2, 0, 3]"], function, **{name: points(num_points=0)})


@pytest.mark.parametrize("function", [ball, fused])
@pytest.mark.parametrize("radius", [0.0, -1.0, float("nan"), float("inf")])
def test_radius_that_is_not_positive(function, radius):
    refused(["radius", "positive", str(radius)], function, radius=radius)


@pytest.mark.parametrize("function", [ball, fused])
@pytest.mark.parametrize("num_samples", [0, -3])
def test_balls_without_samples(function, num_samples):
    refused(["num_samples", str(num_samples)], function, num_samples=num_samples)


def test_negative_number_of_furthest_points():
    refused(["num_samples", "-1"], fps, num_samples=-1)


@pytest.mark.parametrize(
    ("function", "name", "shape"),
    [(group, "idx_BMK", (2, 3, 4)), (gather, "idx_BM", (2, 3)), (mix, "idx_BN3", (2, 5, 3))],
)
class TestIndices:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.int16, torch.uint8, torch.bool])
    def test_of_another_type(self, function, name, shape, dtype):
        refused([name, "int32 or int64", str(dtype)], function, **{name: idx(*shape, dtype=dtype)})

    def test_of_another_rank(self, function, name, shape):
        for wrong in (shape[:-1], (*shape, 3)):
            refused([name, str(list(wrong))], function, **{name: idx(*wrong)})

    def test_of_other_scenes(self, function, name, shape):
        wrong = {name: idx(3, *shape[1:])}
        if function is mix:
            wrong["weight_BN3"] = torch.zeros(3, *shape[1:])
        refused([name, str([3, *shape[1:]])], function, **wrong)


@pytest.mark.parametrize(
    ("function", "name"), [(group, "features_BCN"), (gather, "features_BCN"), (mix, "features_BCM")]
)
@pytest.mark.parametrize("shape", [(4, 6), (2, 1, 4, 6), ()])
def test_features_of_another_rank(function, name, shape):
    refused([name, str(list(shape))], function, **{name: torch.zeros(shape)})


@pytest.mark.parametrize(
    ("index_shape", "weight_shape"), [((2, 5, 3), (2, 4, 3)), ((2, 5, 2), (2, 5, 2)), ((2, 5, 3), (2, 5))]
)
def test_weights_that_do_not_fit_their_indices(index_shape, weight_shape):
    wrong = {"idx_BN3": idx(*index_shape), "weight_BN3": torch.zeros(weight_shape)}
    refused(["idx_BN3", "weight_BN3", str(list(index_shape)), str(list(weight_shape))], mix, **wrong)


def test_numbers_that_cannot_be_mixed():
    refused(["features_BCM", "floating-point", "torch.int32"], mix, features_BCM=idx(2, 4, 6))
    refused(["weight_BN3", "floating-point", "torch.int64"], mix, weight_BN3=idx(2, 5, 3, dtype=torch.int64))
    refused(["features_BNF", "floating-point", "torch.int32"], fused, features_BNF=idx(2, 6, 4))


@pytest.mark.parametrize("shape", [(2, 6), (2, 5, 4), (3, 6, 4), (2, 6, 4, 1)])
def test_features_that_do_not_fit_their_points(shape):
    refused(["features_BNF", str(list(shape))], fused, features_BNF=torch.zeros(shape))


def outside_calls(wrong, dtype):
    """Calls with one index out of range, each with a name; a backward gets it directly."""
    ops = torch.ops.threedr1
    idx_BMK = idx(2, 5, 3, dtype=dtype)
    idx_BMK[1, 4, 2] = wrong
    features_BCN, features_BNF = torch.zeros(2, 4, 6), torch.zeros(2, 6, 4)
    weight_BN3 = torch.ones(2, 5, 3)
    yield "group", lambda: pointnet2.group_points(features_BCN, idx_BMK)
    yield "gather", lambda: pointnet2.gather_points(features_BCN, idx_BMK[:, :, 2])
    yield "gather of integers", lambda: pointnet2.gather_points(features_BCN.long(), idx_BMK[:, :, 2])
    yield "gather of float64", lambda: pointnet2.gather_points(features_BCN.double(), idx_BMK[:, :, 2])
    yield "interpolate", lambda: pointnet2.three_interpolate(features_BCN, idx_BMK, weight_BN3)
    if dtype != torch.int32:
        return
    grad_BCP, grad_BCN, grad_BMKX = torch.ones(2, 4, 15), torch.ones(2, 4, 5), torch.ones(2, 5, 3, 7)
    yield "group_points_backward", lambda: ops.group_points_backward(grad_BCP, idx_BMK.flatten(1), 6)
    yield (
        "three_interpolate_backward",
        lambda: ops.three_interpolate_backward(grad_BCN, features_BCN, idx_BMK, weight_BN3),
    )
    yield "group_offsets", lambda: ops.group_offsets(points(), points(num_points=5), features_BNF, idx_BMK, RADIUS)
    yield "group_offsets_backward", lambda: ops.group_offsets_backward(grad_BMKX, idx_BMK, 6, RADIUS)


@pytest.mark.parametrize(
    ("wrong", "dtype"),
    [(6, torch.int32), (-1, torch.int32), (2**31 - 1, torch.int32), (6, torch.int64), (-(2**31), torch.int64)]
    + [(2**32, torch.int64), (-(2**32), torch.int64)],  # those wrap to a valid index in 32 bits
)
def test_indices_outside_the_points(backend, wrong, dtype):
    if backend.device.type != "cpu":
        pytest.skip("a GPU reports this by a device-side assertion, which ends the process")
    for name, call in outside_calls(wrong, dtype):
        try:
            call()
        except (IndexError, ValueError) as error:
            assert "index" in str(error) and "outside" in str(error), f"{name}: {error}"
        else:
            pytest.fail(f"{name} took index {wrong}")


def test_indices_into_no_points(backend):
    if backend.device.type != "cpu":
        pytest.skip("a GPU reports this by a device-side assertion, which ends the process")
    with pytest.raises((IndexError, ValueError), match="outside"):
        pointnet2.gather_points(torch.zeros(1, 4, 0), idx(1, 2))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("function", "name", "value"),
    [
        (ball, "centers_BM3", points()),
        (nearest, "points_BM3", points()),
        (fused, "features_BNF", torch.zeros(2, 6, 4)),
        (group, "idx_BMK", idx(2, 3, 4)),
        (gather, "idx_BM", idx(2, 3)),
        (mix, "idx_BN3", idx(2, 5, 3)),
        (mix, "weight_BN3", points(num_points=5)),
    ],
)
def test_devices_that_disagree(function, name, value):
    others = {
        ball: {"points_BN3": points()},
        nearest: {"query_BN3": points()},
        fused: {"points_BN3": points(), "centers_BM3": points()},
        group: {"features_BCN": points(width=6)},
        gather: {"features_BCN": points(width=6)},
        mix: {"features_BCM": points(width=6), "idx_BN3": idx(2, 5, 3), "weight_BN3": points(num_points=5)},
    }[function]
    refused(
        [name, "cpu", "cuda:0"], function, **{other: given.cuda() for other, given in others.items()} | {name: value}
    )
