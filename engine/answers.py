"""What `infer` leaves behind: a prediction file, the views that were shown, pictures of the answers."""

from collections.abc import Sequence
from pathlib import Path

from ..utils.predictions import Prediction, write_predictions
from ..visualization.palette import ANSWERED, ASKED, DETECTED
from ..visualization.pictures import save_picture, scene_picture
from .predict import Session, save_views, world_boxes
from .rollout import Rollout


def save_answers(session: Session, answers: Sequence[tuple[Prediction, Rollout]], folder: Path) -> list[Path]:
    """Write predictions.jsonl, the chosen views and the pictures (answer_pictures); the pictures' paths."""
    save_views([rollout for _, rollout in answers], folder)
    predictions = [prediction for prediction, _ in answers]
    write_predictions(folder / "predictions.jsonl", predictions)
    return answer_pictures(session, predictions, folder)


def answer_pictures(session: Session, predictions: Sequence[Prediction], folder: Path) -> list[Path]:
    """The scan with detected boxes in orange, the one asked about in blue and those of the answer in red.

    `answer-<number>.png` for each answer; one `objects.png` where every detected object was captioned, in blue.
    Pictures of earlier answers in the folder go.
    """
    for earlier in (*folder.glob("answer-[0-9]*.png"), *folder.glob("objects.png")):
        earlier.unlink()
    assert session.observation.encoded is not None
    asked = [[entry.meta["query_box"]] if "query_box" in entry.meta else [] for entry in predictions]
    if predictions and all(entry.task == "dense_caption" for entry in predictions):
        boxes = [box for entry in asked for box in entry]
        return [save_picture(scene_picture(session.scene, [(boxes, ASKED)]), folder / "objects.png")]
    detected = world_boxes(session.observation, session.observation.encoded.proposals.tolist())
    return [
        save_picture(
            scene_picture(session.scene, [(detected, DETECTED), (target, ASKED), (entry.boxes, ANSWERED)]),
            folder / f"answer-{number}.png",
        )
        for number, (entry, target) in enumerate(zip(predictions, asked, strict=True))
    ]
