"""What the assembled model is made of: the keys under `model:` in recipes, and `encoder:` of `detect`."""

import math
from dataclasses import dataclass, field
from typing import Any

from ..models.view_kinds import kinds_of
from .config_fields import at_least, one_of


def _square(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value < 0 or math.isqrt(value) ** 2 != value:
            raise ValueError(f"{name} is {value}; it must be a square number, such as 4, 9 or 16, or 0 for none.")


@dataclass(frozen=True)
class PointTransformerConfig:
    """Point Transformer V3 (models/point_transformer.py says what each is); the paper's sizes."""

    grid_size: float = 0.02  # metres
    orders: tuple[str, ...] = ("z", "z-trans", "hilbert", "hilbert-trans")
    shuffle_orders: bool = True
    strides: tuple[int, ...] = (2, 2, 2, 2)
    enc_depths: tuple[int, ...] = (2, 2, 2, 6, 2)
    enc_channels: tuple[int, ...] = (32, 64, 128, 256, 512)
    enc_heads: tuple[int, ...] = (2, 4, 8, 16, 32)
    dec_depths: tuple[int, ...] = (2, 2, 2, 2)
    dec_channels: tuple[int, ...] = (64, 64, 128, 256)
    dec_heads: tuple[int, ...] = (4, 4, 8, 16)
    patch_size: int = 1024
    mlp_ratio: float = 4.0
    drop_path: float = 0.3
    stem_kernel: int = 5


@dataclass(frozen=True)
class EncoderConfig:
    """Scene encoder (models/scene_encoder)."""

    num_tokens: int = 2048
    radius: float = 0.2
    num_neighbors: int = 64
    width: int = 256
    encoder_layers: int = 3
    decoder_layers: int = 8
    num_heads: int = 4
    num_queries: int = 256
    dropout: float = 0.1
    use_color: bool = True
    use_height: bool = True
    use_normal: bool = False  # unit normals of the points
    multiview_dim: int = 0  # channels of multi-view features (data.multiview); 0 for none
    pretrained: str = ""  # folder written by `detect`; "" starts from random weights
    backbone: str = "pointnet2"  # what the tokens pool: pointnet2 (raw points) or ptv3 (learned features)
    ptv3: PointTransformerConfig = field(default_factory=PointTransformerConfig)  # read where that is the backbone

    def __post_init__(self):
        one_of(self, backbone=("pointnet2", "ptv3"))
        at_least(self, num_tokens=1, num_neighbors=1, width=1, encoder_layers=0, decoder_layers=1, num_queries=1)
        at_least(self, num_heads=1, multiview_dim=0)


@dataclass(frozen=True)
class ViewsConfig:
    """Dynamic view selection (models/view_selector.py)."""

    source: str = "mixed"  # posed, rendered, mixed, none, or kinds joined by + (docs/views.md)
    num_candidates: int = 16
    num_views: int = 6
    image_size: int = 336  # pixels, square
    encoder: str = "google/siglip2-large-patch16-384"
    w_text: float = 0.3
    w_image: float = 0.5
    w_clip: float = 0.5
    # tokens of each chosen view beside the vision tower's, a square number; 0: none
    image_encoder_tokens: int = 0  # patches of a frozen image encoder
    token_encoder: str = ""  # that encoder; "" takes `encoder`
    depth_tokens: int = 0  # the depth map; model.depth says whose
    num_references: int = 3  # views of highest text score that the image score compares with
    standardize: bool = False  # weigh the three scores as standard deviations over the pool, not as cosines
    redundancy: float = 2.5  # 0: plain top-k; how much a view loses that shows only what the chosen ones show
    choice: str = "utility"  # uniform: evenly spaced in the pool whatever is asked, to compare with
    weights: str = "fixed"  # learned: w_text and w_image start as above and learn from the language model's loss
    # of learned weights:
    temperature: float = 0.5  # of the relaxed choice, in standard deviations of a pool's utilities
    pull: float = 0.1  # weight in the loss of (w_text - 0.3)^2
    lr_factor: float = 10.0  # on optim.lr

    def __post_init__(self):
        kinds_of(self.source)
        one_of(self, weights=("fixed", "learned"), choice=("utility", "uniform"))
        at_least(self, num_candidates=1, num_views=1, num_references=1, image_size=1)
        at_least(self, redundancy=0, pull=0, lr_factor=0)
        _square(self, "image_encoder_tokens", "depth_tokens")
        if self.source == "none" and (self.image_encoder_tokens or self.depth_tokens):
            raise ValueError("source is 'none', but views are to have tokens; set both numbers of tokens to 0.")
        if self.temperature <= 0:
            raise ValueError(f"temperature is {self.temperature}; it must be above 0.")
        if self.weights == "learned" and self.source == "none":
            raise ValueError("weights is 'learned', but source is 'none'; without views there is nothing to learn.")
        if self.weights == "learned" and self.choice == "uniform":
            raise ValueError("weights is 'learned', but choice is 'uniform'; set choice to utility.")


@dataclass(frozen=True)
class DepthConfig:
    """Depth of the views (models/depth_encoder.py), read where model.views.depth_tokens is above 0."""

    encoder: str = ""  # Depth-Anything-V2 for frames without a sensor's depth; "" renders the scan's for these


@dataclass(frozen=True)
class LanguageConfig:
    """Language model and what it sees of the scene."""

    model: str = "Qwen/Qwen2.5-VL-7B-Instruct"
    dtype: str = "bfloat16"
    attention: str = "packed"  # models/attention.py; or transformers' own: sdpa, eager
    train: str = "lora"  # lora; full; none: it stays as it is
    # full fine-tuning by several processes (docs/multi_node.md): none: each has all; full: cut; auto: full on GPUs
    sharding: str = "auto"
    lora_rank: int = 16
    lora_alpha: int = 32
    lora_last_blocks: int = 0  # adapt only the last n blocks; 0 adapts all
    num_proposals: int = 64  # 0: no object has a token or a name; views are chosen by the detections all the same
    left_to_right: bool = False  # objects are told, and called, in the order of their x, not of their objectness
    num_layout_tokens: int = 32
    name_pool: int = 0  # sft draws the names of a sample's proposals out of so many; 0: they are called in order
    name_in_token: bool = False  # the language model's own embedding of its name is part of a proposal's token
    token_in_name: bool = False  # a name carries what its proposal's token is made of, wherever a text says it
    object_token: bool = True  # an object that a caption is asked for has a token of its own, beside its name or box
    object_color: bool = (
        True  # an object's token tells the colours of its points, which the encoder's feature need not
    )
    gradient_checkpointing: bool = False

    def __post_init__(self):
        one_of(self, dtype=("bfloat16", "float16", "float32"), train=("lora", "full", "none"))
        one_of(self, sharding=("auto", "none", "full"))
        if self.sharding == "full" and self.train != "full":
            raise ValueError("sharding is 'full', but train is not; adapters are small: leave sharding at auto.")
        at_least(self, lora_rank=1, lora_alpha=1, lora_last_blocks=0, num_proposals=0, num_layout_tokens=0)
        if self.token_in_name and not self.num_proposals:
            raise ValueError("token_in_name is true, but num_proposals is 0: nothing has a name; change one of them.")
        if self.name_pool and not 0 < self.num_proposals <= self.name_pool:
            raise ValueError(
                f"name_pool is {self.name_pool}; it must be 0, or num_proposals ({self.num_proposals}) or more."
            )


@dataclass(frozen=True)
class ModelConfig:
    """The assembled model."""

    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    views: ViewsConfig = field(default_factory=ViewsConfig)
    depth: DepthConfig = field(default_factory=DepthConfig)
    language: LanguageConfig = field(default_factory=LanguageConfig)
    # what learns besides model.language.train and model.views.weights
    train_connector: bool = True
    train_scene_encoder: bool = False
    train_vision_tower: bool | None = None  # null: where the language model is trained in full
