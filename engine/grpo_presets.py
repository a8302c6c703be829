"""What the GRPO loss can be told, and the two presets. No torch here: recipes are read without it.

docs/grpo.md has every option with its formula and source.
"""

from dataclasses import dataclass
from typing import Literal, get_args

LossType = Literal["grpo", "dr_grpo", "dapo", "bnpo", "cispo", "gspo"]
RatioLevel = Literal["token", "sequence", "response"]
KlKind = Literal["k1", "k2", "k3"]
Scale = Literal["group", "batch", "none"]
SamplerCorrection = Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]


def check_choice(name: str, value: str, choices: object) -> None:
    """Refuse a value that is not one of a Literal's."""
    if value not in get_args(choices):
        raise ValueError(f"{name} is {value!r}; choose one of {', '.join(get_args(choices))}.")


def check_clip(clip_low: float, clip_high: float, delta: float | None) -> None:
    """Refuse clip ranges that do not hold the ratio 1, and a `delta` inside them."""
    if not 0 <= clip_low < 1:
        raise ValueError(f"clip_low is {clip_low}; it must be at least 0 and below 1.")
    if not clip_high >= 0:
        raise ValueError(f"clip_high is {clip_high}; it must not be below 0.")
    if delta is not None and not delta > 1 + clip_high:
        raise ValueError(f"delta is {delta}; it must lie above 1 + clip_high = {1 + clip_high}.")


def level_of(loss_type: LossType, ratio_level: RatioLevel) -> RatioLevel:
    """What a ratio is about; "response" is refused where a loss has several terms a response."""
    check_choice("loss_type", loss_type, LossType)
    check_choice("ratio_level", ratio_level, RatioLevel)
    if ratio_level == "response" and loss_type != "grpo":
        raise ValueError(f'ratio_level is "response", one term a response; it needs loss_type grpo, not {loss_type}.')
    return "sequence" if loss_type == "gspo" else ratio_level


@dataclass(frozen=True)
class GrpoLossConfig:
    """Everything that `grpo_loss` needs to know; in recipes and overrides the keys of `loss`."""

    loss_type: LossType = "grpo"
    ratio_level: RatioLevel = "token"
    clip_low: float = 0.2
    clip_high: float = 0.2
    delta: float | None = None  # upper bound of the ratio where the advantage is negative
    beta: float = 0.02
    kl: KlKind = "k3"
    # multiply the KL estimate by the token ratio: unbiased off policy, and with k3 (or k1) the gradient of the
    # REVERSE KL, which is what the objective names; plain k3 descends the forward KL
    kl_ratio: bool = False
    scale: Scale = "group"
    mask_truncated: bool = False  # completions that the limit cut leave the loss; their rewards still count
    sampler_correction: SamplerCorrection = "none"  # weights for what sampler and trainer disagree about
    sampler_cap: float = 3.0  # ratio trainer / sampler above which it is truncated or masked

    def __post_init__(self):
        level_of(self.loss_type, self.ratio_level)
        check_choice("kl", self.kl, KlKind)
        check_choice("scale", self.scale, Scale)
        check_choice("sampler_correction", self.sampler_correction, SamplerCorrection)
        check_clip(self.clip_low, self.clip_high, self.delta)
        if self.delta is not None and self.loss_type == "cispo":
            raise ValueError(f"delta is {self.delta}, which cispo has no use for; leave it out.")
        if self.kl_ratio and self.kl == "k2":
            raise ValueError(
                "kl_ratio is true, but k2 has the gradient of the KL without it; set it to false, or kl to k3."
            )
        if not self.beta >= 0:
            raise ValueError(f"beta is {self.beta}; it must not be below 0.")
        if not self.sampler_cap >= 1:
            raise ValueError(f"sampler_cap is {self.sampler_cap}; it must be at least 1.")


@dataclass(frozen=True)
class Preset:
    """A method as a whole: the loss, the group and the optimizer (AdamW, which without weight decay is Adam)."""

    loss: GrpoLossConfig
    lr: float  # the same from first step to last, but for warm-up
    warmup_steps: int
    beta2: float
    group_size: int = 8
    temperature: float = 1.0
    weight_decay: float = 0.0


# The paper: ratio of whole responses, KL to the SFT policy with beta 0.02, Adam at 1e-6. Group size, clip range and
# temperature are not stated there; these are the usual ones.
PAPER = GrpoLossConfig(ratio_level="response")
# Token mean over the batch, wider upper clip range, reverse-KL gradient.
RECOMMENDED = GrpoLossConfig(loss_type="dapo", clip_high=0.28, kl_ratio=True)

PRESETS = {  # script/recipes/grpo.paper.yaml and grpo.yaml say the same
    "paper": Preset(PAPER, lr=1e-6, warmup_steps=0, beta2=0.999),
    "recommended": Preset(RECOMMENDED, lr=1e-5, warmup_steps=10, beta2=0.95),
}
