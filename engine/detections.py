"""What a trained model detects in a scan."""

from pathlib import Path

import torch

from ..datasets.scene import Scene
from ..utils.labels import DETECTION_CLASSES, NUM_CLASSES
from ..visualization.shown_boxes import ShownBoxes
from .checkpoint import model_folder
from .predict import open_model


def detected_boxes(
    scene: Scene,
    model_path: str | Path,
    *,
    language_model: str | None = None,
    multiview: str = "",
    device: str = "auto",
) -> ShownBoxes:
    """What a model detects in a scene, world frame: the class of each object and its objectness."""
    model = open_model(model_folder(model_path), device=device, language_model=language_model, multiview=multiview)
    with torch.no_grad():
        (encoded,) = model.encode([model.observe(scene)])
    classes = encoded.host_probs_nC[:, :NUM_CLASSES].argmax(1).tolist()
    scores = encoded.objectness_K[encoded.valid_K].float().tolist()
    rows = scene.to_world(encoded.proposals).tolist()
    return ShownBoxes.from_rows(rows, [DETECTION_CLASSES[number] for number in classes], scores)
