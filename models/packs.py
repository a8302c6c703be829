"""Which rows the loops put into one pack, and how long it is made; inputs.py writes packs as tensors."""

from collections.abc import Sequence

import torch

_MULTIPLE = 128  # of tokens of a pack on a GPU


def plan_packs(
    lengths: Sequence[int], budget: int, max_rows: int = 0, counts: Sequence[int] | None = None
) -> list[list[int]]:
    """Which rows go into one pack of at most `budget` tokens: first fit, the longest first; each row is in one pack.

    A row longer than the budget has a pack of its own. Rows of a pack keep their order, and packs go by their first.

    Args:
        max_rows: rows in one pack at most; 0: any number.
        counts: how many rows each counts for; None: one each.
    """
    packs: list[list[int]] = []
    room: list[int] = []
    counts = counts or [1] * len(lengths)
    held: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        fits = (
            pack
            for pack, left in enumerate(room)
            if lengths[row] <= left and (not max_rows or held[pack] + counts[row] <= max_rows)
        )
        pack = next(fits, len(packs))
        if pack == len(packs):
            packs.append([])
            room.append(budget)
            held.append(0)
        packs[pack].append(row)
        room[pack] -= lengths[row]
        held[pack] += counts[row]
    return sorted((sorted(pack) for pack in packs), key=lambda pack: pack[0])


def filled_length(tokens: int, device: torch.device) -> int:
    """Tokens that a pack of so many is filled up to: on a GPU its matrix products come in tiles."""
    return _MULTIPLE * -(-tokens // _MULTIPLE) if device.type == "cuda" else tokens
