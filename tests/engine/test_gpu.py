"""The loops on a CUDA device, in bfloat16, with an adapter from the start."""

import json

import pytest
import torch

from threedr1.engine import evaluate, grpo, sft
from threedr1.engine.config import load_config
from threedr1.engine.tracking import read_metrics

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

ENCODER = {"num_tokens": 64, "num_neighbors": 8, "radius": 0.4, "width": 32, "num_queries": 16}
ENCODER |= {"encoder_layers": 1, "decoder_layers": 1, "num_heads": 2}


@pytest.mark.parametrize("train_encoder", [False, True])
def test_sft_grpo_and_evaluation_in_bfloat16(rooms_root, tmp_path, train_encoder):
    sft_run, grpo_run = tmp_path / "sft", tmp_path / "grpo"
    sft.train(
        load_config(
            "sft",
            None,
            [
                f"run.dir={sft_run}",
                "run.steps=3",
                "run.batch_size=4",
                "run.micro_batch_size=2",
                "run.log_every=1",
                "run.device=cuda",
                f"data.root={rooms_root}",
                "data.num_points=2048",
                "data.datasets=scene30k,scan2cap",
                f"model.language.model={rooms_root}/tiny",
                "model.language.gradient_checkpointing=true",
                "model.language.lora_rank=4",
                "model.language.num_proposals=8",
                "model.language.num_layout_tokens=2",
                f"model.train_scene_encoder={str(train_encoder).lower()}",
                *[f"model.encoder.{name}={value}" for name, value in ENCODER.items()],
                "model.views.num_candidates=3",
                "model.views.num_views=1",
                "model.views.image_size=56",
                "model.views.encoder=all-MiniLM-L6-v2",
                "model.views.w_image=1.0",
                "model.views.w_clip=0.0",
                "optim.warmup_steps=0",
                "optim.lr=1e-3",
            ],
        )
    )
    losses = [row["loss"] for row in read_metrics(sft_run / "metrics.jsonl")]
    assert len(losses) == 3 and losses[-1] < losses[0]
    grpo.train(
        load_config(
            "grpo",
            None,
            [
                f"init={sft_run}",
                f"run.dir={grpo_run}",
                "run.steps=2",
                "run.batch_size=2",
                "run.log_every=1",
                "run.device=cuda",
                f"data.root={rooms_root}",
                "data.num_points=2048",
                "reward.names=format,semantic",
                "reward.weights=[0.3,0.7]",
                "reward.gate_by_format=false",  # so small a model keeps no form: gated, no reward would differ
                "reward.semantic_encoder=all-MiniLM-L6-v2",
                "rollout.group_size=4",
                "rollout.max_new_tokens=24",
                "optim.lr=1e-3",
            ],
        )
    )
    for row in read_metrics(grpo_run / "metrics.jsonl"):
        assert row["kl"] is not None and row["mismatch/mean"] < 0.05
    evaluate.evaluate(
        load_config(
            "eval",
            None,
            [
                f"model={grpo_run}",
                f"run.dir={tmp_path / 'eval'}",
                "run.device=cuda",
                f"data.root={rooms_root}",
                "data.max_samples=3",
                "data.datasets=scanrefer,scan2cap",
                "dense_caption_proposals=2",
                "max_new_tokens=8",
            ],
        )
    )
    assert set(json.loads((tmp_path / "eval" / "results.json").read_text())["results"]) == {"scanrefer", "scan2cap"}
