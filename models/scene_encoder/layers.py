"""Layers of the scene encoder: set abstraction, positions, attention, encoder and decoder blocks.

Shapes: B scenes, N points, F extra channels, M tokens, K neighbours, Q queries, D width, H heads.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ...third_party.pointnet2 import furthest_point_sample, gather_points, query_and_group


def mlp(*widths: int, norm: bool = False) -> nn.Sequential:
    """Linear layers with GELU between them; with `norm` a LayerNorm and GELU follow every one, also the last."""
    layers: list[nn.Module] = []
    for index, (narrow, wide) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
        layers.append(nn.Linear(narrow, wide))
        if norm:
            layers.append(nn.LayerNorm(wide))
        if norm or index + 2 < len(widths):
            layers.append(nn.GELU())
    return nn.Sequential(*layers)


class FourierPosition(nn.Module):
    """Positions in metres to width D: sines and cosines of wavelengths 0.5 to 32 m on each axis, then a linear map."""

    def __init__(self, width: int, num_frequencies: int = 8):
        super().__init__()
        wavelengths_W = torch.logspace(math.log2(0.5), math.log2(32.0), num_frequencies, base=2.0)
        self.register_buffer("frequencies_W", 2 * math.pi / wavelengths_W, persistent=False)
        self.frequencies_W: Tensor
        self.project = nn.Linear(6 * num_frequencies + 3, width)

    def forward(self, xyz_BM3: Tensor) -> Tensor:
        phase_BMX = (xyz_BM3[..., None] * self.frequencies_W).flatten(2)
        return self.project(torch.cat([xyz_BM3, phase_BMX.sin(), phase_BMX.cos()], -1))


class BallFeatures(nn.Module):
    """PointNet over a ball: a shared network on each neighbour's offset and features, then the maximum.

    A ball without any point contributes zeros.

    Args:
        feature_dim: channels of a point besides its position.
        radius: metres; offsets are divided by it.
        num_neighbors: points K taken from a ball.
        width: channels D of the result.
    """

    def __init__(self, feature_dim: int, radius: float, num_neighbors: int, width: int):
        super().__init__()
        self.radius, self.num_neighbors = radius, num_neighbors
        self.network = mlp(3 + feature_dim, max(32, width // 4), width // 2, width, norm=True)
        self.compute_dtype = torch.float32

    def forward(self, centre_BQ3: Tensor, points_BN3: Tensor, features_BNF: Tensor) -> Tensor:
        """Features [B, Q, D] of the balls around `centre_BQ3`; differentiable in centres and features."""
        features_BNF = features_BNF.to(points_BN3.dtype)  # the offsets get their type, and need the points' precision
        grouped_BQKX, _ = query_and_group(self.radius, self.num_neighbors, points_BN3, centre_BQ3, features_BNF)
        pooled_BQD = self._described(grouped_BQKX).amax(2).to(points_BN3.dtype)
        any_hit_BQ1 = grouped_BQKX[:, :, 0, :3].detach().square().sum(-1, keepdim=True) < 1.0 + 1e-4
        return pooled_BQD * any_hit_BQ1.to(pooled_BQD.dtype)

    def _described(self, grouped_BQKX: Tensor) -> Tensor:
        """The shared network. Its activations are most of the encoder's memory traffic, so in half precision all of
        them are: autocast would widen them again at every norm."""
        if self.compute_dtype == torch.float32:
            return self.network(grouped_BQKX)
        weights = {name: weight.to(self.compute_dtype) for name, weight in self.network.named_parameters()}
        return functional_call(self.network, weights, (grouped_BQKX.to(self.compute_dtype),))


class SetAbstraction(nn.Module):
    """PointNet++ set abstraction: furthest points become tokens, each described by the ball around it.

    Args:
        num_tokens: tokens M; with fewer points than that, the first point's ball repeats.
        feature_dim, radius, num_neighbors, width: see BallFeatures.
    """

    def __init__(self, feature_dim: int, num_tokens: int, radius: float, num_neighbors: int, width: int):
        super().__init__()
        self.num_tokens = num_tokens
        self.ball = BallFeatures(feature_dim, radius, num_neighbors, width)

    def forward(self, points_BN3: Tensor, features_BNF: Tensor) -> tuple[Tensor, Tensor]:
        """Token positions [B, M, 3] and features [B, M, D]."""
        chosen_BM = furthest_point_sample(points_BN3, self.num_tokens)
        token_xyz_B3M = gather_points(points_BN3.transpose(1, 2).contiguous(), chosen_BM)
        token_xyz_BM3 = token_xyz_B3M.transpose(1, 2).contiguous()
        return token_xyz_BM3, self.ball(token_xyz_BM3, points_BN3, features_BNF)


class Attention(nn.Module):
    """Multi-head attention; positions are added to queries and keys, not to values."""

    def __init__(self, width: int, num_heads: int, dropout: float):
        super().__init__()
        if width % num_heads:
            raise ValueError(f"width {width} is not a multiple of num_heads {num_heads}; change one of them.")
        self.num_heads, self.dropout = num_heads, dropout
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.compute_dtype = torch.float32

    def forward(self, query_BQD: Tensor, key_BMD: Tensor, value_BMD: Tensor, mask: Tensor | None = None) -> Tensor:
        """`mask` is boolean (True may attend) or an additive bias, broadcastable to [B, H, Q, M]."""
        query_BHQd, key_BHMd, value_BHMd = (
            layer(inputs).to(self.compute_dtype).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for layer, inputs in ((self.query, query_BQD), (self.key, key_BMD), (self.value, value_BMD))
        )
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(query_BHQd.dtype)
        mixed_BHQd = F.scaled_dot_product_attention(
            query_BHQd, key_BHMd, value_BHMd, attn_mask=mask, dropout_p=self.dropout if self.training else 0.0
        )
        return self.out(mixed_BHQd.transpose(1, 2).flatten(2).to(query_BQD.dtype))


class EncoderLayer(nn.Module):
    """Pre-norm self-attention among tokens within `radius` metres of each other (3DETR-m), then a feed-forward net."""

    def __init__(self, width: int, num_heads: int, dropout: float, radius: float):
        super().__init__()
        self.radius = radius
        self.norm_attention, self.norm_feed = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, num_heads, dropout)
        self.feed = mlp(width, 2 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens_BMD: Tensor, position_BMD: Tensor, distance_BMM: Tensor) -> Tensor:
        normed_BMD = self.norm_attention(tokens_BMD)
        placed_BMD = normed_BMD + position_BMD
        near_B1MM = (distance_BMM < self.radius)[:, None]  # a token is always near itself
        tokens_BMD = tokens_BMD + self.dropout(self.attention(placed_BMD, placed_BMD, normed_BMD, near_B1MM))
        return tokens_BMD + self.dropout(self.feed(self.norm_feed(tokens_BMD)))


class DecoderLayer(nn.Module):
    """Pre-norm attention among queries, then to the tokens with a learned bias against distance, then feed-forward.

    The bias of head h is -slope_h * metres between a query's box and a token: box evidence is local, and the layer
    would otherwise have to learn that from the positions.
    """

    def __init__(self, width: int, num_heads: int, dropout: float):
        super().__init__()
        self.norm_self, self.norm_cross, self.norm_feed = (nn.LayerNorm(width) for _ in range(3))
        self.self_attention = Attention(width, num_heads, dropout)
        self.cross_attention = Attention(width, num_heads, dropout)
        self.log_slope_H = nn.Parameter(torch.linspace(math.log(0.25), math.log(4.0), num_heads))
        self.feed = mlp(width, 2 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        queries_BQD: Tensor,
        query_position_BQD: Tensor,
        tokens_BMD: Tensor,
        token_position_BMD: Tensor,
        distance_BQM: Tensor,
    ) -> Tensor:
        normed_BQD = self.norm_self(queries_BQD)
        placed_BQD = normed_BQD + query_position_BQD
        queries_BQD = queries_BQD + self.dropout(self.self_attention(placed_BQD, placed_BQD, normed_BQD))
        placed_BQD = self.norm_cross(queries_BQD) + query_position_BQD
        bias_BHQM = -self.log_slope_H.exp()[:, None, None] * distance_BQM[:, None]
        attended_BQD = self.cross_attention(placed_BQD, tokens_BMD + token_position_BMD, tokens_BMD, bias_BHQM)
        queries_BQD = queries_BQD + self.dropout(attended_BQD)
        return queries_BQD + self.dropout(self.feed(self.norm_feed(queries_BQD)))
