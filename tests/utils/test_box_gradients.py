"""Gradients of box overlap: against finite differences, at kinks, and on a GPU."""

import math

import numpy as np
import pytest
import torch

from threedr1.utils.boxes import box3d_giou, box3d_iou, giou_axis_aligned, paired_giou, paired_iou


def double(*rows):
    return torch.tensor(rows, dtype=torch.float64).reshape(-1, 7)


def finite_gradients(function, first, second):
    """Gradients of the sum by both box sets, which must not hold NaN or infinity."""
    first, second = first.clone().requires_grad_(), second.clone().requires_grad_()
    function(first, second).sum().backward()
    for boxes in (first, second):
        assert boxes.grad is not None and torch.isfinite(boxes.grad).all()
    return first.grad, second.grad


OVERLAPS = [
    paired_iou,
    paired_giou,
    lambda first, second: paired_giou(first, second, "hull"),
    giou_axis_aligned,
    box3d_iou,
    box3d_giou,
]


@pytest.fixture(scope="module")
def pairs(parity_data):
    with np.load(parity_data / "boxes_iou.npz") as archive:
        return {name: archive[name] for name in archive.files}


class TestGradient:
    def test_loss_gradient(self):
        first = double([0, 0, 0, 1, 2, 1, 0], [3, 3, 0, 1, 1, 1, 0]).requires_grad_()
        second = double([0.3, 0.2, 0.1, 1.5, 1, 1.2, 0], [0, 0, 0, 1, 1, 1, 0])
        assert torch.autograd.gradcheck(lambda boxes: giou_axis_aligned(boxes, second), first)
        giou_axis_aligned(first, second).sum().backward()
        # the second pair does not overlap: moving towards the target must still raise its score
        assert first.grad is not None and (first.grad[1, :2] < 0).all()

    def test_oriented_gradient(self):
        first = double([0, 0, 0, 1, 2, 1, 0.3]).requires_grad_()
        second = double([0.3, 0.2, 0.1, 1.5, 1, 1.2, -0.4])
        assert torch.autograd.gradcheck(lambda boxes: paired_iou(boxes, second), first)

    @pytest.mark.parametrize("heading", [0.0, 0.3])
    def test_equal_headings_can_turn(self, heading):
        # at heading 0 too the common part changes as one box turns
        first = double([0, 0, 0, 1, 2, 1, heading], [0, 0, 0, 2, 0.6, 1, heading]).requires_grad_()
        second = double([0.4, 0.3, 0.1, 1.5, 1, 1.2, heading], [0.3, 0.2, 0.1, 0.5, 1.7, 1.2, heading])
        for function in (paired_iou, paired_giou):
            if function is paired_iou or heading:  # the enclosing box has a kink at heading 0
                assert torch.autograd.gradcheck(lambda boxes, call=function: call(boxes, second), first)
        (gradient,) = torch.autograd.grad(paired_iou(first, second).sum(), first)
        assert gradient[0, 6].abs() > 0.05

    def test_hull(self):
        first = double([0, 0, 0, 1, 2, 1, 0.3]).requires_grad_()
        second = double([0.3, 0.2, 0.1, 1.5, 1, 1.2, -0.4])
        assert torch.autograd.gradcheck(lambda boxes: paired_giou(boxes, second, "hull"), first)

    def test_all_pairs_equal_rows(self):
        first = double([0, 0, 0, 1, 2, 1, 0.3], [1, 0, 0, 1, 2, 1, 0.1])
        second = double([0.3, 0.2, 0.1, 1.5, 1, 1.2, -0.4])
        for matrix, paired in ((box3d_iou, paired_iou), (box3d_giou, paired_giou)):
            gradients = finite_gradients(matrix, first, second)
            expected = finite_gradients(paired, first, second.expand(2, 7))
            torch.testing.assert_close(gradients[0], expected[0])
            torch.testing.assert_close(gradients[1], expected[1].sum(0, keepdim=True))

    def test_finite_on_parity_pairs(self, pairs):
        for dtype in (torch.float32, torch.float64):
            first, second = (torch.tensor(pairs[name], dtype=dtype) for name in ("boxes1", "boxes2"))
            for function in OVERLAPS[:4]:
                finite_gradients(function, first, second)

    @pytest.mark.parametrize("function", OVERLAPS)
    def test_finite_at_kinks(self, function):
        turn = 0.7
        unit = [0, 0, 0, 1, 1, 1, 0]
        firsts = [unit, [0, 0, 0, 1, 1, 1, turn], [0, 0, 0, 0, 1, 1, turn], [0, 0, 0, 0, 0, 0, 0]]
        tiny = [10.0**-power for power in (3, 6, 12, 20, 30, 38, 44)]
        for first in firsts:
            seconds = [first, [0.25, 0, 0, *unit[3:]], [9, 9, 9, *first[3:]], [0, 0, 0, 0.5, 0.5, 0.5, first[6]]]
            seconds += [[*step, *first[3:]] for step in ((1, 0, 0), (0, 0, 1), (1, 1, 1))]
            seconds += [[0, 0, 0, 2, 1, 1, first[6] + math.pi]]
            seconds += [[*first[:6], first[6] + angle] for angle in tiny]
            if min(first[3:6]) > 0:  # between boxes without volume GIoU jumps, and its slope has no bound
                seconds += [[shift, 0, 0, *first[3:]] for shift in tiny]
            for dtype in (torch.float32, torch.float64):
                rows = torch.tensor(seconds, dtype=dtype)
                finite_gradients(function, torch.tensor([first], dtype=dtype).repeat(len(rows), 1), rows)

    def test_forward_mode(self):
        first, second = double([0, 0, 0, 1, 2, 1, 0.3]), double([0.3, 0.2, 0.1, 1.5, 1, 1.2, -0.4])
        gradient, _ = finite_gradients(box3d_iou, first, second)
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(first, torch.ones_like(first))
            tangent = torch.autograd.forward_ad.unpack_dual(box3d_iou(dual, second)).tangent
        assert tangent is not None and tangent.item() == pytest.approx(gradient.sum().item(), abs=1e-12)


@pytest.mark.gpu
class TestGpu:
    @pytest.mark.parametrize("function", OVERLAPS)
    def test_gradients(self, pairs, function):
        general = pairs["category"] == list(pairs["category_names"]).index("general")
        first, second = (torch.tensor(pairs[name][general][:60]) for name in ("boxes1", "boxes2"))
        expected = finite_gradients(function, first, second)
        for dtype, tolerance in ((torch.float64, 1e-8), (torch.float32, 1e-3)):
            for values, wanted in zip(
                finite_gradients(function, first.to("cuda", dtype), second.to("cuda", dtype)), expected, strict=True
            ):
                torch.testing.assert_close(values.cpu().double(), wanted, rtol=tolerance, atol=tolerance)

    @pytest.mark.parametrize("function", OVERLAPS)
    @pytest.mark.parametrize("columns", [6, 7])
    def test_never_waits_for_the_device(self, function, columns):
        rows = np.random.default_rng(0).uniform(0.2, 2, (2, 40, columns))
        first, second = (torch.tensor(half, device="cuda").requires_grad_() for half in rows)
        function(first, second).sum().backward()  # what is set up once may wait
        torch.cuda.set_sync_debug_mode("error")
        try:
            function(first, second).sum().backward()
            with torch.no_grad():
                function(first, second)
        finally:
            torch.cuda.set_sync_debug_mode("default")
