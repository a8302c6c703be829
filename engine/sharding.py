"""Full fine-tuning over several GPUs: every parameter of the language model cut into as many parts as there are ranks.

torch's fully_shard (FSDP2): a rank keeps its rows of each parameter in float32, with their gradient and AdamW's two
moments, 16 bytes a parameter over all ranks together. Before a block runs, its parameters are gathered in the model's
own precision; behind its backward pass, gradients are summed in float32 and each rank keeps its rows. They are sums,
not means: the optimizer divides by the tokens of all ranks. They are summed behind every pack: to wait for the last
pack, each rank would have to keep float32 gradients of the whole model, 33 GB at 7B, beside its part of everything.

Gathering is a collective, so that all ranks must run the same modules in the same order: the same number of packs
(engine/sft.py), each with a picture (SceneVLM.embed_rows). The model is called as `model(function)`, which is where
fully_shard sees a forward pass begin and end. Connector and scene encoder are small and stay whole; the optimizer sums
their gradients.
"""

from collections.abc import Iterator
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from ..models.language_model import LanguageModel
from ..models.scene_vlm import SceneVLM
from .config import LanguageConfig
from .runtime import Runtime


def shards(config: LanguageConfig, runtime: Runtime) -> bool:
    """Whether a run cuts its parameters (LanguageConfig.sharding); one process has nothing to cut them for."""
    wanted = config.sharding == "full" or (
        config.sharding == "auto" and config.train == "full" and runtime.device.type == "cuda"
    )
    return wanted and runtime.world_size > 1


def shard_model(model: SceneVLM, runtime: Runtime) -> None:
    """Cut the language model into float32 parts on the ranks' devices, block by block: no device holds it whole.

    The model must be in host memory, the same on every rank, with what learns chosen. A frozen vision tower stays
    whole: it sees each view once, and no two ranks see as many.
    """
    language, base = model.language, language_parts(model.language)
    language.sharded_from = dtype = language.dtype
    whole = [part for name, part in model.named_children() if name != "language"]
    cut_vision = any(parameter.requires_grad for parameter in base.vision.parameters())
    whole += [] if cut_vision else [base.vision]
    for part in whole:
        part.to(runtime.device)
    ignored = {parameter for part in whole for parameter in part.parameters()}
    mesh = init_device_mesh(runtime.device.type, (runtime.world_size,))
    # inputs come in the right precision already; the vision tower's rotary angles must stay float32
    policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)

    def cut(module: nn.Module) -> None:
        for parameter in module.parameters():
            if not (isinstance(parameter, DTensor) or parameter in ignored):
                parameter.data = parameter.data.float()
        fully_shard(module, mesh=mesh, mp_policy=policy, ignored_params=ignored, reshard_after_forward=True)

    base.head.at = MethodType(_at_head, base.head)
    # a tied weight belongs to the whole model, and stays gathered until the head has had it
    ends = [base.embedding, base.head] if base.head.weight is not base.embedding.weight else []
    vision = [*base.vision.blocks, base.vision] if cut_vision else []
    for module in [*vision, *base.decoder.layers, *ends, model]:
        cut(module)
    register_fsdp_forward_method(base.head, "at")
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    for module in ends:  # neither needs its weight to make gradients
        module.set_unshard_in_backward(False)


class LanguageParts(NamedTuple):
    """What a Qwen2.5-VL is made of."""

    vision: Any
    decoder: Any
    embedding: Any
    head: Any


def language_parts(language: LanguageModel) -> LanguageParts:
    """The parts of a language model that are cut one by one."""
    base = language.base
    return LanguageParts(base.model.visual, base.model.language_model, language.embedding, base.lm_head)


def _at_head(self: nn.Linear, hidden_TD: Tensor, function: Any) -> Any:
    return function(hidden_TD, self.weight)


def low_precision_names(model: SceneVLM) -> Iterator[str]:
    """Names of the sharded parameters that a saved model holds in less than float32."""
    if model.language.sharded_from not in (None, torch.float32):
        for name, parameter in model.named_parameters():
            if isinstance(parameter, DTensor):
                yield name
