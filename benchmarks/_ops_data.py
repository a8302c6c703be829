"""Inputs of the point operations, for ops.py: uniform points in rooms, each tensor made when first asked for.

Shapes: B scenes, N points, M centres, S samples of a ball, C or F channels, X = 3 + F.
"""

from functools import cached_property

import torch
from torch import Tensor

from ..third_party import pointnet2

RADIUS, SAMPLES, GROUP_CHANNELS, INTERPOLATED_CHANNELS = 0.2, 64, 16, 256
ROOM = (6.0, 5.0, 2.7)  # metres


class Data:
    """One set of inputs; later operations get the indices that they would get in the network.

    Args:
        shape: scenes, points and centres, as "8_40000_2048".
        device: "cpu" or a CUDA device; random numbers are drawn there.
        seed: another one gives another set of the same shape.
    """

    def __init__(self, shape: str, device: str, seed: int = 0) -> None:
        self.num_scenes, self.num_points, self.num_centers = (int(number) for number in shape.split("_"))
        self.device = device
        self._seed = seed

    def _random(self, stream: int, *sizes: int) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(100 * self._seed + stream)
        return torch.rand(self.num_scenes, *sizes, generator=generator, device=self.device)

    @cached_property
    def points_BN3(self) -> Tensor:
        return self._random(0, self.num_points, 3) * torch.tensor(ROOM, device=self.device)

    @cached_property
    def centers_BM3(self) -> Tensor:
        chosen_BM = pointnet2.furthest_point_sample(self.points_BN3, self.num_centers)
        return self.points_BN3.gather(1, chosen_BM.long()[..., None].expand(-1, -1, 3))

    @cached_property
    def ball_BMS(self) -> Tensor:
        return pointnet2.ball_query(RADIUS, SAMPLES, self.points_BN3, self.centers_BM3)

    @cached_property
    def near_BN3(self) -> Tensor:
        return pointnet2.three_nn(self.points_BN3, self.centers_BM3)[1]

    @cached_property
    def features_BCN(self) -> Tensor:
        return self._random(1, GROUP_CHANNELS, self.num_points)

    @cached_property
    def features_BNF(self) -> Tensor:
        return self.features_BCN.transpose(1, 2).contiguous()

    @cached_property
    def features_BCM(self) -> Tensor:
        return self._random(2, INTERPOLATED_CHANNELS, self.num_centers)

    @cached_property
    def weight_BN3(self) -> Tensor:
        return self._random(3, self.num_points, 3)

    @cached_property
    def grad_BCMS(self) -> Tensor:
        return self._random(4, GROUP_CHANNELS, self.num_centers, SAMPLES)

    @cached_property
    def grad_BCN(self) -> Tensor:
        return self._random(5, INTERPOLATED_CHANNELS, self.num_points)

    @cached_property
    def grad_BMSX(self) -> Tensor:
        return self._random(6, self.num_centers, SAMPLES, 3 + GROUP_CHANNELS)
