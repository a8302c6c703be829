"""Qwen2.5-VL: loading, LoRA adapters by name, the vision tower as an image encoder.

Everything loads by transformers' own from_pretrained path, be it `Qwen/Qwen2.5-VL-7B-Instruct` or a small random model
written by models/tiny.py.
"""

import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub.errors import StrictDataclassError
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.image_processing_utils import BaseImageProcessor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from .attention import PACKED, Documents, use_packed_attention
from .fused_block import FusedBlocks
from .inputs import ModelInputs
from .view_pixels import Grid, tower_arguments

_FULL = "full_attention"  # the only kind of layer there is in Qwen2.5-VL: transformers keeps a mask for each kind
T = TypeVar("T")

# Its bars for loading weights would tear ours apart.
transformers_logging.disable_progress_bar()
# peft reads the old name on every model it wraps; nothing a user can act on.
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)

# The suffixes alone would also match the vision tower's MLPs.
_LORA_TARGETS = r".*\.language_model\.layers\.(?:{blocks})\.(?:self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj)"


class LanguageModel(nn.Module):
    """A Qwen2.5-VL with its tokenizer and image processor. `model` is wrapped by peft once it has an adapter."""

    model: Qwen2_5_VLForConditionalGeneration | PeftModel

    def __init__(
        self,
        model: Qwen2_5_VLForConditionalGeneration,
        tokenizer: PreTrainedTokenizerBase,
        image_processor: BaseImageProcessor,
    ):
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.compiled = False  # whether the decoder's blocks are
        self.fused: FusedBlocks | None = None
        self.sharded_from: torch.dtype | None = None  # the dtype from before engine/sharding.py cut the parameters

    @property
    def base(self) -> Qwen2_5_VLForConditionalGeneration:
        """The transformers model; adapters are injected into its layers."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model  # type: ignore[return-value]

    @property
    def text_config(self) -> Any:
        """Configuration of the text decoder; transformers types it too loosely to use."""
        return self.base.config.text_config

    @property
    def decoder(self) -> nn.Module:
        """The text decoder: inputs_embeds, position_ids [4, B, L] -> hidden states."""
        return self.base.model.language_model

    @property
    def width(self) -> int:
        """D, the width of the decoder."""
        return self.text_config.hidden_size

    @property
    def merge_size(self) -> int:
        """Side of the square of patches that become one image token."""
        vision_config: Any = self.base.config.vision_config
        return vision_config.spatial_merge_size

    @property
    def num_layers(self) -> int:
        """Number of blocks of the decoder."""
        return self.text_config.num_hidden_layers

    @property
    def eos_ids(self) -> list[int]:
        """Tokens that end a turn."""
        return [int(self.tokenizer.convert_tokens_to_ids(name)) for name in ("<|im_end|>", "<|endoftext|>")]  # type: ignore[arg-type]

    @property
    def pad_id(self) -> int:
        """Token that fills rows up."""
        return int(self.tokenizer.pad_token_id)  # type: ignore[arg-type]

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of a completion, special tokens left out."""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True))

    @property
    def has_adapter(self) -> bool:
        """Whether LoRA layers were injected."""
        return isinstance(self.model, PeftModel)

    @property
    def active_adapter(self) -> str | None:
        """Name of the adapter that is added to what the base gives."""
        return str(self.model.active_adapter) if isinstance(self.model, PeftModel) else None

    @property
    def attention_shape(self) -> tuple[int, int, int]:
        """Query heads, key and value heads, width of a head."""
        config = self.text_config
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return config.num_attention_heads, config.num_key_value_heads, width

    @property
    def head_weight_VD(self) -> torch.Tensor:
        """Weight of the LM head [V, D]."""
        return self.base.lm_head.weight

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in and is saved in; sharded parameters are float32 themselves."""
        return self.sharded_from or self.head_weight_VD.dtype

    def at_head(self, hidden_TD: torch.Tensor, function: Callable[[torch.Tensor, torch.Tensor], T]) -> T:
        """function(hidden_TD, weight of the LM head [V, D]), with the weight whole where it is sharded."""
        head: Any = self.base.lm_head
        return function(hidden_TD, head.weight) if self.sharded_from is None else head.at(hidden_TD, function)

    @property
    def embedding(self) -> nn.Embedding:
        """Token embedding of the decoder."""
        layer = self.base.get_input_embeddings()
        assert isinstance(layer, nn.Embedding)
        return layer

    def hidden(self, inputs: ModelInputs) -> torch.Tensor:
        """Last hidden states [B, L, D] of the text decoder."""
        attends = inputs.attends
        if attends is not None and self.fused is not None:
            return self.fused(inputs.inputs_embeds_BLD[0], inputs.position_ids_4BL[:, 0], attends)[None]
        packed: dict[str, Any] = {"attention_mask": inputs.attention_mask_BL}
        if attends is not None and self.attention == PACKED:
            # the kernel needs no mask; transformers would make one of [L, L] out of the positions
            told = attends.arguments() if isinstance(attends, Documents) else {"attends": attends}
            packed = {"attention_mask": {_FULL: None}, **told}
        elif attends is not None and not isinstance(attends, Documents):
            raise ValueError(f"Attention {self.attention} knows no shared prompts; set attention to {PACKED}.")
        return self.decoder(
            inputs_embeds=inputs.inputs_embeds_BLD,
            position_ids=inputs.position_ids_4BL,
            use_cache=False,
            **packed,
        ).last_hidden_state

    @property
    def attention(self) -> str:
        """How the text decoder attends: `packed` (models/attention.py), or one of transformers' names."""
        config: Any = self.decoder.config
        return str(config._attn_implementation)

    @contextmanager
    def attending_packed(self) -> Iterator[None]:
        """The text decoder takes packed rows in the block, whatever it attends by elsewhere: decoding needs it."""
        config: Any = self.decoder.config
        before = config._attn_implementation
        config._attn_implementation = PACKED
        try:
            yield
        finally:
            config._attn_implementation = before

    def compile_blocks(self, *, decoder: bool = True) -> None:
        """Compile each block of the vision tower, and of the decoder; blocks of one kind share one compiled graph."""
        vision_tower: Any = self.base.model.visual
        layers: Any = self.decoder.layers if decoder else ()
        for block in [*layers, *vision_tower.blocks]:
            if self.sharded_from is None:
                block.compile()
            else:  # what gathers and frees its parameters stays outside
                block.forward = torch.compile(block.forward)
        self.compiled = self.compiled or decoder

    def fuse_blocks(self) -> None:
        """From now on packed rows go through fused_block.py; the model must be on its device, its base frozen."""
        self.fused = FusedBlocks(self.decoder)

    def settled(self) -> AbstractContextManager[object]:
        """Fused blocks keep to the adapter that is active at the beginning of the block, for decoding."""
        return nullcontext() if self.fused is None else self.fused.settled()

    def uncompiled(self) -> AbstractContextManager[object]:
        """Run compiled blocks of the decoder as they are, for decoding, where shapes change with every few tokens."""
        return torch.compiler.set_stance("force_eager") if self.compiled else nullcontext()

    def embed_images(self, patches_PC: torch.Tensor, grids: Sequence[Grid]) -> torch.Tensor:
        """Merged vision-tower tokens [T, D] of all images, one after the other."""
        vision_tower: Any = self.base.model.visual
        outputs = vision_tower(
            patches_PC.to(self.dtype),
            grid_thw=None,
            **tower_arguments(grids, vision_tower, patches_PC.device),
        )
        return outputs.pooler_output


def load_language_model(
    name: str | Path, *, dtype: str = "bfloat16", attention: str = PACKED, gradient_checkpointing: bool = False
) -> LanguageModel:
    """Load a Qwen2.5-VL checkpoint from the hub or a local folder.

    Args:
        dtype: bfloat16, float16 or float32; auto is that of the checkpoint.
        attention: `packed` (models/attention.py), or one of transformers' own: sdpa, eager, ...

    Raises:
        ValueError: no such checkpoint, not a Qwen2.5-VL, or weights that are broken or not of its config's size.
    """
    precision = dtype if dtype == "auto" else getattr(torch, dtype, None)
    if precision != "auto" and not isinstance(precision, torch.dtype):
        raise ValueError(f"Unknown dtype {dtype!r} of the language model; choose bfloat16, float16 or float32.")
    if Path(name).is_absolute() and not Path(name).is_dir():
        raise ValueError(
            f"Cannot load the language model {str(name)!r}: there is no such folder; copy it there, or name another "
            "folder or a hub model."
        )
    try:
        config = AutoConfig.from_pretrained(str(name))
        if config.model_type != Qwen2_5_VLConfig.model_type:
            raise ValueError(f"it is a {config.model_type}, not a Qwen2.5-VL")
        with _quiet_report():
            loaded: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained(
                str(name),
                dtype=precision,
                attn_implementation="sdpa" if attention == PACKED else attention,
                ignore_mismatched_sizes=True,  # refused below, in one sentence
                output_loading_info=True,
            )
        model, report = loaded
        _check_complete(report)
        if Path(name).is_dir() and not any((Path(name) / file).exists() for file in ("tokenizer.json", "vocab.json")):
            raise ValueError("there is no tokenizer.json")  # transformers would make an empty one
        tokenizer = AutoTokenizer.from_pretrained(str(name))
        # The whole processor needs torchvision for its video half; images alone do not.
        image_processor = AutoImageProcessor.from_pretrained(str(name))
    except (OSError, ValueError, SafetensorError, StrictDataclassError) as error:
        reason = " ".join(str(error).split(". ")[0].split()).rstrip(".")
        raise ValueError(
            f"Cannot load the language model {str(name)!r} ({reason}); give a whole Qwen2.5-VL checkpoint, a local "
            "folder or a hub name."
        ) from None
    if attention == PACKED:
        use_packed_attention(model.model.language_model, model.model.visual)
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.generation_config.temperature = None
    return LanguageModel(model, tokenizer, image_processor)


@contextmanager
def _quiet_report() -> Iterator[None]:
    """Keep transformers' table of weights that do not fit off the screen: what it reports is checked instead."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def _check_complete(report: Any) -> None:
    """ValueError where transformers had to make up weights that the checkpoint lacks or holds in another size."""
    for key, found, wanted in sorted(report["mismatched_keys"]):
        raise ValueError(
            f"it is a checkpoint of another model size: {key} is {list(found)} in the weights and {list(wanted)} by "
            "its config.json"
        )
    if report["missing_keys"]:
        raise ValueError(f"its weights lack {min(report['missing_keys'])}")


def save_language_model(language: LanguageModel, folder: str | Path) -> None:
    """Write the whole model without its adapters, with tokenizer and image processor, as transformers does."""
    weights = {
        name.replace(".base_layer.", "."): value.contiguous()  # of fused blocks they are parts of larger ones
        for name, value in language.base.state_dict().items()
        if ".lora_" not in name
    }
    language.base.save_pretrained(folder, state_dict=weights)
    language.tokenizer.save_pretrained(folder)
    language.image_processor.save_pretrained(folder)


def lora_targets(num_layers: int, last_blocks: int = 0) -> str:
    """Regex of the adapted linear layers: attention and MLP of the language model's last blocks (0: of all)."""
    if not 0 <= last_blocks <= num_layers:
        raise ValueError(f"lora_last_blocks is {last_blocks}, but the model has {num_layers} blocks.")
    blocks = range(num_layers - last_blocks if last_blocks else 0, num_layers)
    return _LORA_TARGETS.format(blocks="|".join(str(block) for block in blocks))


def add_lora(language: LanguageModel, name: str, *, rank: int, alpha: int, last_blocks: int = 0) -> None:
    """Add a LoRA adapter (paper 1.2: no dropout) and make it the active, trainable one.

    It has the model's own precision: the optimizer keeps float32 masters, and in float32 its small products would take
    longer than the large ones.
    """
    language.fused = None  # it knows the layers as they were
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=0.0,
        target_modules=lora_targets(language.num_layers, last_blocks),
        bias="none",
    )
    if isinstance(language.model, PeftModel):
        language.model.add_adapter(name, config, autocast_adapter_dtype=False)
        language.model.set_adapter(name)
    else:
        language.model = get_peft_model(language.model, config, adapter_name=name, autocast_adapter_dtype=False)


def load_lora(language: LanguageModel, name: str, folder: str | Path, *, trainable: bool) -> None:
    """Load a saved adapter under a name."""
    language.fused = None  # it knows the layers as they were
    if isinstance(language.model, PeftModel):
        language.model.load_adapter(
            str(folder), adapter_name=name, is_trainable=trainable, autocast_adapter_dtype=False
        )
        language.model.set_adapter(name)
    else:
        language.model = PeftModel.from_pretrained(  # type: ignore[assignment]
            language.model, str(folder), adapter_name=name, is_trainable=trainable, autocast_adapter_dtype=False
        )


def merge_lora(language: LanguageModel) -> None:
    """Add the active adapter to the base weights and take it away.

    Summed in float32 and rounded once to the weights' precision: in bfloat16 that still loses updates below 1/256 of
    a weight, so to train on, or to answer exactly as in training, keep the adapter.
    """
    assert isinstance(language.model, PeftModel)
    language.fused = None  # it would add the adapter once more
    with torch.no_grad():
        for layer in language.model.modules():
            if isinstance(layer, LoraLayer):
                (name,) = layer.active_adapters
                base: Any = layer.get_base_layer()
                up: Any = layer.lora_B[name].weight
                down: Any = layer.lora_A[name].weight
                base.weight.copy_(base.weight.float() + layer.scaling[name] * (up.float() @ down.float()))
    language.model = language.model.unload()  # type: ignore[assignment]


def copy_lora(language: LanguageModel, source: str, target: str) -> None:
    """Add a frozen adapter `target` with the weights of `source`: the KL reference of GRPO.

    Disabling the adapter would give the base model instead of the SFT model.
    """
    assert isinstance(language.model, PeftModel)
    language.model.add_adapter(target, language.model.peft_config[source], autocast_adapter_dtype=False)
    parameters = dict(language.model.named_parameters())
    pattern = re.compile(rf"\.{re.escape(source)}(?=\.|$)")
    with torch.no_grad():
        for name, parameter in parameters.items():
            if "lora_" in name and pattern.search(name):
                parameters[pattern.sub(f".{target}", name)].copy_(parameter)
    language.model.set_adapter(source)


@contextmanager
def active_adapter(language: LanguageModel, name: str) -> Iterator[None]:
    """Run with another adapter, then return to the one before, trainable as it was."""
    assert isinstance(language.model, PeftModel)
    before = language.active_adapter
    assert before is not None
    trainable = {key for key, parameter in language.model.named_parameters() if parameter.requires_grad}
    language.model.set_adapter(name)
    try:
        yield
    finally:
        language.model.set_adapter(before)
        for key, parameter in language.model.named_parameters():
            parameter.requires_grad_(key in trainable)
