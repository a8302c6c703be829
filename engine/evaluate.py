"""Evaluation on the benchmarks: predictions.jsonl and results.json for one model.

A column of a report is one call: the untrained model, the SFT model, the GRPO model, or the most frequent training
answer, which needs no model to think but uses one's detector for the boxes of dense captioning.
"""

import json
import platform
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ..datasets.prompts import THINK, prompt_fingerprint
from ..datasets.scene import TASKS, Sample
from ..datasets.scene_store import SceneStore
from ..datasets.tasks import LOADERS
from ..models.scene_vlm import SceneVLM
from ..utils.files import write_whole
from ..utils.metrics.caption import MeteorChoice
from ..utils.metrics.score import SCORERS, score_predictions, scorer_name
from ..utils.predictions import Prediction, write_predictions
from ..utils.text import format_box, parse_response, resolve_boxes
from .answer_journal import AnswerJournal, fingerprint, model_facts
from .build import give_multiview, prepare_to_answer
from .checkpoint import model_folder
from .config import DataConfig, EvalConfig, save_config, to_dict
from .data import Loaded, ObservationCache, load_evaluated, load_split, open_store
from .predict import answer, check_modes, detected_objects, world_boxes
from .references import GIVEN_OBJECTS, object_rows, reference_of
from .runtime import Runtime, close_runtime, init_runtime, log, seed_everything
from .tracking import note_start

MODEL, MOST_FREQUENT = "model", "most-frequent"
_METEOR: dict[str, MeteorChoice] = {"auto": "auto", "yes": True, "no": False}


def proposal_samples(
    samples: Sequence[Sample], observations: ObservationCache, limit: int
) -> tuple[list[Sample], list[Prediction]]:
    """Dense captioning asks for every detected object, not for the annotated ones.

    Which proposals count as detected is Vote2Cap-DETR's and LL3DA's rule: not empty, best of their class where they
    overlap, and not background.

    Returns:
        One sample for each proposal, at most `limit` a scene; and one row without a caption for each object of the
        scene, with its reference captions where it was annotated, which the scorer matches proposals with.
    """
    questions: dict[str, str] = {}
    for sample in samples:
        questions.setdefault(sample.scene_id, sample.question)
    asked = [
        Sample(
            sample_id=f"{scene_id}-proposal-{number}",
            task="dense_caption",
            dataset=samples[0].dataset,
            scene_id=scene_id,
            question=question,
            answer="",
            query_box_7=np.asarray(box, dtype=np.float32),
        )
        for scene_id, question in questions.items()
        for number, box in enumerate(detected(observations, scene_id)[:limit])
    ]
    return asked, object_rows(samples, observations.store.index)


def detected(observations: ObservationCache, scene_id: str) -> list[list[float]]:
    """World boxes of the proposals that are captioned officially, by falling objectness."""
    return detected_objects(observations.model, observations[scene_id])


def most_frequent_answers(data: DataConfig, task: str, dataset: str, seed: int) -> dict[str, str]:
    """The most frequent training answer of each question type, and over all types under the key "".

    Grounding answers are boxes, hardly two alike; their stand-in is the median target box, in the model frame.
    """
    config = replace(data, datasets=(dataset,), max_samples=0)
    samples, store = load_split(config, config.train_split, seed)
    targets = [entry for entry in samples if len(entry.target_boxes_K7)] if task == "grounding" else []
    if targets:
        boxes = np.stack([store.index[entry.scene_id].to_model(entry.target_boxes_K7)[0] for entry in targets])
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
        boxes = resolve_boxes(text, [])
        predictions.append(
            replace(
                reference_of(sample),
                text=f"<answer>{text}</answer>",
                answer=parse_response(text).answer,
                boxes=world_boxes(observations[sample.scene_id], boxes) if boxes else [],
                model=label,
            )
        )
    return predictions


def scorers_for(config: EvalConfig, dataset: str, task: str) -> list[str]:
    """The scorers of a data set by their canonical names, the first one being the one that reports show."""
    wanted = config.scorers.get(dataset) or config.scorers.get(task) or ("",)
    return list(dict.fromkeys(scorer_name(task, name or None) for name in wanted))


def check_scorers(scorers: Sequence[str], loaded: Loaded) -> None:
    """ValueError for a scorer that needs what evaluation of this data set does not have, before hours of answering."""
    oracle = [name for name in scorers if loaded.task == "dense_caption" and name.startswith(GIVEN_OBJECTS)]
    if oracle:
        raise ValueError(
            f"The scorer {oracle[0]} takes captions of given objects, and eval captions the detected ones; take it "
            "out of scorers.dense_caption, or score a file of such captions with `python main.py score`."
        )
    if "nr3d_nearest" in scorers and any("distractor_boxes" not in sample.meta for sample in loaded.samples):
        raise ValueError(
            f"Data set {loaded.dataset} names no distractors, which the scorer nr3d_nearest chooses among; set it "
            "for Nr3D alone: scorers.nr3d."
        )


def _check(config: EvalConfig) -> None:
    """ValueError for a setting that cannot be, before hours of answering."""
    if config.answers not in (MODEL, MOST_FREQUENT):
        raise ValueError(f"answers is {config.answers!r}; choose {MODEL} or {MOST_FREQUENT}.")
    if config.meteor not in _METEOR:
        raise ValueError(f"meteor is {config.meteor!r}; choose {', '.join(_METEOR)}.")
    if not config.model:
        raise ValueError("Name the model to evaluate: --set model=runs/… (a run, a checkpoint or a model folder).")
    for key, names in config.scorers.items():
        for name in names if key in SCORERS or key not in LOADERS else ():
            scorer_name(key, name)
    check_modes(config.modes, "modes")


def check_place(config: EvalConfig) -> None:
    """ValueError where `run.dir` holds the results of another model, in whose place these would come."""
    path = Path(config.run.dir) / "results.json"
    if not path.exists():
        return
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
        model, answers = Path(there["model"]), there["answers"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is not one of eval's results; remove it, or set another run.dir.") from None
    if (model, answers) != (Path(config.model), config.answers):
        raise ValueError(
            f"{config.run.dir} holds the results of {model} (answers: {answers}); set another run.dir, or remove them."
        )


def score_all(scorers: Sequence[str], task: str, predictions: Sequence[Prediction], meteor: MeteorChoice) -> dict:
    """Scores of the first scorer, as `score_predictions` gives them, with those of the others by their names under
    "other_scorers".

    Where no prediction has anything to be compared with (test sets without answers, sentences without targets), the
    numbers are missing, with a note.
    """
    if not any(entry.target_boxes if task == "grounding" else entry.references for entry in predictions):
        note = "nothing can be scored: the data set holds no answers to compare with."
        empty = {"items": 0, "unit": "percent", "metrics": {}, "intervals": {}, "sample_score": None, "counts": {}}
        return {"task": task, "scorer": scorers[0], **empty, "notes": [note], "other_scorers": {}}
    first, *others = (score_predictions(task, predictions, name, meteor=meteor) for name in scorers)
    return first | {"other_scorers": {scores["scorer"]: _without_common(scores) for scores in others}}


def _without_common(scores: dict) -> dict:
    """What differs from scorer to scorer."""
    return {name: value for name, value in scores.items() if name not in ("task", "scorer", "sample_score")}


class _Evaluation:
    """One model with the scenes it has seen, asked for one data set after the other.

    Processes share the questions by blocks; all of them get all answers.
    """

    def __init__(
        self, config: EvalConfig, model: SceneVLM, store: SceneStore, runtime: Runtime, journal: AnswerJournal
    ):
        self.config = config
        self.runtime = runtime
        self.journal = journal
        self.label = config.label or Path(config.model).name
        self.observations = ObservationCache.of_config(config.data, store, model, config.run.seed)

    def predict(self, loaded: Loaded) -> tuple[list[Prediction], list[Prediction]]:
        """Answers to a data set's questions; and rows of objects, for dense captioning."""
        config, samples, objects = self.config, loaded.samples, []
        if loaded.task == "dense_caption":
            samples, objects = proposal_samples(samples, self.observations, config.dense_caption_proposals)
            # one process's detections for all: another GPU's might differ in the last digit
            samples = self.runtime.gather(samples if self.runtime.is_main else [])[0]
        if config.answers == MOST_FREQUENT:
            answers = most_frequent_answers(config.data, loaded.task, loaded.dataset, config.run.seed)
            return constant_predictions(samples, answers, self.observations, self.label), objects
        return self._answers(loaded.dataset, samples), objects

    def _answers(self, dataset: str, samples: Sequence[Sample]) -> list[Prediction]:
        """The model's answers, those that the journal does not have yet being asked for."""
        config, runtime = self.config, self.runtime
        blocks = [samples[start : start + config.block_size] for start in range(0, len(samples), config.block_size)]
        missing = [number for number in range(len(blocks)) if (dataset, number) not in self.journal.done]
        own = missing[runtime.rank :: runtime.world_size]
        with tqdm(
            total=sum(len(blocks[number]) for number in own),
            desc=f"{self.label}: {dataset}",
            disable=not runtime.is_main,
            dynamic_ncols=True,
            mininterval=1.0,
        ) as bar:
            made = {}
            for number in own:
                made[number] = answer(
                    self.observations.model,
                    blocks[number],
                    self.observations,
                    modes=config.modes,
                    label=self.label,
                    max_new_tokens=config.max_new_tokens,
                    batch_size=config.run.batch_size,
                    token_budget=config.token_budget,
                    views_to=Path(config.run.dir),
                    on_batch=bar.update,
                )
                self.journal.add(dataset, number, made[number])
        known = {number: self.journal.done[dataset, number] for number in range(len(blocks)) if number not in missing}
        for part in runtime.gather(made):
            known |= part
        return [entry for number in range(len(blocks)) for entry in known[number]]

    def score(self, loaded: Loaded, made: list[Prediction], objects: list[Prediction]) -> dict:
        """Scores of a data set's answers, and how they were made."""
        scorers = scorers_for(self.config, loaded.dataset, loaded.task)
        scores = score_all(scorers, loaded.task, made + objects, _METEOR[self.config.meteor])
        thoughtful = [entry for entry in made if entry.meta.get("mode") == THINK]
        scores |= {
            "dataset": loaded.dataset,
            "split": loaded.split,
            "questions": len(made),
            "left_out": loaded.left_out,
            "well_formed": sum(entry.well_formed for entry in thoughtful) / len(thoughtful) if thoughtful else None,
            "truncated": sum(entry.truncated for entry in made) / len(made) if made else None,
        }
        log.info("%s, %s: %d questions, %s", self.label, loaded.dataset, len(made), _headline(scores))
        return scores


def evaluate(config: EvalConfig) -> Path:
    """Evaluate on every configured data set; writes to `run.dir` and returns the path of results.json.

    Answers are kept as they come: an evaluation that was killed, started again, asks for the rest.
    """
    _check(config)
    check_place(config)
    runtime = init_runtime(config.run.device)
    seed_everything(config.run.seed)
    folder = model_folder(config.model)
    # what is missing in the data shows before the model is loaded
    store = open_store(config.data)
    parts = load_evaluated(config.data, store, config.run.seed)
    for loaded in parts:
        check_scorers(scorers_for(config, loaded.dataset, loaded.task), loaded)
    model = prepare_to_answer(
        SceneVLM.from_pretrained(folder, device=runtime.device, language_model=config.language_model or None)
    )
    give_multiview(model, config.data, [sample for loaded in parts for sample in loaded.samples])
    journal = open_journal(config, folder, parts, runtime)
    evaluation = _Evaluation(config, model, store, runtime, journal)
    path = Path(config.run.dir) / "results.json"
    if runtime.is_main:
        path.parent.mkdir(parents=True, exist_ok=True)
        note_start(path.parent, str(runtime.device))
    predictions: list[Prediction] = []
    results: dict[str, dict] = {}
    for loaded in parts:
        made, objects = evaluation.predict(loaded)
        if runtime.is_main:
            results[loaded.dataset] = evaluation.score(loaded, made, objects)
            predictions += made + objects
    if runtime.is_main:
        write_predictions(path.with_name("predictions.jsonl"), predictions)
        save_config(config, path.with_name("config.yaml"))
        write_json(path, _report(config, evaluation.label, results))
        journal.remove()
    runtime.barrier()
    close_runtime(runtime)
    return path


def open_journal(config: EvalConfig, folder: Path, parts: Sequence[Loaded], runtime: Runtime) -> AnswerJournal:
    """The answers that there are already: of this model, to these questions, under these settings."""
    settings = to_dict(config)
    for name in ("scorers", "meteor"):  # which answers do not depend on
        del settings[name]
    for name in ("root", "cached_scenes", "cache_views"):
        del settings["data"][name]
    settings["run"] = {"seed": config.run.seed, "batch_size": config.run.batch_size}
    questions = [(entry.dataset, [sample.sample_id for sample in entry.samples]) for entry in parts]
    key = fingerprint(model_facts(folder), settings, questions, prompt_fingerprint())
    journal = AnswerJournal(Path(config.run.dir), key, runtime.rank)
    if runtime.is_main and journal.done:
        count = sum(map(len, journal.done.values()))
        log.info("%d questions were answered before; the rest is asked for", count)
    if runtime.is_main and journal.stale:
        log.warning(
            "%s holds answers of another model, other questions or other settings; they are left out",
            journal.folder,
        )
    runtime.barrier()  # all have read before one writes
    return journal


def _report(config: EvalConfig, label: str, results: dict[str, dict]) -> dict:
    """Content of results.json."""
    return {
        "label": label,
        "model": str(config.model),
        "answers": config.answers,
        "tasks": {task: [name for name, entry in results.items() if entry["task"] == task] for task in TASKS},
        "results": results,
        "prompts": prompt_fingerprint(),
        "decoding": {"method": "greedy", "max_new_tokens": config.max_new_tokens},
        "seed": config.run.seed,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }


def write_json(path: Path, content: dict) -> None:
    """Write JSON atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(content, indent=2, ensure_ascii=False))


def _headline(scores: dict) -> str:
    shown = [f"{name} {value:.3g}" for name, value in scores["metrics"].items() if value is not None][:4]
    return ", ".join(shown) + f" ({scores['unit']}, scorer {scores['scorer']})"
