"""From the scene encoder to the language model: each proposal, each patch of layout, and the object that the user
points at become one token.

Shapes: B scenes (or queries), K proposals, T encoder tokens, M layout tokens, E encoder width, D language-model width,
V views, n tokens of a view, P numbers of a depth cell.
"""

import torch
from torch import nn

from ..third_party.pointnet2 import furthest_point_sample
from .language_model import LanguageModel
from .scene_encoder import SceneEncoder
from .scene_encoder.object_color import NUM_COLOR_CHANNELS
from .scene_encoder.object_query import QueriedObjects

_PLACE_SCALE = 0.1  # of places at the start: below that of what stands there, or it would take long to be seen
_NAME_SCALE = 0.2  # of the names' own words in the tokens: about that of what stands there
_COLOR_SCALE, _COLOR_BANDS = 8.0, 4  # colours of 0..1 are half a period of the slowest wave


def fourier_features(values: torch.Tensor, num_bands: int) -> torch.Tensor:
    """sin and cos of each value at `num_bands` octaves from a period of 16 m down: [..., n] -> [..., 2 n bands]."""
    frequencies = 2.0 ** torch.arange(num_bands, device=values.device) * (2 * torch.pi / 16.0)
    angles = (values[..., None] * frequencies).flatten(-2)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def pool_layout(
    token_xyz_BT3: torch.Tensor, tokens_BTE: torch.Tensor, num_pooled: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Average the encoder tokens around `num_pooled` well-spread centres.

    Returns:
        centres [B, M, 3] in metres, model frame; pooled tokens [B, M, E].
    """
    index_BM = furthest_point_sample(token_xyz_BT3.float(), num_pooled).long()
    centres_BM3 = torch.gather(token_xyz_BT3, 1, index_BM[..., None].expand(-1, -1, 3))
    nearest_BT = torch.cdist(token_xyz_BT3.float(), centres_BM3.float()).argmin(-1)
    share_BMT = nn.functional.one_hot(nearest_BT, num_pooled).transpose(1, 2).to(tokens_BTE.dtype)
    share_BMT = share_BMT / share_BMT.sum(-1, keepdim=True).clamp(min=1)
    return centres_BM3, share_BMT @ tokens_BTE


class Connector(nn.Module):
    """Projects proposals and layout to the width of the language model (paper 1.1: a linear projection, concatenated).

    A proposal's token is made of its feature, its box, its class probabilities and its colours, and carries an
    embedding of its name, which ties it to the words beside it. The token of the object that the user points at is
    made of the proposal that covers it, where one does, of the asked box and of the encoder tokens inside; it carries
    a mark instead of a name.

    Args:
        encoder_width: E.
        language_width: D.
        num_classes: detection classes.
        num_proposals: K.
        name_pool: how many names there are; 0: as many as proposals.
        name_in_token: whether the language model's own embedding of its name is part of a proposal's token.
        token_in_name: whether a name carries, wherever a text says it, what its proposal's token is made of, and its
            place besides on a way of its own: beside features, kind and colours it is hardly heard.
        num_layout_tokens: M; 0 for none.
        object_token: whether an object that is pointed at has a token of its own.
        object_color: whether the colours of an object are part of its token.
        num_view_image_tokens: n, of each view from an image encoder; 0 for none.
        view_image_width: width of that encoder's features.
        num_view_depth_tokens: n, of each view from its depth; 0 for none.
        view_depth_width: numbers that one of them is made of.
        output_scale: standard deviation that tokens start with; the language model's embeddings'.
    """

    NUM_BANDS = 8

    def __init__(  # noqa: PLR0913 - what a token is made of is one thing each
        self,
        *,
        encoder_width: int,
        language_width: int,
        num_classes: int,
        num_proposals: int,
        num_layout_tokens: int,
        name_pool: int = 0,
        name_in_token: bool = False,
        token_in_name: bool = False,
        object_token: bool = True,
        object_color: bool = True,
        num_view_image_tokens: int = 0,
        view_image_width: int = 0,
        num_view_depth_tokens: int = 0,
        view_depth_width: int = 0,
        output_scale: float = 0.02,
    ):
        super().__init__()
        self.object_token = object_token
        self.object_color = object_color
        self.num_proposals = num_proposals
        self.name_pool = name_pool
        self.name_in_token = name_in_token
        self.token_in_name = token_in_name
        self.num_layout_tokens = num_layout_tokens
        self.num_view_image_tokens = num_view_image_tokens
        self.num_view_depth_tokens = num_view_depth_tokens
        box_features = 7 + 6 * 2 * self.NUM_BANDS
        self.feature_norm = nn.LayerNorm(encoder_width)
        self.object_mlp = nn.Sequential(
            nn.Linear(
                encoder_width + box_features + num_classes + object_color * NUM_COLOR_CHANNELS * 2 * _COLOR_BANDS,
                language_width,
            ),
            nn.GELU(),
            nn.Linear(language_width, language_width),
        )
        self.place_embedding = nn.Embedding(name_pool or num_proposals, language_width)
        with torch.no_grad():
            self.place_embedding.weight.mul_(_PLACE_SCALE)
        self.layout_norm = nn.LayerNorm(encoder_width)
        self.layout_linear = nn.Linear(encoder_width + 3 + 3 * 2 * self.NUM_BANDS, language_width)
        self.output_norm = nn.LayerNorm(language_width)
        nn.init.constant_(self.output_norm.weight, output_scale)
        if token_in_name:
            self.carried_place = nn.Linear(3 * 2 * self.NUM_BANDS, language_width)
            self.carried_norm = nn.LayerNorm(language_width)
            nn.init.constant_(self.carried_norm.weight, output_scale)
        if object_token:
            self.pooled_norm = nn.LayerNorm(encoder_width)
            self.pooled_linear = nn.Linear(encoder_width, language_width)
            self.asked_mark = nn.Embedding(1, language_width)
        if num_view_image_tokens:
            self.view_image_norm = nn.LayerNorm(view_image_width)
            self.view_image_linear = nn.Linear(view_image_width, language_width)
            self.view_image_place = nn.Embedding(num_view_image_tokens, language_width)
            nn.init.normal_(self.view_image_place.weight, std=_PLACE_SCALE)
        if num_view_depth_tokens:
            self.view_depth_mlp = nn.Sequential(
                nn.Linear(view_depth_width, language_width),
                nn.GELU(),
                nn.Linear(language_width, language_width),
            )
            self.view_depth_place = nn.Embedding(num_view_depth_tokens, language_width)
            nn.init.normal_(self.view_depth_place.weight, std=_PLACE_SCALE)

    def objects(
        self,
        features_BKE: torch.Tensor,
        boxes_BK7: torch.Tensor,
        class_probs_BKC: torch.Tensor,
        colors_BK6: torch.Tensor,
    ) -> torch.Tensor:
        """Proposals [B, K, D] without their names; boxes in metres, model frame; colours as `colors_in_boxes` gives
        them."""
        return self._described(features_BKE, boxes_BK7, class_probs_BKC, colors_BK6)

    def named(
        self, objects_ND: torch.Tensor, names_N: torch.Tensor, words_PD: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Proposal tokens [N, D] of proposals out of `objects`, with the numbers that they are called by, int64.

        Args:
            words_PD: the language model's own embedding of each name, where it is part of the token.
        """
        called_ND = self.place_embedding(names_N)
        if words_PD is not None:
            words_PD = words_PD.to(called_ND.dtype)
            called_ND = called_ND + _NAME_SCALE * nn.functional.embedding(
                names_N, words_PD / words_PD.std().clamp(min=1e-6)
            )
        return self.output_norm(objects_ND + called_ND)

    def carried(self, objects_ND: torch.Tensor, boxes_N7: torch.Tensor) -> torch.Tensor:
        """What the names of proposals out of `objects` carry, [N, D], as large as a word's embedding."""
        return self.carried_norm(objects_ND + self._places(boxes_N7))

    def _places(self, boxes_N7: torch.Tensor) -> torch.Tensor:
        """Where things are [N, D], beside what `objects` tells of them."""
        return self.carried_place(fourier_features(boxes_N7[:, :3], self.NUM_BANDS))

    def asked(self, queried: QueriedObjects) -> torch.Tensor:
        """Tokens [B, D] of the objects that are pointed at; ValueError where this connector has no such token."""
        if not self.object_token:
            raise ValueError("This model was made without object tokens; train one with model.language.object_token.")
        covering_BD = self._described(queried.features_BE, queried.boxes_B7, queried.class_probs_BC, queried.colors_B6)
        inside_BD = self.pooled_linear(self.pooled_norm(queried.pooled_BE))
        token_BD = covering_BD + inside_BD + self.asked_mark.weight
        return self.output_norm(token_BD + self._places(queried.boxes_B7) if self.token_in_name else token_BD)

    def view_images(self, features_VnE: torch.Tensor) -> torch.Tensor:
        """Tokens [V, n, D] of views from the image encoder's features."""
        tokens_VnD = self.view_image_linear(self.view_image_norm(features_VnE))
        return self.output_norm(tokens_VnD + self.view_image_place.weight)

    def view_depths(self, cells_VnP: torch.Tensor) -> torch.Tensor:
        """Tokens [V, n, D] of views from cells of their depth maps."""
        return self.output_norm(self.view_depth_mlp(cells_VnP) + self.view_depth_place.weight)

    def _described(
        self, features: torch.Tensor, boxes: torch.Tensor, class_probs: torch.Tensor, colors: torch.Tensor
    ) -> torch.Tensor:
        """Objects [..., D] by their feature, box, class probabilities and colours."""
        parts = [self.feature_norm(features), boxes, fourier_features(boxes[..., :6], self.NUM_BANDS), class_probs]
        if self.object_color:  # as waves, since six numbers beside hundreds would hardly be heard
            parts.append(fourier_features(_COLOR_SCALE * colors, _COLOR_BANDS))
        return self.object_mlp(torch.cat(parts, dim=-1))

    def layout(self, token_xyz_BT3: torch.Tensor, tokens_BTE: torch.Tensor) -> torch.Tensor:
        """Layout tokens [B, M, D]."""
        if self.num_layout_tokens == 0:
            return tokens_BTE.new_zeros(len(tokens_BTE), 0, self.output_norm.normalized_shape[0])
        centres_BM3, pooled_BME = pool_layout(token_xyz_BT3, tokens_BTE, self.num_layout_tokens)
        described = torch.cat(
            [self.layout_norm(pooled_BME), centres_BM3, fourier_features(centres_BM3, self.NUM_BANDS)], dim=-1
        )
        return self.output_norm(self.layout_linear(described))


def build_connector(
    language: LanguageModel,
    scene_encoder: SceneEncoder,
    *,
    num_proposals: int,
    num_layout_tokens: int,
    name_pool: int,
    name_in_token: bool,
    token_in_name: bool,
    object_token: bool,
    object_color: bool,
    **view_tokens: int,
) -> Connector:
    """A connector between two given parts, its tokens as large as the language model's own embeddings."""
    embeddings = language.embedding.weight
    return Connector(
        encoder_width=scene_encoder.config["width"],
        language_width=language.width,
        num_classes=scene_encoder.num_classes,
        num_proposals=num_proposals,
        num_layout_tokens=num_layout_tokens,
        name_pool=name_pool,
        name_in_token=name_in_token,
        token_in_name=token_in_name,
        object_token=object_token,
        object_color=object_color,
        **view_tokens,
        output_scale=float(embeddings[: min(len(embeddings), 4096)].detach().float().std()),
    )
