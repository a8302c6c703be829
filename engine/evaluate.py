"""Evaluation on the benchmarks: predictions.jsonl and results.json for one model.

A column of a report is one call: the untrained model, the SFT model, the GRPO model, or the most frequent training
answer, which needs no model to think but uses one's detector for the boxes of dense captioning.
"""

import json
import os
import platform
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from ..datasets.prompts import MODES, THINK, prompt_fingerprint
from ..datasets.scene import TASKS, Sample
from ..models.scene_vlm import SceneVLM
from ..utils.metrics.caption import MeteorChoice
from ..utils.metrics.score import score_predictions, scorer_name
from ..utils.predictions import Prediction, write_predictions
from ..utils.text import format_box, parse_response, resolve_boxes
from .checkpoint import model_folder
from .config import DataConfig, EvalConfig, save_config
from .data import ObservationCache, load_split
from .predict import answer, world_boxes
from .runtime import close_runtime, init_runtime, log, seed_everything

MODEL, MOST_FREQUENT = "model", "most-frequent"
_METEOR: dict[str, MeteorChoice] = {"auto": "auto", "yes": True, "no": False}


def proposal_samples(
    samples: Sequence[Sample], observations: ObservationCache, limit: int
) -> tuple[list[Sample], list[Prediction]]:
    """Dense captioning asks for every detected object, not for the annotated ones.

    Returns:
        One sample for each proposal, at most `limit` a scene; and one row without a caption for each object of the
        scene, with its reference captions where it was annotated, which the scorer matches proposals with.
    """
    asked: list[Sample] = []
    objects: list[Prediction] = []
    references: dict[tuple[str, int], list[str]] = {}
    for sample in samples:
        references[(sample.scene_id, sample.target_object_ids[0])] = sample.references
    for scene_id in dict.fromkeys(sample.scene_id for sample in samples):
        observation = observations[scene_id]
        (encoded,) = observations.model.encode([observation])
        question = next(sample.question for sample in samples if sample.scene_id == scene_id)
        for index, box in enumerate(world_boxes(observation, encoded.proposals[:limit].tolist())):
            asked.append(
                Sample(
                    sample_id=f"{scene_id}-proposal-{index}",
                    task="dense_caption",
                    dataset="scan2cap",
                    scene_id=scene_id,
                    question=question,
                    answer="",
                    query_box_7=np.asarray(box, dtype=np.float32),
                )
            )
        scene = observation.scene
        for object_id, box_7 in zip(scene.object_ids_K.tolist(), scene.boxes_K7.tolist(), strict=True):
            objects.append(
                Prediction(
                    sample_id=f"{scene_id}-object-{object_id}",
                    task="dense_caption",
                    scene_id=scene_id,
                    question=question,
                    text="",
                    target_boxes=[box_7],
                    references=references.get((scene_id, object_id), []),
                    meta={"object_id": object_id},
                )
            )
    return asked, objects


def most_frequent_answers(data: DataConfig, task: str, dataset: str, seed: int) -> dict[str, str]:
    """The most frequent training answer of each question type, and over all types under the key "".

    Grounding answers are boxes, hardly two alike; their stand-in is the median target box, in the model frame.
    """
    config = DataConfig(root=data.root, datasets=(dataset,), train_split=data.train_split)
    samples, store = load_split(config, config.train_split, seed)
    if task == "grounding":
        boxes = np.stack([store.index[entry.scene_id].to_model(entry.target_boxes_K7)[0] for entry in samples])
        return {"": format_box(np.median(boxes, axis=0).tolist())}
    counts: dict[str, Counter[str]] = {}
    for sample in samples:
        for kind in {"", sample.question_type}:
            counts.setdefault(kind, Counter()).update(sample.references or [sample.answer])
    # of equally frequent ones the first in the alphabet
    return {kind: min(counter, key=lambda text: (-counter[text], text)) for kind, counter in counts.items()}


def constant_predictions(
    samples: Sequence[Sample], answers: dict[str, str], observations: ObservationCache, label: str
) -> list[Prediction]:
    """Predictions that repeat the most frequent answers."""
    predictions = []
    for sample in samples:
        text = answers.get(sample.question_type, answers[""])
        meta = dict(sample.meta)
        if sample.query_box_7 is not None:
            meta["query_box"] = sample.query_box_7.tolist()
        boxes = resolve_boxes(text, [])
        predictions.append(
            Prediction(
                sample_id=sample.sample_id,
                task=sample.task,
                scene_id=sample.scene_id,
                question=sample.question,
                text=f"<answer>{text}</answer>",
                answer=parse_response(text).answer,
                boxes=world_boxes(observations[sample.scene_id], boxes) if boxes else [],
                references=sample.references,
                target_boxes=sample.target_boxes_K7.tolist(),
                question_type=sample.question_type,
                model=label,
                meta=meta,
            )
        )
    return predictions


def _check_scorers(config: EvalConfig) -> None:
    """ValueError for an unknown task or scorer, before hours of answering."""
    for task, scorer in config.scorers.items():
        scorer_name(task, scorer)


def evaluate(config: EvalConfig) -> Path:
    """Evaluate on every configured data set; writes to `run.dir` and returns the path of results.json."""
    if config.answers not in (MODEL, MOST_FREQUENT):
        raise ValueError(f"answers is {config.answers!r}; choose {MODEL} or {MOST_FREQUENT}.")
    if config.meteor not in _METEOR:
        raise ValueError(f"meteor is {config.meteor!r}; choose {', '.join(_METEOR)}.")
    if not config.model:
        raise ValueError("Name the model to evaluate: --set model=runs/… (a run, a checkpoint or a model folder).")
    _check_scorers(config)
    for task, mode in config.modes.items():
        if task not in TASKS or mode not in MODES:
            raise ValueError(f"modes has {task}: {mode}; tasks are {', '.join(TASKS)}, modes are {', '.join(MODES)}.")
    runtime = init_runtime(config.run.device)
    if runtime.world_size > 1:
        raise ValueError("Evaluation runs on one process for now; start it without torchrun.")
    seed_everything(config.run.seed)
    folder = model_folder(config.model)
    splits = {  # what is missing in the data shows before the model is loaded
        dataset: load_split(replace(config.data, datasets=(dataset,)), config.data.eval_split, config.run.seed)
        for dataset in config.data.datasets
    }
    model = SceneVLM.from_pretrained(folder, device=runtime.device, language_model=config.language_model or None)
    store = next(iter(splits.values()))[1]
    observations = ObservationCache(store, model, seed=config.run.seed, capacity=config.data.cached_scenes)
    label = config.label or Path(config.model).name
    out = Path(config.run.dir)
    predictions: list[Prediction] = []
    results: dict[str, dict] = {}
    for dataset, (samples, _) in splits.items():
        task = samples[0].task
        if any(sample.task != task for sample in samples):
            raise ValueError(f"Data set {dataset} mixes tasks; evaluate on the data sets of its tasks instead.")
        objects: list[Prediction] = []
        if task == "dense_caption":
            samples, objects = proposal_samples(samples, observations, config.dense_caption_proposals)
        if config.answers == MOST_FREQUENT:
            answers = most_frequent_answers(config.data, task, dataset, config.run.seed)
            made = constant_predictions(samples, answers, observations, label)
        else:
            made = answer(
                model,
                samples,
                observations,
                modes=config.modes,
                label=label,
                max_new_tokens=config.max_new_tokens,
                batch_size=config.run.batch_size,
                views_to=out,
                progress=f"{label}: {dataset}",
            )
        scores = score_predictions(task, made + objects, config.scorers.get(task), meteor=_METEOR[config.meteor])
        thoughtful = [entry for entry in made if entry.meta.get("mode") == THINK]
        scores |= {
            "dataset": dataset,
            "questions": len(made),
            "well_formed": sum(entry.well_formed for entry in thoughtful) / len(thoughtful) if thoughtful else None,
            "truncated": sum(entry.truncated for entry in made) / len(made),
        }
        results[dataset] = scores
        predictions += made + objects
        log.info("%s, %s: %d questions, %s", label, dataset, len(made), _headline(scores))
    write_predictions(out / "predictions.jsonl", predictions)
    save_config(config, out / "config.yaml")
    path = out / "results.json"
    write_json(
        path,
        {
            "label": label,
            "model": str(config.model),
            "answers": config.answers,
            "tasks": {task: [name for name, entry in results.items() if entry["task"] == task] for task in TASKS},
            "results": results,
            "prompts": prompt_fingerprint(),
            "decoding": {"method": "greedy", "max_new_tokens": config.max_new_tokens},
            "seed": config.run.seed,
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
        },
    )
    close_runtime(runtime)
    return path


def write_json(path: Path, content: dict) -> None:
    """Write JSON atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")
    os.replace(partial, path)


def _headline(scores: dict) -> str:
    shown = [f"{name} {value:.3g}" for name, value in scores["metrics"].items() if value is not None][:4]
    return ", ".join(shown) + f" ({scores['unit']}, scorer {scores['scorer']})"
