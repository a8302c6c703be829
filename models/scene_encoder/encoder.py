"""The scene encoder: PointNet++ set abstraction, masked transformer, vote queries, decoder, box and class heads.

The set abstraction reads raw points, or cells with the features of Point Transformer V3 (backbone.py).

After 3DETR (masked encoder), Vote2Cap-DETR (queries that vote for object centres) and Group-Free 3D (a box before the
first decoder layer, and each layer attends from the box of the one before). A query starts from its seed token, the
tokens around its vote and, for box edges finer than tokens lie, the raw points around its vote. Everything is in the
frame of the points it is given, the MODEL frame, in metres.

Shapes: B scenes, N points, F extra channels, M tokens, P seed candidates, Q queries, L predictions, D width, C classes
(C1: and no object).
"""

import inspect
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...third_party.pointnet2 import furthest_point_sample
from ...utils.labels import NUM_CLASSES
from ..weights import load_module, save_module
from .backbone import BACKBONES, PointTransformerCloud, point_transformer_options
from .inputs import NOT_FINITE
from .layers import Attention, BallFeatures, DecoderLayer, EncoderLayer, FourierPosition, SetAbstraction, mlp

CONFIG_NAME, WEIGHTS_NAME = "config.json", "model.safetensors"
_TYPICAL_SIZE = 0.7  # metres; where the size head starts
_LOG_SIZE_RANGE = (math.log(0.01), math.log(20.0))


@dataclass
class LayerPrediction:
    """What the heads say after one decoder layer."""

    class_logits_BQC1: Tensor
    boxes_BQ7: Tensor
    double_heading_BQ2: Tensor | None = None  # (cos 2h, sin 2h), not normalised, where headings are predicted


@dataclass
class SceneEncoding:
    """A batch of encoded scenes, in the frame of the points, metres."""

    token_xyz_BM3: Tensor
    tokens_BMD: Tensor
    query_features_BQD: Tensor
    final: LayerPrediction
    intermediate: list[LayerPrediction] = field(default_factory=list)  # before and between layers, for the criterion
    seed_xyz_BQ3: Tensor | None = None  # where the queries voted from
    vote_xyz_BQ3: Tensor | None = None  # where they voted to
    foreground_BM: Tensor | None = None  # logit that a token lies on an object

    @property
    def boxes_BQ7(self) -> Tensor:
        return self.final.boxes_BQ7

    @property
    def class_logits_BQC1(self) -> Tensor:
        """The last class is `no object`."""
        return self.final.class_logits_BQC1

    @property
    def objectness_BQ(self) -> Tensor:
        """1 - p(no object)."""
        return 1 - self.class_logits_BQC1.float().softmax(-1)[..., -1]


class SceneEncoder(nn.Module):
    """Points to tokens, object queries, boxes and classes.

    Args:
        feature_dim: channels F of a point besides its position (see inputs.py).
        num_tokens: tokens M out of the set abstraction.
        radius: ball radius, metres. Encoder layer i attends within 2 (i + 1) radius, which is 3DETR-m's 0.4, 0.8 and
            1.2 m at the default.
        num_neighbors: points in a ball.
        width: channels D.
        num_queries: object queries Q, at most num_tokens.
        seed_share: share of the tokens, the most object-like ones, that queries may start from; 1 lets them start
            anywhere, as Vote2Cap-DETR does.
        predict_heading: predict a heading about z, modulo pi; otherwise headings are 0, as ScanNet's are.
        backbone: what the tokens pool: `pointnet2` raw points, `ptv3` the features of Point Transformer V3.
        ptv3: with that backbone, arguments of PointTransformer by name; those left out are the paper's.
        channels: what the F channels are (inputs.channel_names), kept for who loads the weights; "" for unknown.
    """

    def __init__(  # noqa: PLR0913 - the architecture, spelled out
        self,
        feature_dim: int,
        num_tokens: int = 2048,
        radius: float = 0.2,
        num_neighbors: int = 64,
        width: int = 256,
        encoder_layers: int = 3,
        decoder_layers: int = 8,
        num_heads: int = 4,
        num_queries: int = 256,
        num_classes: int = NUM_CLASSES,
        dropout: float = 0.1,
        seed_share: float = 0.5,
        predict_heading: bool = False,
        backbone: str = "pointnet2",
        ptv3: Mapping[str, Any] | None = None,
        channels: str = "",
    ):
        super().__init__()
        arguments = inspect.signature(SceneEncoder.__init__).parameters
        self.config: dict[str, Any] = {name: value for name, value in locals().items() if name in arguments}
        del self.config["self"]
        self._check_sizes()
        self.point_transformer: PointTransformerCloud | None = None
        pooled_dim = feature_dim
        if backbone == "ptv3":
            # as JSON gives it back, and with every default spelled out, so that saved configurations compare
            self.config["ptv3"] = json.loads(json.dumps(point_transformer_options(ptv3 or {})))
            self.point_transformer = PointTransformerCloud(feature_dim, self.config["ptv3"])
            pooled_dim = self.point_transformer.out_channels
        self.num_queries, self.num_classes, self.predict_heading = num_queries, num_classes, predict_heading
        self.num_candidates = max(num_queries, round(seed_share * num_tokens))
        self.set_abstraction = SetAbstraction(pooled_dim, num_tokens, radius, num_neighbors, width)
        self.token_position, self.query_position = FourierPosition(width), FourierPosition(width)
        self.encoder = nn.ModuleList(
            EncoderLayer(width, num_heads, dropout, radius=2 * radius * (layer + 1)) for layer in range(encoder_layers)
        )
        self.token_norm = nn.LayerNorm(width)
        self.foreground_head = mlp(width, width, 1)
        self.vote_head = mlp(width, width, 3)
        self.vote_tokens = BallFeatures(width, 3 * radius, 16, width)
        self.vote_points = BallFeatures(feature_dim, 3 * radius, num_neighbors, width)
        self.query_size = nn.Linear(3, width)
        self.decoder = nn.ModuleList(DecoderLayer(width, num_heads, dropout) for _ in range(decoder_layers))
        self.query_norm = nn.LayerNorm(width)
        self.class_head = mlp(width, width, num_classes + 1)
        self.box_head = mlp(width, width, 8 if predict_heading else 6)
        self._start_heads()

    def _check_sizes(self) -> None:
        config = self.config
        if config["num_queries"] > config["num_tokens"]:
            raise ValueError(
                f"num_queries {config['num_queries']} is more than num_tokens {config['num_tokens']}; "
                "every query starts from a token of its own, so lower one or raise the other."
            )
        if config["decoder_layers"] < 1:
            raise ValueError("decoder_layers must be at least 1.")
        if not 0 < config["seed_share"] <= 1:
            raise ValueError(f"seed_share must be in (0, 1], not {config['seed_share']}.")
        if config["backbone"] not in BACKBONES:
            raise ValueError(f"backbone is {config['backbone']!r}; choose {' or '.join(BACKBONES)}.")
        if config["backbone"] != "ptv3" and config["ptv3"] is not None:
            raise ValueError(f"The backbone {config['backbone']} takes no ptv3 settings; leave them out.")

    def compute_in(self, dtype: torch.dtype) -> None:
        """Do the bulk of the arithmetic in `dtype`: networks over balls, attention, and Point Transformer V3.

        Positions, boxes and what runs along the tokens stay in float32. It is not saved with the weights.
        """
        for module in self.modules():
            if isinstance(module, (BallFeatures, Attention, PointTransformerCloud)):
                module.compute_dtype = dtype

    def _start_heads(self) -> None:
        """Votes and centres start at their origin, sizes at a typical one."""
        for head, bias in ((self.vote_head, torch.zeros(3)), (self.box_head, torch.zeros(8))):
            last = head[-1]
            assert isinstance(last, nn.Linear)
            bias[3:6] = math.log(_TYPICAL_SIZE)
            nn.init.normal_(last.weight, std=0.01)
            with torch.no_grad():
                last.bias.copy_(bias[: last.out_features])

    def forward(self, points_BN3: Tensor, features_BNF: Tensor) -> SceneEncoding:
        """Encode scenes.

        Args:
            points_BN3: metres, model frame, z up.
            features_BNF: extra channels as inputs.point_features makes them.

        Raises:
            ValueError: no points, some that are not finite, or another number of channels than the encoder was built
                for.
        """
        if features_BNF.shape[-1] != self.config["feature_dim"]:
            raise ValueError(
                f"This scene encoder takes {self.config['feature_dim']} channels a point besides xyz, but got "
                f"{features_BNF.shape[-1]}; choose the channels as in its training."
            )
        points_BN3, features_BNF = points_BN3.float(), features_BNF.float()
        if not bool(torch.isfinite(points_BN3).all() & torch.isfinite(features_BNF).all()):
            if not bool(torch.isfinite(points_BN3).all()):
                raise ValueError(NOT_FINITE)
            raise ValueError("The scene has channels (colour, height, features) that are NaN or infinite; mend them.")
        token_xyz_BM3, tokens_BMD = self.set_abstraction(*self._cloud(points_BN3, features_BNF))
        token_position_BMD = self.token_position(token_xyz_BM3)
        distance_BMM = _distances(token_xyz_BM3, token_xyz_BM3)
        for layer in self.encoder:
            tokens_BMD = layer(tokens_BMD, token_position_BMD, distance_BMM)
        tokens_BMD = self.token_norm(tokens_BMD)
        foreground_BM = self.foreground_head(tokens_BMD)[..., 0]
        seed_xyz_BQ3, seed_BQD = self._seeds(token_xyz_BM3, tokens_BMD, foreground_BM)
        vote_xyz_BQ3 = seed_xyz_BQ3 + self.vote_head(seed_BQD).float()
        queries_BQD = seed_BQD + self.vote_tokens(vote_xyz_BQ3, token_xyz_BM3, tokens_BMD)
        queries_BQD = queries_BQD + self.vote_points(vote_xyz_BQ3, points_BN3, features_BNF)

        normed = [self.query_norm(queries_BQD)]
        boxes = [self._predict_boxes(normed[0], vote_xyz_BQ3)]
        for layer in self.decoder:
            # each layer looks from the box that the one before predicted; it only reads it, the losses move it
            boxes_BQ7 = boxes[-1][0].detach()
            query_position_BQD = self.query_position(boxes_BQ7[..., :3]) + self.query_size(boxes_BQ7[..., 3:6].log())
            distance_BQM = _distances_to_boxes(boxes_BQ7, token_xyz_BM3)
            queries_BQD = layer(queries_BQD, query_position_BQD, tokens_BMD, token_position_BMD, distance_BQM)
            normed.append(self.query_norm(queries_BQD))
            boxes.append(self._predict_boxes(normed[-1], vote_xyz_BQ3))
        logits_LBQC1 = self.class_head(torch.stack(normed))
        predictions = [LayerPrediction(logits, *its) for logits, its in zip(logits_LBQC1, boxes, strict=True)]
        return SceneEncoding(
            token_xyz_BM3=token_xyz_BM3,
            tokens_BMD=tokens_BMD,
            query_features_BQD=normed[-1],
            final=predictions[-1],
            intermediate=predictions[:-1],
            seed_xyz_BQ3=seed_xyz_BQ3,
            vote_xyz_BQ3=vote_xyz_BQ3,
            foreground_BM=foreground_BM,
        )

    def _cloud(self, points_BN3: Tensor, features_BNF: Tensor) -> tuple[Tensor, Tensor]:
        """Positions and features that the tokens are drawn from."""
        if self.point_transformer is None or points_BN3.shape[1] == 0:  # no points are the set abstraction's to refuse
            return points_BN3, features_BNF
        return self.point_transformer(points_BN3, features_BNF)

    def _seeds(self, token_xyz_BM3: Tensor, tokens_BMD: Tensor, foreground_BM: Tensor) -> tuple[Tensor, Tensor]:
        """Positions [B, Q, 3] and features [B, Q, D] of tokens spread over the most object-like ones."""
        candidate_BP = foreground_BM.detach().topk(self.num_candidates, dim=1).indices.sort(dim=1).values
        candidate_BP3 = candidate_BP[..., None].expand(-1, -1, 3)
        spread_BQ = furthest_point_sample(token_xyz_BM3.gather(1, candidate_BP3), self.num_queries)
        seed_BQ1 = candidate_BP.gather(1, spread_BQ.long())[..., None]
        seed_xyz_BQ3 = token_xyz_BM3.gather(1, seed_BQ1.expand(-1, -1, 3))
        return seed_xyz_BQ3, tokens_BMD.gather(1, seed_BQ1.expand(-1, -1, tokens_BMD.shape[2]))

    def _predict_boxes(self, queries_BQD: Tensor, vote_xyz_BQ3: Tensor) -> tuple[Tensor, Tensor | None]:
        """Boxes [B, Q, 7], and twice the heading as (cos, sin) [B, Q, 2] where headings are predicted."""
        raw_BQX = self.box_head(queries_BQD).float()
        centre_BQ3 = vote_xyz_BQ3 + raw_BQX[..., :3]
        size_BQ3 = raw_BQX[..., 3:6].clamp(*_LOG_SIZE_RANGE).exp()
        heading_BQ1 = torch.zeros_like(size_BQ3[..., :1])
        double_BQ2 = None
        if self.predict_heading:
            double_BQ2 = raw_BQX[..., 6:8]
            heading_BQ1 = torch.atan2(double_BQ2[..., 1:], double_BQ2[..., :1]) / 2
        return torch.cat([centre_BQ3, size_BQ3, heading_BQ1], -1), double_BQ2

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors, each atomically."""
        save_module(self, self.config, folder, (CONFIG_NAME, WEIGHTS_NAME))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "SceneEncoder":
        """The encoder that `save_pretrained` wrote: its folder, or that of the run or checkpoint that holds it.

        ValueError: missing, broken, or of another size than config.json says.
        """
        folder = Path(folder)
        inside = [folder / name for name in ("", "best", "model") if (folder / name / CONFIG_NAME).exists()]
        folder = inside[0] if inside else folder
        try:
            config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
        except FileNotFoundError:
            if (folder / WEIGHTS_NAME).exists():
                raise ValueError(f"There is no {folder / CONFIG_NAME}; copy the whole folder again.") from None
            raise ValueError(
                f"There is no scene encoder at {folder}; train one with `bash script/pretrain.detector.sh`, or name "
                "another folder."
            ) from None
        except json.JSONDecodeError as error:
            raise ValueError(f"{folder / CONFIG_NAME} is not JSON ({error.msg}); write the model again.") from None
        unknown = set(config) - set(inspect.signature(cls).parameters)
        if unknown:
            raise ValueError(f"{folder / CONFIG_NAME} has the unknown key {min(unknown)!r}; it is no scene encoder.")
        encoder = cls(**config)
        encoder.load_weights(folder)
        return encoder

    def load_weights(self, folder: str | Path) -> None:
        """Load a folder's model.safetensors into this encoder; ValueError names the first tensor that does not fit."""
        path = Path(folder) / WEIGHTS_NAME
        load_module(self, path, f"There are no scene encoder weights at {path}; copy the whole folder again.")


def _distances(from_BQ3: Tensor, to_BM3: Tensor) -> Tensor:
    """Metres [B, Q, M] between points.

    By differences, since the shortcut through matrix products loses centimetres; axis by axis, since torch.cdist's own
    kernel for this takes 25 ms on an H100 where 8 x 2048 x 2048 distances are a millisecond of memory traffic.
    """
    squared_BQM = from_BQ3.new_zeros(())
    for axis in range(3):
        squared_BQM = squared_BQM + (to_BM3[:, None, :, axis] - from_BQ3[:, :, None, axis]).square_()
    return squared_BQM.sqrt_()


def _distances_to_boxes(boxes_BQ7: Tensor, to_BM3: Tensor) -> Tensor:
    """Metres [B, Q, M] from boxes (headings ignored) to points; 0 inside."""
    squared_BQM = boxes_BQ7.new_zeros(())
    for axis in range(3):
        apart_BQM = (to_BM3[:, None, :, axis] - boxes_BQ7[:, :, None, axis]).abs_()
        squared_BQM = squared_BQM + apart_BQM.sub_(boxes_BQ7[:, :, None, 3 + axis] / 2).clamp_(min=0).square_()
    return squared_BQM.sqrt_()
