"""The loops learn what they are given: SFT overfits, GRPO follows a reward, the scene encoder overfits two rooms."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from threedr1.datasets.prompts import training_mode
from threedr1.engine import detect, grpo, sft
from threedr1.engine.config import load_config
from threedr1.engine.data import ObservationCache, load_split
from threedr1.engine.detection_data import SceneSamples
from threedr1.engine.rollout import roll_out, write_prompts
from threedr1.engine.sft_data import write_targets
from threedr1.engine.tracking import read_metrics
from threedr1.models.inputs import IGNORE
from threedr1.models.scene_vlm import SceneVLM
from threedr1.utils.text import parse_response

from .test_pipeline import grpo_config, sft_config

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
REWARD = (
    'def letter_e(completions, **columns):\n    return [text.count("e") / max(1, len(text)) for text in completions]\n'
)


def test_sft_overfits_a_handful_of_samples(rooms_root, tmp_path):
    """Thoughts, answers and boxes come back word for word, by greedy decoding of the saved model."""
    config = sft_config(
        rooms_root,
        tmp_path,
        "run.steps=220",
        "run.batch_size=6",
        "run.save_every=1000",
        "data.max_samples=2",
        "data.datasets=scene30k,scanqa,scanrefer",
    )
    last = sft.train(config)
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["loss"] < 0.05

    samples, store = load_split(config.data, "train", config.run.seed)
    model = SceneVLM.from_pretrained(last / "model").eval()
    observations = ObservationCache(store, model, seed=config.run.seed).of(samples)
    modes = [training_mode(sample) for sample in samples]
    answered = roll_out(model, write_prompts(model, samples, observations, modes), max_new_tokens=300)
    taught = write_targets(model, samples, observations, pointers=config.pointers)
    targets = [model.language.decode([token for token in entry.row.labels if token != IGNORE]) for entry in taught]
    assert len(set(targets)) == 6 and set(modes) == {"think", "direct"}
    assert [rollout.texts[0] for rollout in answered] == targets


def test_grpo_follows_a_reward(rooms_root, tmp_path):
    """The reward is the share of the letter e, which the policy more than doubles; nothing else asks for it."""
    reward = tmp_path / "reward.py"
    reward.write_text(REWARD)
    sft.train(sft_config(rooms_root, tmp_path / "sft", "run.steps=150", "run.batch_size=6", "run.save_every=1000"))
    grpo.train(
        grpo_config(
            rooms_root,
            tmp_path / "sft",
            tmp_path / "grpo",
            "run.steps=40",
            "run.batch_size=4",
            "run.save_every=1000",
            "optim.warmup_steps=0",
            "loss.beta=0.0",
            "rollout.group_size=8",
            f"reward.names=[{reward}:letter_e]",
            "reward.weights=[1.0]",
        )
    )
    rewards = [row["reward"] for row in read_metrics(tmp_path / "grpo" / "metrics.jsonl")]
    assert np.mean(rewards[-5:]) > 1.7 * np.mean(rewards[:3])
    # what the log says is what was sampled
    rows = [json.loads(line) for line in (tmp_path / "grpo" / "completions.jsonl").read_text().splitlines()]
    last = [row["text"] for row in rows if row["step"] == 39]
    assert np.mean([text.count("e") / max(1, len(text)) for text in last]) == pytest.approx(rewards[-1], abs=1e-4)


@pytest.fixture(scope="module")
def short_thoughts(rooms_root, tmp_path_factory):
    """The rooms with thoughts of one sentence, for completions to be short."""
    root = tmp_path_factory.mktemp("short")
    for entry in rooms_root.iterdir():
        if entry.name != "annotations":
            (root / entry.name).symlink_to(entry)
    shutil.copytree(rooms_root / "annotations", root / "annotations")
    path = root / "annotations" / "Scene-30K.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records:
        sentence = parse_response(record["cot"]).think.rpartition("Last, ")[2]
        record["cot"] = f"<think>{sentence}</think><answer>{record['gold_answer']}</answer>"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return root


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_grpo_raises_the_reward_over_the_sft_model(seed, short_thoughts, tmp_path):
    """From an SFT model of which a fifth of the samples is well formed: 0.15 more in 100 steps, whatever the seed.

    Measured: 0.25 to 0.50, 0.12 to 0.45, 0.20 to 0.51. A model that has learned more has less to gain.
    """
    start, run = tmp_path / "sft", tmp_path / "grpo"
    common = ("data.datasets=scene30k", f"run.seed={seed}", "run.save_every=1000", "optim.warmup_steps=0")
    sft.train(sft_config(short_thoughts, start, "run.steps=170", "run.batch_size=6", *common))
    more = ("run.steps=100", "run.batch_size=4", "data.max_samples=4", "optim.lr=6e-3", "optim.schedule=cosine")
    more += ("rollout.group_size=16", "rollout.max_new_tokens=64", "rollout.batch_size=64")
    more += ("reward.names=[format, semantic]", "reward.weights=[0.5, 0.5]", "reward.gate_by_format=true")
    grpo.train(grpo_config(short_thoughts, start, run, *common, *more))
    rewards = [row["reward"] for row in read_metrics(run / "metrics.jsonl")]
    assert np.mean(rewards[-10:]) > np.mean(rewards[:3]) + 0.15


def test_the_scene_encoder_overfits_two_rooms(rooms_root, tmp_path):
    """mAP@0.5 above 0.9 over the classes that the two rooms have; measured 0.98."""
    root = tmp_path / "rooms"
    for scene_id in (rooms_root / "scannetv2_train.txt").read_text().split()[:2]:
        (root / "prepared").mkdir(parents=True, exist_ok=True)
        shutil.copy(rooms_root / "prepared" / f"{scene_id}.npz", root / "prepared")
        with (root / "scannetv2_train.txt").open("a") as stream:
            stream.write(scene_id + "\n")
    overrides = [f"run.dir={tmp_path / 'run'}", f"data.root={root}", "data.eval_split=train", "augment=false"]
    overrides += ["run.steps=2500", "run.batch_size=2", "run.save_every=10000", "data.num_points=8192"]
    overrides += ["encoder.num_tokens=256", "encoder.num_queries=128", "encoder.width=96"]
    detect.train(load_config("detect", ROOT / "script" / "recipes" / "tiny.detect.yaml", overrides))
    scores = json.loads((tmp_path / "run" / "detection.json").read_text())["0.5"]
    scenes = SceneSamples(load_config("detect", tmp_path / "run/checkpoints/step-002500/config.yaml"), "train")
    present = {int(class_id) for row in range(2) for class_id in scenes[row].class_ids_K}
    precisions = list(scores["AP"].values())
    assert len(present) >= 10
    assert np.mean([precisions[class_id] for class_id in present]) > 0.9
