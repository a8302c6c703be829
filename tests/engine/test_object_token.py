"""The token of the object that is asked for, from a sample's box or a user's click to answers, files and settings."""

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from threedr1 import main as cli
from threedr1.datasets.readers import read_scene
from threedr1.datasets.scene import Sample
from threedr1.datasets.scene_store import SceneStore
from threedr1.engine import sft
from threedr1.engine.build import build_model
from threedr1.engine.checkpoint import latest_checkpoint
from threedr1.engine.config import load_config
from threedr1.engine.grpo_packs import make_packs
from threedr1.engine.predict import infer
from threedr1.engine.rollout import roll_out, write_prompts
from threedr1.engine.sft import sft_loss
from threedr1.engine.sft_data import write_targets
from threedr1.models.inputs import SCENE, SCENE_PLACEHOLDER, pad_rows
from threedr1.models.observation import asked_objects
from threedr1.models.scene_vlm import SceneVLM
from threedr1.utils.boxes import box3d_iou
from threedr1.utils.predictions import read_predictions

ENCODER = (
    "num_tokens=32 num_neighbors=8 radius=0.4 width=16 encoder_layers=1 decoder_layers=1 num_heads=2 num_queries=12 "
    "dropout=0.0"
)


def settings(root, *more, run_dir="unused"):
    return load_config(
        "sft",
        None,
        [
            f"run.dir={run_dir}",
            "run.steps=2",
            "run.batch_size=4",
            f"data.root={root}",
            "data.num_points=512",
            "data.datasets=scan2cap,scanqa",
            f"model.language.model={root}/tiny",
            "model.language.dtype=float32",
            "model.language.train=full",
            "model.language.num_proposals=8",
            "model.language.num_layout_tokens=2",
            *[f"model.encoder.{setting}" for setting in ENCODER.split()],
            "model.views.source=none",
            "optim.warmup_steps=0",
            *more,
        ],
    )


def build(root, *more):
    config = settings(root, *more)
    torch.manual_seed(0)
    return build_model(config.model, config.data).eval()


@pytest.fixture(scope="module")
def model(rooms_root):
    return build(rooms_root)


@pytest.fixture(scope="module")
def scene(rooms_root):
    store = SceneStore(rooms_root / "prepared")
    return store[store.scene_ids[0]]


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "model"
    model.save_pretrained(folder)
    return folder


def caption(box_7, task="object_caption", answer="a chair"):
    return Sample("c", task, "own", "s", "Describe the object.", answer, query_box_7=box_7)


QUESTION = Sample("q", "qa", "own", "s", "How many chairs are there?", "two")


def inputs_of(model, samples, observations, **options):
    written = [
        model.write_row(sample, observation, "direct", None)
        for sample, observation in zip(samples, observations, strict=True)
    ]
    rows = [row for row, _ in written]
    return rows, model.embed_rows(rows, observations, [views for _, views in written], **options)


def test_the_token_stands_behind_the_words_that_point_at_the_object(model, scene):
    observation = model.observe(scene)
    (encoded,) = model.encode([observation])
    proposal_7 = scene.to_world(encoded.proposals[:1])[0]
    nowhere_7 = np.array([90.0, 0, 0, 1, 1, 1, 0], np.float32)
    for box_7, pointer in ((proposal_7, r"<obj\d+>"), (nowhere_7, r"<box>[^<]*</box>")):
        row, _ = model.write_row(caption(box_7, "dense_caption"), observation, "direct", None)
        text = model.language.tokenizer.decode(row.token_ids)
        mark = re.escape(SCENE_PLACEHOLDER)
        assert re.search(rf"\nDescribe {pointer}{mark} and where it stands among its neighbours\.\n", text)
        assert row.num_scene_tokens == len(encoded.proposals) + 2 + 1
        np.testing.assert_allclose(row.asked_box_7, scene.to_model(box_7), atol=1e-5)
        # one position a token, as text
        positions = pad_rows([row], 0).position_ids_4BL[:, 0]
        assert torch.equal(positions, torch.arange(len(row.token_ids)).expand(4, -1))


def test_rows_without_a_box_and_models_without_the_token_write_as_before(model, rooms_root, scene):
    observation = model.observe(scene)
    plain = build(rooms_root, "model.language.object_token=false")
    plain.load_state_dict({key: model.state_dict()[key] for key in plain.state_dict()})
    other = plain.observe(scene)
    with torch.no_grad():
        (with_token,), ours = inputs_of(model, [QUESTION], [observation])
        (without,), theirs = inputs_of(plain, [QUESTION], [other])
    assert with_token == without and with_token.asked_box_7 is None
    assert torch.equal(ours.inputs_embeds_BLD, theirs.inputs_embeds_BLD)
    asked = caption(scene.boxes_K7[0])
    row, _ = plain.write_row(asked, other, "direct", None)
    longer, _ = model.write_row(asked, observation, "direct", None)
    assert row.asked_box_7 is None and longer.num_scene_tokens == row.num_scene_tokens + 1
    text = plain.language.tokenizer.decode(longer.token_ids)
    place = text.rindex(SCENE_PLACEHOLDER)
    without_mark = text[:place] + text[place + len(SCENE_PLACEHOLDER) :]
    assert without_mark == plain.language.tokenizer.decode(row.token_ids)


def test_a_mixed_batch_gives_each_row_its_own_token(model, scene, rooms_root):
    store = SceneStore(rooms_root / "prepared")
    second = store[store.scene_ids[1]]
    samples = [caption(scene.boxes_K7[0]), QUESTION, caption(second.boxes_K7[1]), caption(scene.boxes_K7[2])]
    first, other = model.observe(scene), model.observe(second)
    observations = [first, first, other, first]
    with torch.no_grad():
        rows, together = inputs_of(model, samples, observations)
        for place, (sample, observation) in enumerate(zip(samples, observations, strict=True)):
            (row,), alone = inputs_of(model, [sample], [observation])
            real_L = together.attention_mask_BL[place].bool()
            torch.testing.assert_close(together.inputs_embeds_BLD[place, real_L], alone.inputs_embeds_BLD[0])
            if sample.query_box_7 is not None:
                queried = asked_objects([row.asked_box_7], model.encode([observation]))
                (token_D,) = model.connector.asked(queried)
                last = max(index for index, kind in enumerate(row.kinds) if kind == SCENE)
                torch.testing.assert_close(alone.inputs_embeds_BLD[0, last], token_D)
    assert [row.asked_box_7 is None for row in rows] == [False, True, False, False]


def test_a_scene_of_one_object_and_one_of_none_are_told_as_they_are(rooms_root, scene):
    single = build(rooms_root, "model.language.num_proposals=1")
    observation = single.observe(scene)
    (encoded,) = single.encode([observation])
    assert encoded.proposals.shape == (1, 7) and encoded.valid_n.tolist() == [0]
    assert torch.equal(torch.from_numpy(encoded.proposals), encoded.boxes_K7)
    empty = replace(observation, encoded=encoded.showing([]))
    assert len(empty.encoded.told) == 0
    world_7 = scene.to_world(encoded.proposals)[0]
    samples = [caption(world_7), QUESTION, QUESTION, caption(world_7)]
    observations = [observation, empty, observation, empty]
    with torch.no_grad():
        rows, together = inputs_of(single, samples, observations)
        for place, pair in enumerate(zip(samples, observations, strict=True)):
            _, alone = inputs_of(single, *([its] for its in pair))
            real_L = together.attention_mask_BL[place].bool()
            torch.testing.assert_close(together.inputs_embeds_BLD[place, real_L], alone.inputs_embeds_BLD[0])
    layout = rows[1].num_scene_tokens
    assert [row.num_scene_tokens - layout for row in rows] == [2, 0, 1, 1]


def test_the_token_changes_what_the_model_says(model, scene):
    """The same words about two boxes that no proposal covers: only the token can tell which of them is meant."""
    observation = model.observe(scene)
    row, _ = model.write_row(caption(scene.boxes_K7[0]), observation, "direct", None)
    moved = replace(row, asked_box_7=tuple(np.add(row.asked_box_7, [2.0, 0, 0, 0, 0, 0, 0])))
    with torch.no_grad():
        inputs = model.embed_rows([row, moved], [observation] * 2, [[], []])
        hidden_BLD = model.hidden(inputs)
        logits_BV = hidden_BLD[:, -1] @ model.language.head_weight_VD.T
    place = max(index for index, kind in enumerate(row.kinds) if kind == SCENE)
    assert torch.equal(inputs.inputs_embeds_BLD[0, :place], inputs.inputs_embeds_BLD[1, :place])
    assert torch.equal(inputs.inputs_embeds_BLD[0, place + 1 :], inputs.inputs_embeds_BLD[1, place + 1 :])
    assert float((logits_BV[0] - logits_BV[1]).abs().max()) > 1e-4


def test_training_reaches_the_mark_and_the_encoders_tokens_through_the_object_token(rooms_root, scene):
    model = build(rooms_root, "model.language.num_layout_tokens=0").train()
    model.set_trainable(language="none", connector=True, scene_encoder=True)
    observation = model.observe(scene)
    (encoded,) = model.encode([observation])
    encoded.tokens_TE.retain_grad()
    encoded.features_KE = encoded.features_KE.detach()  # without layout, only the object token leads to the encoder
    loss, _ = sft_loss(model, write_targets(model, [QUESTION], [observation], pointers="name"))
    loss.backward()
    assert encoded.tokens_TE.grad is None and model.connector.asked_mark.weight.grad is None
    loss, _ = sft_loss(model, write_targets(model, [caption(scene.boxes_K7[0])], [observation], pointers="name"))
    loss.backward()
    assert float(model.connector.asked_mark.weight.grad.abs().sum()) > 0
    assert float(model.connector.pooled_linear.weight.grad.abs().sum()) > 0
    assert encoded.tokens_TE.grad is not None and float(encoded.tokens_TE.grad.abs().sum()) > 0
    assert any(parameter.grad is not None for parameter in model.scene_encoder.encoder.parameters())


def test_rollouts_and_their_log_probabilities_see_the_same_token(model, scene):
    observation = model.observe(scene)
    model.encode([observation])
    samples = [caption(scene.boxes_K7[0]), QUESTION]
    rollouts = roll_out(
        model, write_prompts(model, samples, [observation] * 2, ["direct"] * 2), max_new_tokens=4, group_size=2
    )
    rollout = rollouts[0]
    assert rollout.row.asked_box_7 is not None
    (pack,) = make_packs(model, [rollout], [[0, 1]], budget=10_000)
    with torch.no_grad():
        logps_LV = (model.hidden(pack.inputs)[0] @ model.language.head_weight_VD.T).log_softmax(-1)
    # greedy: each token that was taken was the likeliest
    torch.testing.assert_close(
        logps_LV[pack.inputs.predicting_T, pack.inputs.targets_T], logps_LV[pack.inputs.predicting_T].amax(1)
    )
    assert pack.inputs.targets_T.tolist() == [*rollout.token_ids[0], *rollout.token_ids[1]]


def test_a_saved_model_keeps_its_token(model, folder, scene):
    loaded = SceneVLM.from_pretrained(folder)
    samples = [caption(scene.boxes_K7[0]), QUESTION]
    with torch.no_grad():
        _, ours = inputs_of(model, samples, [model.observe(scene)] * 2)
        _, theirs = inputs_of(loaded, samples, [loaded.observe(scene)] * 2)
    assert torch.equal(ours.inputs_embeds_BLD, theirs.inputs_embeds_BLD)


def rewrite(path, change):
    description = json.loads(path.read_text())
    change(description["connector"])
    path.write_text(json.dumps(description))


def drop_token(folder):
    path = folder / "connector.safetensors"
    state = {key: value for key, value in load_file(path).items() if not key.startswith(("pooled", "asked"))}
    save_file(state, path)


def test_a_model_from_before_object_tokens_loads_and_goes_without(folder, rooms_root, scene, tmp_path):
    old = shutil.copytree(folder, tmp_path / "old")
    rewrite(old / "scene_vlm.json", lambda connector: connector.pop("object_token"))
    drop_token(old)
    loaded = SceneVLM.from_pretrained(old)
    assert loaded.connector.object_token is False
    row, _ = loaded.write_row(caption(scene.boxes_K7[0]), loaded.observe(scene), "direct", None)
    assert row.asked_box_7 is None
    run_dir = tmp_path / "run"
    with pytest.raises(ValueError, match="made with object_token False, but the configuration says True"):
        sft.train(settings(rooms_root, f"init={old}", run_dir=run_dir))
    checkpoint = sft.train(
        settings(rooms_root, f"init={old}", "run.steps=1", "model.language.object_token=false", run_dir=run_dir)
    )
    config = checkpoint / "config.yaml"
    config.write_text(config.read_text().replace("    object_token: false\n", ""))  # as that version wrote it
    with pytest.raises(ValueError, match=r"model.language.object_token: False -> True"):
        sft.train(settings(rooms_root, f"init={old}", "run.steps=1", run_dir=run_dir), resume=True)
    without = settings(rooms_root, f"init={old}", "run.steps=1", "model.language.object_token=false", run_dir=run_dir)
    assert sft.train(without, resume=True) == checkpoint


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: drop_token(folder), "lacks asked_mark.weight|lacks pooled_norm.weight"),
        (
            lambda folder: rewrite(folder / "scene_vlm.json", lambda connector: connector.pop("object_token")),
            "holds asked_mark.weight, which the configured model lacks",
        ),
        (
            lambda folder: rewrite(folder / "scene_vlm.json", lambda connector: connector.update(objekt_token=True)),
            "has the unknown setting 'objekt_token'",
        ),
        (
            lambda folder: rewrite(folder / "scene_vlm.json", lambda connector: connector.pop("num_proposals")),
            "lacks 'connector.num_proposals'",
        ),
    ],
)
def test_weights_and_description_that_disagree_are_refused(change, words, folder, tmp_path):
    broken = shutil.copytree(folder, tmp_path / "broken")
    change(broken)
    with pytest.raises(ValueError, match=words):
        SceneVLM.from_pretrained(broken)


# infer -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scan(rooms_root, scene):
    return rooms_root / "prepared" / f"{scene.scene_id}.npz"


def test_infer_captions_a_box_and_a_click_in_the_world_frame(folder, scan, scene, tmp_path):
    box_7 = scene.boxes_K7[0]
    click_3 = box_7[:3]
    answered = infer(
        scan, folder, [], boxes=[box_7.tolist()], clicks=[click_3.tolist()], out=tmp_path, max_new_tokens=4
    )
    boxed, clicked = answered.predictions
    assert [entry.task for entry in answered.predictions] == ["object_caption"] * 2
    np.testing.assert_allclose(boxed.meta["query_box"], box_7, atol=1e-5)
    np.testing.assert_allclose(clicked.meta["query_point"], click_3, atol=1e-6)
    proposals_K7 = answered.scene.to_world(answered.observation.encoded.proposals)
    overlaps = box3d_iou(np.array([clicked.meta["query_box"]], np.float32), proposals_K7)
    assert float(overlaps.max()) == pytest.approx(1.0, abs=1e-4), "a click means a detected box"
    assert len(read_predictions(tmp_path / "predictions.jsonl")) == 2


def test_infer_asks_each_question_of_each_object(folder, scan, scene):
    boxes = scene.boxes_K7[:2].tolist()
    questions = ["What is {object} made of?", "Is {object} near the door?"]
    answered = infer(scan, folder, questions, boxes=boxes, max_new_tokens=2)
    assert [entry.question for entry in answered.predictions] == questions * 2
    assert [entry.task for entry in answered.predictions] == ["qa"] * 4
    assert len({entry.sample_id for entry in answered.predictions}) == 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"boxes": [[90.0, 0, 0, 1, 1, 1]]}, "holds no point of the scan, which lies between"),
        ({"boxes": [[0.0, 0, 0, 1, 0, 1]]}, "is no box; give x,y,z,dx,dy,dz, sizes above 0"),
        ({"boxes": [[0.0, 0, 0, 1, float("nan"), 1]]}, "is no box"),
        ({"boxes": [[0.0, 0, 0]]}, "is no box"),
        ({"clicks": [[0.0, 0]]}, "A click has three coordinates"),
        ({"clicks": [[0.0, 0, float("inf")]]}, "a click is not finite"),
        ({"clicks": [[50.0, 0, 1]]}, "is far from the scan, which lies between"),
        (
            {"clicks": [[0.0, 0, 0]], "questions": ["How many?"]},
            "does not say where the object stands; write {object}",
        ),
        (
            {"clicks": [[0.0, 0, 0]], "questions": ["How?"], "task": "dense_caption"},
            "takes no question besides the box",
        ),
        ({"clicks": [[0.0, 0, 0]], "task": "qa"}, "There is no question"),
        ({"task": "object_caption"}, "asks about a box, not a question; point at one with --box or --click"),
        ({}, "There is no question"),
    ],
)
def test_infer_refuses_what_it_cannot_point_at(arguments, words, folder, scan):
    with pytest.raises(ValueError, match=re.escape(words)):
        infer(scan, folder, **{"questions": [], **arguments})


def test_a_click_beside_everything_takes_the_nearest_object_and_says_so(folder, scan, caplog):
    top_3 = read_scene(scan).points_N3.max(0)
    with caplog.at_level("WARNING"):
        answered = infer(scan, folder, [], clicks=[(top_3 + 0.9).tolist()], max_new_tokens=2)
    assert "lies in no detected object; the nearest is" in caplog.text
    assert abs(answered.predictions[0].meta["query_box"][0]) < 20


def test_the_command_line_takes_boxes_and_clicks_with_minus_signs():
    parser = cli.build_parser()
    words = ["infer", "--scene", "a.ply", "--click", "-1.5,0,-.25", "--box", "-1,0,.5,1,1,1", "--click=1,2,3"]
    args = parser.parse_args([*words, "--box", "0,0,0,1,1,1,-0.5"])
    assert args.click == [[-1.5, 0, -0.25], [1, 2, 3]] and args.task is None
    assert args.box == [[-1, 0, 0.5, 1, 1, 1], [0, 0, 0, 1, 1, 1, -0.5]]


@pytest.mark.parametrize(
    "words", [["--click", "1,2"], ["--box", "1,2,3"], ["--click", "1,2,x"], ["--click", "1,2,inf"]]
)
def test_the_command_line_refuses_other_numbers(words, capsys):
    with pytest.raises(SystemExit):
        cli.build_parser().parse_args(["infer", "--scene", "a.ply", *words])
    assert "numbers with commas between" in capsys.readouterr().err


def test_the_command_captions_a_click(folder, scan, scene, tmp_path, capsys):
    click = ",".join(f"{value:.3f}" for value in scene.boxes_K7[0, :3])
    argv = ["infer", "--scene", str(scan), "--model", str(folder), "--click", click, "--out", str(tmp_path), "--json"]
    assert cli.main(argv) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[0])
    assert said["task"] == "object_caption" and len(said["meta"]["query_box"]) == 7
    assert (tmp_path / "answer-0.png").exists()


def test_sft_learns_the_tokens_parameters(rooms_root, tmp_path):
    run_dir = tmp_path / "run"
    sft.train(settings(rooms_root, "data.datasets=scan2cap", run_dir=run_dir))
    torch.manual_seed(0)
    fresh = build(rooms_root).connector.state_dict()
    learned = load_file(latest_checkpoint(run_dir) / "model" / "connector.safetensors")
    assert learned.keys() == fresh.keys()
    assert float((learned["pooled_norm.weight"] - 1).abs().max()) > 0


def test_a_model_from_before_object_colours_loads_and_goes_without(folder, rooms_root, scene, tmp_path):
    sources = load_file(folder / "connector.safetensors")
    old = shutil.copytree(folder, tmp_path / "old")
    rewrite(old / "scene_vlm.json", lambda connector: connector.pop("object_color"))
    save_file(
        {
            name: value[:, :-48].contiguous() if name == "object_mlp.0.weight" else value
            for name, value in sources.items()
        },
        old / "connector.safetensors",
    )
    loaded, whole = SceneVLM.from_pretrained(old), SceneVLM.from_pretrained(folder)
    assert (loaded.connector.object_color, whole.connector.object_color) == (False, True)
    assert whole.connector.object_mlp[0].in_features == loaded.connector.object_mlp[0].in_features + 48
    (encoded,) = loaded.encode([loaded.observe(scene)])
    assert float(encoded.colors_K6[encoded.valid_K, :3].max()) > 0.05  # the scene has colours, which it does not use
    assert loaded.scene_tokens([encoded])[0].shape == whole.scene_tokens([encoded])[0].shape
    with pytest.raises(ValueError, match="made with object_color False, but the configuration says True"):
        sft.train(settings(rooms_root, f"init={old}", run_dir=tmp_path / "run"))
