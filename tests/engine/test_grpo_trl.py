"""The GRPO loss against TRL's: a real GRPOTrainer is made and its own code makes advantages, masks, ratios and loss.

Only what needs a language model is replaced: completions are prescribed, and so are the log-probabilities of the
policy now, the policy that sampled, the reference and the sampler. Without TRL these tests skip;
`bash script/test.sh --trl` fetches it into a temporary folder and runs them.

Shapes: P prompts, G completions of each, B = P * G rows, T tokens of the longest completion.
"""

from dataclasses import dataclass, replace

import pytest
import torch

from threedr1.engine.advantages import decoupled_advantages, group_advantages
from threedr1.engine.grpo_loss import Normalizer, grpo_loss
from threedr1.engine.grpo_presets import GrpoLossConfig

from .grpo_batches import without_truncated

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, about names that TRL uses

P, G, T, MAX_LENGTH = 2, 4, 7, 9
LENGTHS = torch.tensor([7, 4, 1, 6, 5, 2, 7, 3])
CUT = (3, 6)  # rows that end without an end token, one in each half
PAD, EOS, WORD = 0, 1, 2
NAN = float("nan")


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    """Folder of a language model of one layer and five words, and its tokenizer."""
    pytest.importorskip("datasets")  # Hugging Face's, which TRL needs
    pytest.importorskip("trl")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    words = {"<pad>": PAD, "<eos>": EOS, "word": WORD, "prompt": 3, "<unk>": 4}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path_factory.mktemp("trl") / "model"
    config = Qwen2Config(
        vocab_size=5,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


@dataclass
class Batch:
    """Log-probabilities [B, T] of sampled tokens, and a table of rewards [R, P, G], NaN where one failed."""

    logps_BT: torch.Tensor
    old_BT: torch.Tensor
    ref_BT: torch.Tensor
    sampler_BT: torch.Tensor
    rewards_RPG: torch.Tensor

    @property
    def mask_BT(self):
        return torch.arange(T) < LENGTHS[:, None]

    @property
    def finished_B(self):
        return torch.tensor([row not in CUT for row in range(P * G)])

    @property
    def completions(self):
        return [[WORD] * (n - 1) + [WORD if row in CUT else EOS] for row, n in enumerate(LENGTHS.tolist())]


def make_batch(seed=0, num_rewards=1):
    generator = torch.Generator().manual_seed(seed)
    noise_4BT = torch.randn(4, P * G, T, generator=generator, dtype=torch.float64)
    logps_BT = -2 + noise_4BT[0] * 0.5
    old_BT, ref_BT = logps_BT - noise_4BT[1] * 0.3, logps_BT - noise_4BT[2] * 0.3
    sampler_BT = (old_BT - noise_4BT[3] * 0.3).float()  # TRL keeps them in float32
    rewards_RPG = torch.rand(num_rewards, P, G, generator=generator)
    return Batch(logps_BT.requires_grad_(), old_BT, ref_BT, sampler_BT, rewards_RPG)


def trl_options(config: GrpoLossConfig) -> dict:
    """Our configuration in TRL's words."""
    gspo, cispo = config.loss_type == "gspo", config.loss_type == "cispo"
    return {
        "loss_type": "grpo" if gspo else config.loss_type,
        "importance_sampling_level": "sequence" if gspo else config.ratio_level,
        "epsilon": config.clip_low,
        "epsilon_high": config.clip_high + cispo,  # for cispo TRL takes the bound itself
        "delta": config.delta,
        "beta": config.beta,
        "use_bias_correction_kl": config.kl_ratio,
        "scale_rewards": config.scale,
        "mask_truncated_completions": config.mask_truncated,
        "vllm_importance_sampling_correction": config.sampler_correction != "none",
        "vllm_importance_sampling_clip_max": config.sampler_cap,
    } | ({"vllm_importance_sampling_mode": config.sampler_correction} if config.sampler_correction != "none" else {})


def make_trainer(folder, batch: Batch, micro_batches=1, **options):
    """A GRPOTrainer that takes the batch for its rollouts. `num_iterations` is 2, so that it makes old log-probs."""
    from trl import GRPOConfig, GRPOTrainer

    from datasets import Dataset

    def reward(index):
        def function(completions, **_):
            return [None if value.isnan() else value.item() for value in batch.rewards_RPG[index].reshape(-1)]

        function.__name__ = f"reward_{index}"
        return function

    args = GRPOConfig(
        output_dir=str(folder.parent / "run"),
        use_cpu=True,
        bf16=False,
        report_to=[],
        num_generations=G,
        num_iterations=2,
        per_device_train_batch_size=P * G // micro_batches,
        gradient_accumulation_steps=micro_batches,
        steps_per_generation=micro_batches,
        max_completion_length=MAX_LENGTH,
        **options,
    )
    trainer = GRPOTrainer(
        model=str(folder),
        reward_funcs=[reward(index) for index in range(len(batch.rewards_RPG))],
        args=args,
        train_dataset=Dataset.from_dict({"prompt": ["prompt"] * P}),
    )
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = micro_batches  # as in its training loop
    trainer.use_vllm = options.get("vllm_importance_sampling_correction", False)
    sampled = [row[:n].tolist() for row, n in zip(batch.sampler_BT, LENGTHS, strict=True)]
    texts = ["word"] * (P * G)
    trainer._generate = lambda prompts: ([[3]] * (P * G), batch.completions, None, texts, sampled, {}, None, None)
    return trainer


def trl_rollouts(trainer, batch: Batch) -> dict:
    """What TRL makes of the completions before the loss: advantages, masks, old and reference log-probs, ratios."""

    def logprobs(model, *_, **__):
        return (batch.ref_BT if model is trainer.ref_model else batch.old_BT).clone(), None, None

    trainer._get_per_token_logps_and_entropies = logprobs
    return trainer._generate_and_score_completions([{"prompt": "prompt"}] * (P * G))


def trl_loss(folder, batch: Batch, micro_batches=1, **options):
    """TRL's loss of the batch, its gradient at the log-probabilities, and the trainer with its metrics."""
    from trl.trainer.utils import split_tensor_dict

    trainer = make_trainer(folder, batch, micro_batches, **options)
    rollouts = trl_rollouts(trainer, batch)
    total = torch.zeros((), dtype=torch.float64)
    for part, logps_BT in zip(
        split_tensor_dict(rollouts, micro_batches), batch.logps_BT.chunk(micro_batches), strict=True
    ):
        trainer._get_per_token_logps_and_entropies = lambda *_, now=logps_BT, **__: (now, torch.zeros_like(now), None)
        total = total + trainer.compute_loss(trainer.model, part)
    return total, torch.autograd.grad(total, batch.logps_BT)[0], trainer


def our_loss(batch: Batch, config: GrpoLossConfig, micro_batches=1, all_rows=True):
    """Ours. With `all_rows` cut completions count among the sequences, as they do in TRL's grpo and dr_grpo."""
    mask_BT = without_truncated(batch.mask_BT, batch.finished_B) if config.mask_truncated else batch.mask_BT
    normalizer = Normalizer.of(mask_BT, MAX_LENGTH)
    if all_rows and config.loss_type != "bnpo":
        normalizer = normalizer._replace(num_sequences=P * G)
    advantages_B = group_advantages(batch.rewards_RPG[0], config.scale).reshape(-1)
    total, metrics = torch.zeros((), dtype=torch.float64), {}
    for rows in torch.arange(P * G).chunk(micro_batches):
        got = grpo_loss(
            batch.logps_BT[rows],
            batch.old_BT[rows],
            batch.ref_BT[rows] if config.beta else None,
            advantages_B[rows],
            mask_BT[rows],
            config,
            normalizer=normalizer,
            sampler_logps_BT=batch.sampler_BT[rows].double(),
        )
        total, metrics = total + got.loss, got.metrics
    return total, torch.autograd.grad(total, batch.logps_BT)[0], metrics


def assert_same(ours, theirs, scale=1.0):
    """Loss and gradient; the gradient is not zero and is compared token by token."""
    torch.testing.assert_close(ours[0], theirs[0] * scale, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(ours[1], theirs[1] * scale, rtol=1e-5, atol=1e-8)
    assert ours[1].abs().max() > 1e-3


# --- advantages ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("failures", [(), ((0, 1), (1, 0), (1, 3))])
def test_advantages(tiny_model, scale, failures):
    batch = make_batch()
    for place in failures:
        batch.rewards_RPG[0][place] = NAN
    theirs = trl_rollouts(make_trainer(tiny_model, batch, scale_rewards=scale), batch)["advantages"]
    ours = group_advantages(batch.rewards_RPG[0], scale).reshape(-1)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert (ours == 0).sum() == len(failures)


def test_advantages_of_rewards_normalised_apart(tiny_model):
    batch = make_batch(num_rewards=2)
    batch.rewards_RPG[1] *= 100
    batch.rewards_RPG[1, 0, 2] = NAN
    batch.rewards_RPG[:, 1, 1] = NAN
    options = {"multi_objective_aggregation": "normalize_then_sum", "reward_weights": [0.3, 0.7]}
    theirs = trl_rollouts(make_trainer(tiny_model, batch, **options), batch)["advantages"]
    ours = decoupled_advantages(batch.rewards_RPG, torch.tensor([0.3, 0.7])).reshape(-1)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_group_without_variance_is_zero_here_and_rounding_there(tiny_model):
    batch = make_batch()
    batch.rewards_RPG[0, 0] = 0.1
    theirs = trl_rollouts(make_trainer(tiny_model, batch), batch)["advantages"].view(P, G)
    ours = group_advantages(batch.rewards_RPG[0])
    assert torch.equal(ours[0], torch.zeros(G)) and theirs[0].abs().max() < 1e-3
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-5, atol=1e-6)


# --- the loss ------------------------------------------------------------------------------------------------------

TYPES = ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "gspo")
# TRL weights a token's KL by the response's ratio where ratios are about responses; see the test of gspo below
KL = [
    (kind, *kl) for kind in TYPES for kl in ((0.0, False), (0.04, False), (0.04, True)) if kind != "gspo" or not kl[1]
]


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("mask_truncated", [False, True])
@pytest.mark.parametrize(("loss_type", "beta", "kl_ratio"), KL)
def test_loss_and_gradient(tiny_model, loss_type, beta, kl_ratio, mask_truncated, micro_batches):
    config = GrpoLossConfig(
        loss_type=loss_type, clip_high=0.28, beta=beta, kl_ratio=kl_ratio, mask_truncated=mask_truncated
    )
    batch = make_batch()
    theirs = trl_loss(tiny_model, batch, micro_batches, **trl_options(config))
    ours = our_loss(batch, config, micro_batches)
    assert_same(ours, theirs)
    assert bool((ours[1][list(CUT)] == 0).all()) == mask_truncated


@pytest.mark.parametrize("scale", ["batch", "none"])
@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo"])
def test_loss_with_other_scales(tiny_model, loss_type, scale):
    config, batch = GrpoLossConfig(loss_type=loss_type, scale=scale), make_batch(1)
    assert_same(our_loss(batch, config), trl_loss(tiny_model, batch, **trl_options(config)))


@pytest.mark.parametrize("loss_type", [kind for kind in TYPES if kind != "cispo"])
def test_two_sided_clipping(tiny_model, loss_type):
    """A ratio of 9 with a negative advantage (the lowest reward of its group), bounded by 1.5."""
    config, batch = GrpoLossConfig(loss_type=loss_type, delta=1.5, beta=0.04), make_batch()
    worst = int(batch.rewards_RPG[0, 0].argmin())
    with torch.no_grad():
        batch.logps_BT[worst, : LENGTHS[worst]] = batch.old_BT[worst, : LENGTHS[worst]] + 2.2
    ours = our_loss(batch, config)
    assert_same(ours, trl_loss(tiny_model, batch, **trl_options(config)))
    assert ours[2]["clip/delta"] > 0
    free = our_loss(batch, replace(config, delta=None))
    assert ours[0] < free[0] - 0.1


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo", "bnpo", "cispo"])
def test_ratios_of_sequences(tiny_model, loss_type):
    config, batch = GrpoLossConfig(loss_type=loss_type, ratio_level="sequence", beta=0.04), make_batch(2)
    assert_same(our_loss(batch, config), trl_loss(tiny_model, batch, **trl_options(config)))


@pytest.mark.parametrize("kind", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "gspo", "cispo"])
def test_correction_of_the_sampler(tiny_model, loss_type, kind):
    config = GrpoLossConfig(loss_type=loss_type, sampler_correction=kind, sampler_cap=1.3, mask_truncated=True)
    batch = make_batch(3)
    ours, theirs = our_loss(batch, config), trl_loss(tiny_model, batch, **trl_options(config))
    assert_same(ours, theirs)
    assert 0 < ours[2]["correction/capped"] < 1
    metrics = theirs[2]._metrics["train"]
    for name, key in {
        "mismatch/mean": "sampling/sampling_logp_difference/mean",
        "mismatch/max": "sampling/sampling_logp_difference/max",
    }.items():
        assert ours[2][name].item() == pytest.approx(metrics[key][0], rel=1e-5)
    if kind.startswith("token"):
        got = [ours[2][f"correction/{name}"].item() for name in ("mean", "max")]
        want = [metrics[f"sampling/importance_sampling_ratio/{name}"][0] for name in ("mean", "max")]
        assert got == pytest.approx(want, rel=1e-5)


def test_metrics(tiny_model):
    config, batch = GrpoLossConfig(loss_type="dapo", beta=0.04, kl_ratio=True), make_batch(4)
    metrics, theirs = (
        our_loss(batch, config)[2],
        trl_loss(tiny_model, batch, **trl_options(config))[2]._metrics["train"],
    )
    for name, key in {
        "kl": "kl",
        "clip/low": "clip_ratio/low_mean",
        "clip/high": "clip_ratio/high_mean",
        "clip/region": "clip_ratio/region_mean",
    }.items():
        assert metrics[name].item() == pytest.approx(theirs[key][0], rel=1e-5) and metrics[name] > 0


# --- where the two differ, and by what -----------------------------------------------------------------------------


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "gspo"])
def test_cut_completions_count_among_trls_sequences(tiny_model, loss_type):
    config, batch = GrpoLossConfig(loss_type=loss_type, mask_truncated=True), make_batch()
    theirs = trl_loss(tiny_model, batch, **trl_options(config))
    assert_same(our_loss(batch, config, all_rows=False), theirs, scale=P * G / (P * G - len(CUT)))


def test_gspos_kl_keeps_its_own_tokens_ratio(tiny_model):
    """What KL adds to our gspo is what it adds to TRL's grpo at token level, where the correction is unbiased."""
    batch = make_batch()
    config = GrpoLossConfig(loss_type="gspo", beta=0.04, kl_ratio=True)
    ours = [our_loss(batch, replace(config, beta=beta)) for beta in (0.04, 0.0)]
    tokens = replace(config, loss_type="grpo")
    theirs = [trl_loss(tiny_model, batch, **trl_options(replace(tokens, beta=beta))) for beta in (0.04, 0.0)]
    for place in (0, 1):
        torch.testing.assert_close(
            ours[0][place] - ours[1][place], theirs[0][place] - theirs[1][place], rtol=1e-5, atol=1e-8
        )
    sequences = trl_loss(tiny_model, batch, **trl_options(config))
    assert not torch.allclose(ours[0][1], sequences[1], rtol=1e-3)
