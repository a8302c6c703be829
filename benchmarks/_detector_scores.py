"""How well pre-trained scene encoders detect, out of their run folders."""

import argparse
import json
import re
from pathlib import Path

import numpy as np
import torch

from ..datasets.scene import floor_centre
from ..engine.checkpoint import latest_checkpoint
from ..engine.config import DetectConfig, load_config
from ..models.scene_encoder import SceneEncoder
from ..models.scene_encoder.inputs import features_of, sample_indices
from ..utils.boxes import box3d_iou
from ..utils.files import read_text
from ..utils.labels import DETECTION_CLASSES
from ..utils.metrics.detection import (
    MIN_OBJECTNESS,
    MIN_POINTS,
    NMS_IOU,
    SceneDetections,
    keep_detections,
    split_logits,
)
from .results import Row


def named_run(text: str) -> tuple[str, Path]:
    """NAME=RUN_DIR of the command line."""
    name, equals, folder = text.partition("=")
    if not equals or not folder or not re.fullmatch(r"[a-z0-9_]+", name):
        raise argparse.ArgumentTypeError(f"{text} is not NAME=RUN_DIR, as rooms=runs/detect (a-z, 0-9 and _ in NAME)")
    return name, Path(folder)


def score_rows(name: str, run_dir: Path) -> list[Row]:
    """mAP@0.25 and mAP@0.5 of a run's best encoder, fractions. ValueError: the folder is not such a run."""
    scores = read_scores(run_dir / "detection.json")
    config = run_config(run_dir)
    classes = [
        f"{label} {round(100 * scores['0.25']['AP'][label])}/{round(100 * scores['0.5']['AP'][label])}"
        for label in DETECTION_CLASSES
        if label in scores["0.25"]["AP"]
    ]
    run = config.run
    note = (
        f"best of {run.steps} steps after {scores['step']} and {scores['seconds']:.0f} s of training, "
        f"{scores['scenes']} held-out scenes, seed {run.seed}, batches of {run.batch_size}, "
        f"{config.data.num_points} points, {config.encoder.backbone}, {config.precision}; "
        f"AP@0.25/AP@0.5 in %: {', '.join(classes)}"
    )
    return [
        Row(f"detector.{name}_map{suffix}", scores[threshold]["mAP"], "mAP", better="higher", note=note)
        for suffix, threshold in (("25", "0.25"), ("50", "0.5"))
    ]


def read_scores(path: Path) -> dict:
    """What `detect` wrote. ValueError: not there, or not that."""
    text = read_text(
        path,
        f"There is no {path}; name the folder of a `python main.py detect` run that had held-out scenes to score on.",
    )
    try:
        scores = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error.msg}, line {error.lineno}); run `detect` again.") from None
    needed = {"step", "seconds", "scenes", "0.25", "0.5"}
    if not isinstance(scores, dict) or not needed <= set(scores):
        raise ValueError(f"{path} lacks {', '.join(sorted(needed - set(scores)))}; `detect` writes it whole.")
    return scores


def run_config(run_dir: Path) -> DetectConfig:
    """The configuration of a run, out of its newest checkpoint. ValueError: it has none."""
    newest = latest_checkpoint(run_dir)
    if newest is None:
        raise ValueError(f"There is no checkpoint under {run_dir}/checkpoints; keep one, it says how the run trained.")
    return load_config("detect", newest / "config.yaml")


def scan_rows(name: str, run_dir: Path, cloud: Path, boxes: Path) -> list[Row]:
    """Recall of a run's best encoder on one labelled scan, at IoU 0.25 and 0.5, whatever the class.

    Args:
        cloud: .npz with `xyz` [N, 3], metres, raw frame, and `rgb` uint8.
        boxes: JSON with `scene_id`, `axis_align_matrix` (raw to aligned) and `instances`, each with `box_aligned`.

    Detections are those that 3DETR's evaluation keeps: not empty, best of their class where they overlap, objectness
    above 0.05. ValueError: a file that is not such a one.
    """
    run = run_config(run_dir)
    encoder = SceneEncoder.from_pretrained(run_dir).eval()
    if run.encoder.use_normal or run.encoder.multiview_dim:
        raise ValueError(f"{run_dir} reads normals or multi-view features, which a bare cloud lacks.")
    points_N3, colors_N3, truth_K7, scene_id = _labelled_scan(cloud, boxes)
    kept_N = sample_indices(len(points_N3), run.data.num_points, np.random.default_rng(0))
    inputs = features_of(
        points_N3[kept_N], colors_N3[kept_N], use_color=run.encoder.use_color, use_height=run.encoder.use_height
    )
    with torch.no_grad():
        encoding = encoder(torch.from_numpy(inputs.points_N3)[None], torch.from_numpy(inputs.features_NF)[None])
    probability_QC, objectness_Q = split_logits(encoding.class_logits_BQC1[0].numpy())
    found = SceneDetections(encoding.boxes_BQ7[0], probability_QC, objectness_Q, inputs.points_N3)
    kept = keep_detections(found, nms_iou=NMS_IOU, min_points=MIN_POINTS, min_objectness=MIN_OBJECTNESS)
    overlap_RK = box3d_iou(encoding.boxes_BQ7[0, torch.from_numpy(kept)], truth_K7)
    best_K = overlap_RK.amax(0).numpy() if len(kept) else np.zeros(len(truth_K7))
    note = (
        f"share of {len(truth_K7)} objects that one of {len(kept)} kept detections overlaps by more, whatever its "
        f"class; {run.data.num_points} of {len(points_N3)} points"
    )
    return [
        Row(f"detector.{name}_{scene_id}_recall{suffix}", float((best_K > threshold).mean()), "share", note=note)
        for suffix, threshold in (("25", 0.25), ("50", 0.5))
    ]


def _labelled_scan(cloud: Path, boxes: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, str]:
    """Points (aligned, floor centre as the origin), colours, boxes [K, 7] of the same frame, and the scan's name."""
    try:
        with np.load(cloud) as arrays:
            xyz_N3, colors_N3 = arrays["xyz"].astype(np.float64), arrays["rgb"]
        content = json.loads(read_text(boxes, f"There is no {boxes}; name the JSON of the scan's boxes."))
        align_44 = np.array(content["axis_align_matrix"], dtype=np.float64).reshape(4, 4)
        truth_K6 = np.array([item["box_aligned"] for item in content["instances"]], dtype=np.float64).reshape(-1, 6)
        scene_id = str(content["scene_id"])
    except (KeyError, OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{cloud} and {boxes} are not a labelled scan ({error}); see --scan in --help.") from None
    if not len(truth_K6):
        raise ValueError(f"{boxes} has no instances, so there is nothing to find.")
    aligned_N3 = (xyz_N3 @ align_44[:3, :3].T + align_44[:3, 3]).astype(np.float32)
    origin_3 = floor_centre(aligned_N3)
    truth_K7 = np.pad(truth_K6, ((0, 0), (0, 1))).astype(np.float32)
    truth_K7[:, :3] -= origin_3
    return aligned_N3 - origin_3, colors_N3, truth_K7, scene_id
