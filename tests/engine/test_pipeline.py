"""SFT, GRPO and evaluation on generated rooms with tiny models: the loops run, learn, resume exactly, and refuse."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from threedr1.engine import evaluate, grpo, sft
from threedr1.engine.checkpoint import latest_checkpoint, list_checkpoints
from threedr1.engine.config import load_config
from threedr1.engine.references import score_dataset
from threedr1.engine.run_folder import open_run
from threedr1.engine.tracking import read_metrics
from threedr1.models.scene_vlm import SceneVLM
from threedr1.utils.predictions import read_predictions

ENCODER = (
    "num_tokens=32 num_neighbors=8 radius=0.4 width=16 encoder_layers=1 decoder_layers=1 num_heads=2 num_queries=12"
)


def sft_config(root, run_dir, *more, recipe=None):
    return load_config(
        "sft",
        recipe,
        [
            f"run.dir={run_dir}",
            "run.steps=4",
            "run.batch_size=4",
            "run.save_every=2",
            "run.log_every=1",
            f"data.root={root}",
            "data.num_points=512",
            "data.datasets=scene30k,scan2cap,scanqa",
            f"model.language.model={root}/tiny",
            "model.language.dtype=float32",
            "model.language.train=full",
            "model.language.num_proposals=8",
            "model.language.num_layout_tokens=2",
            *[f"model.encoder.{setting}" for setting in ENCODER.split()],
            "model.views.source=rendered",
            "model.views.num_candidates=3",
            "model.views.num_views=1",
            "model.views.image_size=56",
            "model.views.encoder=all-MiniLM-L6-v2",
            "model.views.w_image=1.0",
            "model.views.w_clip=0.0",
            "optim.lr=3e-3",
            "optim.warmup_steps=0",
            *more,
        ],
    )


def grpo_config(root, init, run_dir, *more):
    return load_config(
        "grpo",
        None,
        [
            f"init={init}",
            f"run.dir={run_dir}",
            "run.steps=2",
            "run.batch_size=2",
            "run.save_every=1",
            "run.log_every=1",
            f"data.root={root}",
            "data.num_points=512",
            "optim.lr=1e-2",
            "reward.semantic_encoder=all-MiniLM-L6-v2",
            "rollout.group_size=3",
            "rollout.max_new_tokens=12",
            "reward.gate_by_format=false",  # nothing is well formed yet, and zero rewards move nothing
            "lora_rank=4",
            "lora_alpha=8",
            *more,
        ],
    )


def weights(checkpoint):
    return {
        str(path.relative_to(checkpoint)): load_file(path)
        for path in sorted((checkpoint / "model").rglob("*.safetensors"))
    }


def assert_same_weights(first, second):
    ours, theirs = weights(first), weights(second)
    assert ours.keys() == theirs.keys() and ours
    for name, tensors in ours.items():
        for key, value in tensors.items():
            assert torch.equal(value, theirs[name][key]), f"{name}: {key}"


@pytest.fixture(scope="module")
def sft_run(rooms_root, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "sft"
    sft.train(sft_config(rooms_root, run_dir))
    return run_dir


def test_sft_writes_checkpoints_metrics_and_a_falling_loss(sft_run):
    rows = read_metrics(sft_run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert [path.name for path in list_checkpoints(sft_run)] == ["step-000002", "step-000004"]


def test_sft_killed_and_resumed_equals_uninterrupted(sft_run, rooms_root, tmp_path):
    shutil.copytree(sft_run / "checkpoints" / "step-000002", tmp_path / "checkpoints" / "step-000002")
    (tmp_path / "checkpoints" / "partial-000003").mkdir()  # what a kill leaves in the middle of writing
    sft.train(sft_config(rooms_root, tmp_path), resume=True)
    assert_same_weights(tmp_path / "checkpoints" / "step-000004", sft_run / "checkpoints" / "step-000004")


def test_micro_batches_do_not_change_sft(sft_run, rooms_root, tmp_path):
    sft.train(sft_config(rooms_root, tmp_path, "run.micro_batch_size=1", "run.steps=1"))
    first, other = read_metrics(sft_run / "metrics.jsonl")[0], read_metrics(tmp_path / "metrics.jsonl")[0]
    assert other["loss"] == pytest.approx(first["loss"], rel=1e-5)
    assert other["grad_norm"] == pytest.approx(first["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("budget", [1, 500])
def test_packs_do_not_change_sft(sft_run, rooms_root, tmp_path, budget):
    sft.train(sft_config(rooms_root, tmp_path, f"token_budget={budget}", "run.steps=1"))
    first, other = read_metrics(sft_run / "metrics.jsonl")[0], read_metrics(tmp_path / "metrics.jsonl")[0]
    assert other["loss"] == pytest.approx(first["loss"], rel=1e-5)
    assert other["grad_norm"] == pytest.approx(first["grad_norm"], rel=1e-3)
    assert other["tokens"] == first["tokens"] and other["sequence_tokens"] == first["sequence_tokens"] > 500


def test_packs_share_one_pass_of_a_scene_encoder_that_trains(rooms_root, tmp_path):
    for name, budget in (("whole", 8192), ("parts", 1)):
        more = ["run.steps=2", "model.train_scene_encoder=true", f"token_budget={budget}"]
        sft.train(sft_config(rooms_root, tmp_path / name, *more))
    whole, parts = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "parts"))
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose([row[name] for row in parts], [row[name] for row in whole], rtol=2e-3)


def test_a_run_is_neither_overwritten_nor_resumed_under_another_configuration(sft_run, rooms_root):
    with pytest.raises(ValueError, match="already holds checkpoints"):
        sft.train(sft_config(rooms_root, sft_run))
    with pytest.raises(ValueError, match=r"another configuration \(optim.lr: 0.003 -> 0.5"):
        sft.train(sft_config(rooms_root, sft_run, "optim.lr=0.5"), resume=True)
    other = ("eval_modes={qa: direct}", "eval_samples=7", "data.cache_views=false", "data.workers=1")
    assert open_run(sft_config(rooms_root, sft_run, *other), resume=True) == latest_checkpoint(sft_run)


def test_training_the_scene_encoder_moves_it(rooms_root, tmp_path):
    frozen = sft.train(sft_config(rooms_root, tmp_path / "a", "run.steps=0"))
    trained = sft.train(sft_config(rooms_root, tmp_path / "b", "run.steps=1", "model.train_scene_encoder=true"))
    name = "model/scene_encoder/model.safetensors"
    before, after = load_file(frozen / name), load_file(trained / name)
    assert any(not torch.equal(before[key], after[key]) for key in before)


PTV3 = "grid_size=0.2 strides=[2] enc_depths=[1,1] enc_channels=[8,16] enc_heads=[2,2]"
PTV3 += " dec_depths=[1] dec_channels=[16] dec_heads=[2] patch_size=64 stem_kernel=3"


@pytest.mark.parametrize("backbone", ["pointnet2", "ptv3"])
def test_resume_is_exact_while_the_scene_encoder_trains(rooms_root, tmp_path, backbone):
    more = ["model.train_scene_encoder=true", "optim.lr=1e-2", f"model.encoder.backbone={backbone}"]
    more += [f"model.encoder.ptv3.{setting}" for setting in PTV3.split()]
    whole = sft.train(sft_config(rooms_root, tmp_path / "whole", *more))
    halfway = list_checkpoints(tmp_path / "whole")[0]
    shutil.copytree(halfway, tmp_path / "resumed" / "checkpoints" / halfway.name)
    resumed = sft.train(sft_config(rooms_root, tmp_path / "resumed", *more), resume=True)
    assert_same_weights(resumed, whole)


def test_a_model_made_with_other_settings_is_refused(sft_run, rooms_root, tmp_path):
    with pytest.raises(ValueError, match="made with num_proposals 8, but the configuration says 9"):
        sft.train(sft_config(rooms_root, tmp_path, f"init={sft_run}", "model.language.num_proposals=9"))


def test_resuming_on_other_data_is_refused(sft_run, rooms_root, tmp_path):
    shutil.copytree(sft_run / "checkpoints" / "step-000002", tmp_path / "checkpoints" / "step-000002")
    config = sft_config(rooms_root, tmp_path)
    root = tmp_path / "root"
    shutil.copytree(rooms_root, root)
    rows = (root / "annotations" / "Scene-30K.jsonl").read_text().splitlines()
    (root / "annotations" / "Scene-30K.jsonl").write_text("\n".join(rows[1:]) + "\n")
    saved = tmp_path / "checkpoints" / "step-000002" / "config.yaml"
    saved.write_text(saved.read_text().replace(str(rooms_root), str(root)))
    other = sft_config(rooms_root, tmp_path, f"data.root={root}", f"model.language.model={root}/tiny")
    assert other.run == config.run
    with pytest.raises(ValueError, match="The training data has changed"):
        sft.train(other, resume=True)


def test_views_of_a_caption_show_its_object_and_situations_count(sft_run, rooms_root):
    from threedr1.datasets.scene import Sample
    from threedr1.datasets.scene_store import SceneStore

    model = SceneVLM.from_pretrained(latest_checkpoint(sft_run) / "model")
    store = SceneStore(rooms_root / "prepared")
    observation = model.observe(store[store.scene_ids[0]])
    pool = model.view_pool(observation)
    for box_7 in observation.scene.boxes_K7[:6]:
        sample = Sample("a", "object_caption", "own", "s", "Describe the object.", "", query_box_7=box_7)
        (view,) = model.choose_views(sample, observation)
        shown_V = pool.visibility(box_7)[:, 0]
        assert shown_V[view] >= shown_V.max() - 0.01 * 3
    question = "What is behind me?"
    asked = [Sample("b", "situated_qa", "own", "s", question, "", situation=text) for text in ("I sit.", "")]
    model.expect(asked)
    for sample in asked:
        model.choose_views(sample, observation)
    assert {f"I sit. {question}", question} <= observation.choices.keys()


def test_a_saved_model_answers_as_the_one_in_memory(sft_run, rooms_root):
    folder = latest_checkpoint(sft_run) / "model"
    first, second = SceneVLM.from_pretrained(folder), SceneVLM.from_pretrained(folder)
    for key, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[key])
    assert not first.language.has_adapter and first.full_language_model


def test_a_base_model_of_another_size_is_refused(sft_run, tiny_qwen, tmp_path):
    from threedr1.models.tiny import TinySize, build_tiny

    other = build_tiny(tmp_path, ["two words"], size=TinySize(vocab_size=300, width=32, layers=1, heads=2, kv_heads=1))
    with pytest.raises(ValueError, match="was trained on a language model of width 64 with 2 blocks"):
        SceneVLM.from_pretrained(latest_checkpoint(sft_run) / "model", language_model=str(other))


@pytest.fixture(scope="module")
def grpo_run(sft_run, rooms_root, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "grpo"
    grpo.train(grpo_config(rooms_root, sft_run, run_dir))
    return run_dir


def test_grpo_moves_only_the_policy_adapter(grpo_run, sft_run):
    after, before = weights(latest_checkpoint(grpo_run)), weights(latest_checkpoint(sft_run))
    for name, tensors in before.items():
        assert all(torch.equal(value, after[name][key]) for key, value in tensors.items()), name
    adapter = after["model/adapter/policy/adapter_model.safetensors"]
    assert not any("ref" in key for key in adapter)


def test_grpo_logs_rewards_kl_and_an_agreeing_rollout(grpo_run):
    rows = read_metrics(grpo_run / "metrics.jsonl")
    assert len(rows) == 2
    for row in rows:
        assert {"reward", "reward_std", "frac_reward_zero_std", "kl", "entropy", "length/mean"} <= row.keys()
        assert row["mismatch/mean"] < 1e-4
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-6)
    rows = [json.loads(line) for line in (grpo_run / "completions.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * 2 * 3
    group = rows[:3]
    assert len({row["sample_id"] for row in group}) == 1 and group[0]["question"]
    rewards = np.array([row["reward"] for row in group])
    for row in group:
        its = row["rewards"]
        known = {name: value for name, value in its.items() if value is not None}
        weights = {"format": 0.3, "perception": 0.4, "semantic": 0.3}
        total = sum(weights[name] * value for name, value in known.items()) / sum(weights[name] for name in known)
        assert row["reward"] == pytest.approx(total, abs=2e-4)
    assert [row["advantage"] for row in group] == pytest.approx(
        (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-4), abs=0.05
    )


def test_grpo_logs_where_the_time_goes(grpo_run):
    rows = read_metrics(grpo_run / "speed.jsonl")
    assert [row["step"] for row in rows] == [0, 1]
    names = {f"seconds/{name}" for name in ("prompts", "rollout", "rewards", "reference", "update")}
    for row in rows:
        assert names <= row.keys() and all(row[name] > 0 for name in names)
        assert row["decode_tokens_per_s"] > 0 and row["tokens_per_s"] > 0


def test_grpo_killed_and_resumed_equals_uninterrupted(grpo_run, sft_run, rooms_root, tmp_path):
    shutil.copytree(grpo_run / "checkpoints" / "step-000001", tmp_path / "checkpoints" / "step-000001")
    grpo.train(grpo_config(rooms_root, sft_run, tmp_path), resume=True)
    assert_same_weights(latest_checkpoint(tmp_path), latest_checkpoint(grpo_run))


def constant_reward(completions, **columns):
    return [1.0] * len(completions)


def test_a_constant_reward_moves_nothing(sft_run, rooms_root, tmp_path):
    more = [f"reward.names=[{__file__}:constant_reward]", "reward.weights=[1.0]", "loss.beta=0.0", "run.steps=1"]
    grpo.train(grpo_config(rooms_root, sft_run, tmp_path, *more))
    adapter = weights(latest_checkpoint(tmp_path))["model/adapter/policy/adapter_model.safetensors"]
    assert all(not value.any() for key, value in adapter.items() if "lora_B" in key)


def test_evaluation_of_a_model_and_of_the_most_frequent_answers(grpo_run, rooms_root, tmp_path):
    for answers in ("model", "most-frequent"):
        config = load_config(
            "eval",
            None,
            [
                f"model={grpo_run}",
                f"answers={answers}",
                f"run.dir={tmp_path / answers}",
                f"data.root={rooms_root}",
                "data.num_points=512",
                "data.max_samples=3",
                "data.datasets=scan2cap,scanrefer,planning",
                "dense_caption_proposals=2",
                "max_new_tokens=8",
            ],
        )
        evaluate.evaluate(config)
        results = json.loads((tmp_path / answers / "results.json").read_text())["results"]
        assert set(results) == {"scan2cap", "scanrefer", "planning"}
        assert results["scanrefer"]["questions"] == 3 and "Acc@0.25" in results["scanrefer"]["metrics"]
        predictions = read_predictions(tmp_path / answers / "predictions.jsonl")
        asked = [entry for entry in predictions if entry.task == "grounding"]
        assert all(entry.target_boxes for entry in asked)
        if answers == "model":
            assert all((tmp_path / answers / view).exists() for entry in asked for view in entry.views)
            assert all(len(entry.views) == 1 for entry in asked)
        else:
            assert all(entry.boxes for entry in asked)


def eval_config(model, root, out, *more):
    settings = ["data.num_points=512", "data.max_samples=3", "dense_caption_proposals=2", "max_new_tokens=8"]
    return load_config(
        "eval", None, [f"model={model}", f"run.dir={out}", f"data.root={root}", *settings, 'meteor="no"', *more]
    )


def test_evaluation_keeps_every_scorer_and_counts_what_is_left_out(grpo_run, rooms_root, tmp_path):
    root = tmp_path / "root"
    shutil.copytree(rooms_root, root)
    annotations = root / "annotations"
    for name in ("v1_balanced_questions_{}_scannetv2.json", "v1_balanced_sqa_annotations_{}_scannetv2.json"):
        (annotations / name.format("train")).rename(annotations / name.format("test"))
    path = annotations / "ScanQA_v1.0_train.json"
    rows = json.loads(path.read_text())
    path.write_text(json.dumps([*rows, {**rows[0], "scene_id": "scene0777_00", "question_id": "elsewhere"}]))
    config = eval_config(
        grpo_run,
        root,
        tmp_path / "eval",
        "data.datasets=scanqa,sqa3d,nr3d,scanrefer,scan2cap",
        "data.eval_splits={sqa3d: test, scanqa: train}",
        "data.missing=skip",
        "data.max_samples=0",
        "scorers={qa: [exact, ll3da], situated_qa: [sqa3d, sqa3d_text], nr3d: [nr3d, nr3d_nearest]}",
        "scorers.dense_caption=[detect, scan2cap]",
    )
    results = json.loads(evaluate.evaluate(config).read_text())["results"]
    names = {name: (entry["scorer"], list(entry["other_scorers"])) for name, entry in results.items()}
    assert names == {
        "scanqa": ("exact", ["scanqa_ll3da"]),
        "sqa3d": ("sqa3d", ["sqa3d_text"]),
        "nr3d": ("nr3d", ["nr3d_nearest"]),
        "scanrefer": ("scanrefer", []),
        "scan2cap": ("scan2cap_ll3da", ["scan2cap"]),
    }
    assert results["scanqa"]["left_out"] == {"missing_scene": 1} and results["nr3d"]["left_out"] == {}
    assert [results[name]["split"] for name in ("sqa3d", "scanqa", "nr3d")] == ["test", "train", "val"]
    other = results["scanqa"]["other_scorers"]["scanqa_ll3da"]
    assert other["items"] == len(rows) and other["metrics"].keys() >= {"CIDEr", "BLEU-4"} and other["unit"]
    assert "Acc@0.5" in results["nr3d"]["metrics"] and "Acc" not in results["nr3d"]["metrics"]
    assert "Acc-nearest" in results["nr3d"]["other_scorers"]["nr3d_nearest"]["metrics"]
    file = tmp_path / "eval" / "predictions.jsonl"
    for dataset, task in {"scanrefer": "grounding", "nr3d": "grounding", "scan2cap": "dense_caption"}.items():
        again = score_dataset(task, names[dataset][0], file, root=root, dataset=dataset, split="val")
        assert (again["items"], again["counts"]) == (results[dataset]["items"], results[dataset]["counts"])
        computed = {name: value for name, value in results[dataset]["metrics"].items() if "METEOR" not in name}
        assert computed and computed.items() <= again["metrics"].items()


def test_the_recipe_of_all_benchmarks_names_scorers_that_there_are():
    config = load_config("eval", "script/recipes/eval.yaml")
    assert config.data.eval_splits == {"sqa3d": "test"}
    tasks = {"scan2cap": "dense_caption", "scanrefer": "grounding", "nr3d": "grounding", "scanqa": "qa"}
    tasks |= {"sqa3d": "situated_qa", "dialogue": "dialogue", "planning": "planning"}
    assert {name: evaluate.scorers_for(config, name, task) for name, task in tasks.items()} == {
        "scan2cap": ["scan2cap_ll3da", "scan2cap"],
        "scanrefer": ["scanrefer"],
        "nr3d": ["nr3d", "nr3d_nearest"],
        "scanqa": ["scanqa", "scanqa_ll3da"],
        "sqa3d": ["sqa3d", "sqa3d_text"],
        "dialogue": ["ll3da", "ll3da_per_sample"],
        "planning": ["ll3da", "ll3da_per_sample"],
    }
    assert load_config("eval", "script/recipes/tiny.eval.yaml").scorers == {}


@pytest.mark.parametrize("answers", ["model", "most-frequent"])
def test_a_data_set_without_targets_is_answered_and_not_scored(answers, grpo_run, rooms_root, tmp_path):
    root = tmp_path / "root"
    shutil.copytree(rooms_root, root)
    scenes = [path.read_text().split()[0] for path in (root / "scannetv2_train.txt", root / "scannetv2_val.txt")]
    texts = {scene: [["chair", "The tall one"], ["chair", "The low one"], ["bed", "A bed"]] for scene in scenes}
    (root / "annotations" / "nr3d_captions_by_scene.json").write_text(json.dumps(texts))
    config = eval_config(grpo_run, root, tmp_path / "eval", f"answers={answers}", "data.datasets=nr3d_captions")
    result = json.loads(evaluate.evaluate(config).read_text())["results"]["nr3d_captions"]
    assert (result["questions"], result["items"], result["metrics"]) == (3, 0, {})
    assert result["notes"] == ["nothing can be scored: the data set holds no answers to compare with."]
    predictions = read_predictions(tmp_path / "eval" / "predictions.jsonl")
    assert len(predictions) == 3
    assert answers == "model" or {entry.answer for entry in predictions} == {"chair"}


def detections(boxes_K7, probs_KC, objectness_K, points_N3):
    """Evaluation's proposals of one scene whose encoding is given."""
    from types import SimpleNamespace

    encoded = SimpleNamespace(
        proposals=boxes_K7.numpy(),
        class_probs_KC=probs_KC,
        objectness_K=objectness_K,
        valid_K=torch.ones(len(boxes_K7), dtype=torch.bool),
    )
    scene = SimpleNamespace(to_world=lambda boxes: boxes)
    observation = SimpleNamespace(points_N3=points_N3, scene=scene)
    cache = {"s": observation}
    cache = type("Cache", (dict,), {"model": SimpleNamespace(encode=lambda observations: [encoded])})(cache)
    return evaluate.detected(cache, "s")


def test_proposals_are_chosen_as_vote2cap_detr_chooses_them():
    """Of five boxes: good; same class over the first; background likeliest; empty; another class over the first."""
    boxes_K7 = torch.tensor([[0, 0, 0, 1, 1, 1, 0]] * 5, dtype=torch.float32)
    boxes_K7[1, 0], boxes_K7[2, 0], boxes_K7[3, 0] = 0.1, 5, 9
    probs_KC = torch.tensor([[0.8, 0.1], [0.7, 0.1], [0.4, 0.1], [0.8, 0.1], [0.2, 0.6]])
    points_N3 = torch.rand(60, 3) * 0.2
    points_N3[20:40, 0] += 5
    points_N3[40:44, 0] += 9  # four points are too few
    points_N3[44:, 0] += 50
    kept = detections(boxes_K7, probs_KC, probs_KC.sum(1), points_N3)
    assert kept == [boxes_K7[0].tolist(), boxes_K7[4].tolist()]
    probs_KC[:] = 0.01
    assert detections(boxes_K7, probs_KC, probs_KC.sum(1), points_N3) == []
