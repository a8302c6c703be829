"""The one place that knows the encoder's configuration object."""

import dataclasses
from typing import Any, Protocol

from .encoder import SceneEncoder
from .inputs import channel_names, feature_dim


class EncoderSettings(Protocol):
    """What engine.config.EncoderConfig offers."""

    @property
    def num_tokens(self) -> int: ...
    @property
    def radius(self) -> float: ...
    @property
    def num_neighbors(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def encoder_layers(self) -> int: ...
    @property
    def decoder_layers(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def num_queries(self) -> int: ...
    @property
    def dropout(self) -> float: ...
    @property
    def use_color(self) -> bool: ...
    @property
    def use_height(self) -> bool: ...
    @property
    def use_normal(self) -> bool: ...
    @property
    def multiview_dim(self) -> int: ...
    @property
    def pretrained(self) -> str: ...
    @property
    def backbone(self) -> str: ...
    @property
    def ptv3(self) -> Any: ...  # a dataclass whose fields are PointTransformer's arguments


def build_scene_encoder(config: EncoderSettings) -> SceneEncoder:
    """A new encoder of the configured size, with the weights of `config.pretrained` where it names a folder.

    ValueError: the pretrained encoder is of another size than the configuration says.
    """
    inputs = {
        "use_color": config.use_color,
        "use_height": config.use_height,
        "use_normal": config.use_normal,
        "multiview_dim": config.multiview_dim,
    }
    encoder = SceneEncoder(
        feature_dim(**inputs),
        channels=channel_names(**inputs),
        num_tokens=config.num_tokens,
        radius=config.radius,
        num_neighbors=config.num_neighbors,
        width=config.width,
        encoder_layers=config.encoder_layers,
        decoder_layers=config.decoder_layers,
        num_heads=config.num_heads,
        num_queries=config.num_queries,
        dropout=config.dropout,
        backbone=config.backbone,
        ptv3=dataclasses.asdict(config.ptv3) if config.backbone == "ptv3" else None,
    )
    if config.pretrained:
        saved = SceneEncoder.from_pretrained(config.pretrained)
        for name, value in encoder.config.items():
            if name == "channels" and not saved.config[name]:
                continue  # saved before encoders said what their channels are
            if saved.config[name] != value:
                raise ValueError(
                    f"The scene encoder in {config.pretrained} has {name} {saved.config[name]}, but the "
                    f"configuration says {value}; give the encoder the same settings as in its training."
                )
        encoder = saved
    return encoder
