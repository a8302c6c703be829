"""Codes along space-filling curves, against hand-made cases and the properties that define the curves."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from threedr1.models.space_filling import ORDERS, curve_codes, hilbert_codes, z_codes


def all_cells(bits: int) -> torch.Tensor:
    return torch.cartesian_prod(*[torch.arange(1 << bits)] * 3)


def test_z_codes_by_hand():
    grid_V3 = torch.tensor([[0, 0, 0], [0, 0, 1], [0, 1, 0], [1, 0, 0], [2, 0, 0], [3, 1, 2]])
    # 3, 1, 2 is 11, 01, 10: the high bits 1 0 1, then the low ones 1 1 0
    assert z_codes(grid_V3).tolist() == [0, 1, 2, 4, 32, 0b101110]
    assert z_codes(torch.tensor([[0xFFFF, 0xFFFF, 0xFFFF], [0x8000, 0, 0]])).tolist() == [2**48 - 1, 2**47]


def test_hilbert_codes_by_hand():
    path_V3 = [[0, 0, 0], [0, 0, 1], [0, 1, 1], [0, 1, 0], [1, 1, 0], [1, 1, 1], [1, 0, 1], [1, 0, 0]]
    assert hilbert_codes(torch.tensor(path_V3), 1).tolist() == list(range(8))
    # the example that Skilling gives with his transform
    assert hilbert_codes(torch.tensor([[5, 10, 20]]), 5).tolist() == [7865]


def test_transposed_orders_exchange_x_and_y():
    grid_V3 = torch.tensor([[3, 1, 2], [5, 0, 7]])
    codes_OV = curve_codes(grid_V3, 3, ORDERS)
    exchanged_OV = curve_codes(grid_V3[:, [1, 0, 2]], 3, ORDERS)
    assert torch.equal(codes_OV[[0, 2]], exchanged_OV[[1, 3]]) and torch.equal(codes_OV[[1, 3]], exchanged_OV[[0, 2]])
    assert codes_OV[1, 0].item() == 0b011110
    with pytest.raises(ValueError, match="no order 'peano'"):
        curve_codes(grid_V3, 3, ["peano"])


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_every_code_is_taken_once_and_hilbert_steps_through_faces(bits):
    grid_V3 = all_cells(bits)
    for codes_V in curve_codes(grid_V3, bits, ORDERS):
        assert codes_V.sort().values.tolist() == list(range(8**bits))
    for codes_V in curve_codes(grid_V3, bits, ["hilbert", "hilbert-trans"]):
        along_V3 = grid_V3[codes_V.argsort()]
        assert (along_V3.diff(dim=0).abs().sum(1) == 1).all()
        assert along_V3[0].tolist() == [0, 0, 0]


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 16))
def test_codes_of_the_larger_cell_around_are_the_leading_bits(data, bits):
    coordinate = st.integers(0, (1 << bits) - 1)
    cells = data.draw(st.lists(st.tuples(coordinate, coordinate, coordinate), min_size=1, max_size=40, unique=True))
    grid_V3 = torch.tensor(cells)
    codes_OV = curve_codes(grid_V3, bits, ORDERS)
    assert (codes_OV >= 0).all() and (codes_OV < 8**bits).all()
    assert all(len(set(row)) == len(cells) for row in codes_OV.tolist())
    for shift in range(1, bits):
        assert torch.equal(codes_OV >> 3 * shift, curve_codes(grid_V3 >> shift, bits - shift, ORDERS))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**48 - 2))
def test_hilbert_neighbours_lie_together_also_in_the_largest_grid(code):
    """Following the curve downwards from its code: at every level the octants are the curve's own."""

    def cell_of(wanted: int) -> torch.Tensor:
        cell_13 = torch.zeros(1, 3, dtype=torch.int64)
        for level in range(16):
            octants_83 = (cell_13 << 1) + all_cells(1)
            digits_8 = hilbert_codes(octants_83, level + 1)
            cell_13 = octants_83[digits_8 == wanted >> 3 * (15 - level)]
        return cell_13[0]

    here_3 = cell_of(code)
    assert hilbert_codes(here_3[None], 16).item() == code
    assert (cell_of(code + 1) - here_3).abs().sum() == 1
