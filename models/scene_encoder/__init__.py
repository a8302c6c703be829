"""The scene encoder and what belongs to it: criterion, proposals, inputs."""

from .build import build_scene_encoder
from .criterion import LossWeights, SetCriterion
from .encoder import LayerPrediction, SceneEncoder, SceneEncoding
from .inputs import PointInput, feature_dim, point_features
from .proposals import Proposals, select_proposals
from .targets import DetectionTargets

__all__ = [
    "DetectionTargets",
    "LayerPrediction",
    "LossWeights",
    "PointInput",
    "Proposals",
    "SceneEncoder",
    "SceneEncoding",
    "SetCriterion",
    "build_scene_encoder",
    "feature_dim",
    "point_features",
    "select_proposals",
]
