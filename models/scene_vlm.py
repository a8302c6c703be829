"""The assembled model: scene encoder, view selection, connector and Qwen2.5-VL behind one input assembler.

What is made of a scene before a question is asked is in scene_observer.py, what a question about it is to the language
model in scene_prompter.py, a saved model's files in model_files.py.

Shapes: B rows, L tokens, K proposals, M layout tokens, T tokens of a view, D language-model width.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import nn

from ..datasets.prompts import (
    DEFAULT_MODE,
    OBJECT_PLACEHOLDER,
    TASK_TEMPLATES,
    check_prompts,
    dialogue_question,
    prompt_record,
    task_named,
)
from ..datasets.readers import read_scene
from ..datasets.scene import Sample, Scene
from ..utils.text import named_boxes, parse_response, resolve_boxes
from ..utils.text_stream import TokenText
from .attention import PACKED
from .connector import Connector, build_connector
from .decoding import Decoder
from .inputs import ModelInputs, RowWriter
from .language_model import (
    LanguageModel,
    load_language_model,
    load_lora,
    merge_lora,
    save_language_model,
)
from .model_files import (
    FORMAT,
    lasting,
    load_connector,
    load_vision_tower,
    local_folder,
    part_of,
    read_description,
    save_connector,
    save_vision_tower,
)
from .observation import Answer, Observation, SceneSettings
from .scene_encoder import SceneEncoder
from .scene_prompter import ScenePrompter
from .view_pixels import PatchSettings
from .view_selector import ViewSelector
from .view_tokens import ViewFeatures, build_view_features, token_sizes

POLICY = "policy"
T = TypeVar("T")


def _tell(on_text: Callable[[str], object], piece: str) -> None:
    if piece:
        on_text(piece)


class SceneVLM(ScenePrompter):
    """A reasoning vision-language model for indoor scenes.

    Args:
        language: Qwen2.5-VL.
        language_source: where `language` comes from, for save_pretrained: a hub name or a local folder.
        scene_encoder: boxes, classes, features of a point cloud.
        connector: encoder output to language-model tokens.
        view_selector: chooses views by question; None where the model takes no views.
        settings: what is taken of a scene.
        view_features: frozen encoders of the views' further tokens; None where there are none.
    """

    def __init__(
        self,
        language: LanguageModel,
        language_source: str,
        scene_encoder: SceneEncoder,
        connector: Connector,
        view_selector: ViewSelector | None,
        settings: SceneSettings,
        view_features: ViewFeatures | None = None,
    ):
        super().__init__()
        if (view_selector is None) != (settings.view_source == "none"):
            raise ValueError("A view selector is needed exactly where view_source is not 'none'.")
        self.language = language
        self.language_source = language_source
        self.scene_encoder = scene_encoder
        self.connector = connector
        self.view_selector = view_selector
        self.settings = settings
        self.view_features = view_features
        self.decoder = Decoder(language)
        self.writer = RowWriter(language.tokenizer, merge_size=language.merge_size)
        self.name_of_host_V = None
        if connector.token_in_name:
            names = connector.place_embedding.num_embeddings
            self.name_of_host_V = self.writer.name_of_tokens(names, language.embedding.num_embeddings)
        self.register_buffer("name_of_V", self.name_of_host_V, persistent=False)
        self.patch_settings = PatchSettings.of(language.image_processor)
        self.train_vision_tower = False
        self.full_language_model = False  # whether save_pretrained writes the language model's own weights too
        self.own_vision_tower = False  # the same of its vision tower alone

    # -- what is trained -------------------------------------------------------------------------------------------

    def set_trainable(
        self,
        *,
        language: str,
        connector: bool,
        scene_encoder: bool,
        view_weights: bool = False,
        vision_tower: bool | None = None,
    ) -> None:
        """Choose what learns.

        Args:
            language: "lora" (the active adapter), "full", or "none".
            view_weights: the weights of the view selector's terms.
            vision_tower: the language model's own encoder of views; None: with a language model that learns in full.
        """
        if language not in ("lora", "full", "none"):
            raise ValueError(f"The language model trains as lora, full or none, not {language!r}.")
        if language == "lora" and not self.language.has_adapter:
            raise ValueError("There is no LoRA adapter to train; add one first.")
        vision_tower = language == "full" if vision_tower is None else vision_tower
        for name, parameter in self.language.named_parameters():
            trains = language == "full" or (language == "lora" and "lora_" in name and f".{POLICY}." in name)
            parameter.requires_grad_(vision_tower if part_of(f"language.{name}") == "vision_tower" else trains)
        self.connector.requires_grad_(connector)
        self.scene_encoder.requires_grad_(scene_encoder)
        self.train_scene_encoder = scene_encoder
        self.train_vision_tower = vision_tower
        self.own_vision_tower = self.own_vision_tower or vision_tower
        self.full_language_model = self.full_language_model or language == "full"
        if self.view_selector is not None:
            self.view_selector.train_weights(view_weights)

    @property
    def vision_tower(self) -> nn.Module:
        """Qwen's own encoder of views."""
        return self.language.base.model.visual

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters that learn, by name."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def forward(self, function: Callable[[], T]) -> T:
        """What a function of this model gives. Called as `model(function)`, it is one forward pass of all parts."""
        return function()

    def hidden(self, inputs: ModelInputs) -> torch.Tensor:
        """Last hidden states [B, L, D] of the text decoder."""
        return self.language.hidden(inputs)

    # -- asking ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def ask(
        self,
        scene: Scene | Observation | str | Path,
        question: str = "",
        *,
        task: str | None = None,
        situation: str = "",
        history: Sequence[tuple[str, str]] = (),
        max_new_tokens: int = 256,
        on_text: Callable[[str], object] | None = None,
    ) -> Answer:
        """Answer one question about a scene, greedily.

        Args:
            scene: a scene; a scan that `datasets.readers.read_scene` reads; or what `observe` made of a scene, which
                is then not looked at again for every question.
            question: may be left out where the task is `describe`.
            task: how the question is put and in which response mode (datasets/prompts.py); by default `qa`, or
                `dialogue` where there is a history.
            situation: where the asker stands and looks, for the task `situated`.
            history: questions and answers before this one, oldest first.
            on_text: called with the response piece by piece, as it is written; the pieces are whole characters.

        Raises:
            ValueError: an unknown task, a question that is empty, a task that asks about a box (see engine.predict),
                an unreadable scan.
        """
        task = task_named(task or ("dialogue" if history else "qa"))
        if TASK_TEMPLATES[task].count(OBJECT_PLACEHOLDER) or OBJECT_PLACEHOLDER in question:
            raise ValueError("A question about one object needs its box; ask it with engine.predict.infer.")
        if not question.strip() and "{question}" in TASK_TEMPLATES[task]:
            raise ValueError("The question is empty; say what you want to know about the scene.")
        if bool(situation.strip()) != (task == "situated_qa"):
            raise ValueError(f"A situation goes with the task situated, and with no other; the task is {task}.")
        if history and task != "dialogue":
            raise ValueError(f"Only a dialogue has a history, not the task {task}; leave one of them out.")
        if self.training or self.language.training:
            self.eval()
        if isinstance(scene, (str, Path)):
            scene = read_scene(scene)
        observation = scene if isinstance(scene, Observation) else self.observe(scene)
        self.encode([observation])
        if task == "dialogue":
            question = dialogue_question(history, question)
        scene_id = observation.scene.scene_id
        sample = Sample(f"{scene_id}-0", task, "own", scene_id, question, answer="", situation=situation)
        row, views = self.write_row(sample, observation, DEFAULT_MODE[task], None)
        inputs = self.embed_rows([row], [observation], [views], packed_length=0)
        with self.telling(on_text) as on_token:
            decoded = self.decoder(inputs, [len(row.token_ids)], max_new_tokens=max_new_tokens, on_token=on_token)
        return self.read_answer(self.language.decode(decoded.token_ids[0]), observation)

    @contextmanager
    def telling(self, on_text: Callable[[str], object] | None) -> Iterator[Callable[[int, int], None] | None]:
        """What a decoder may call as `on_token` for one completion, so that `on_text` hears of its text."""
        if on_text is None:
            yield None
            return
        text = TokenText(self.language.decode)
        yield lambda _, token: _tell(on_text, text.push(token))
        _tell(on_text, text.end())

    def read_answer(self, text: str, observation: Observation) -> "Answer":
        """A completion taken apart, its boxes resolved and moved to the world frame."""
        (encoded,) = self.encode([observation])
        response = parse_response(text)
        proposals = encoded.named.tolist()
        boxes, named = resolve_boxes(response.answer, proposals), named_boxes(text, proposals)
        found = [*boxes, *named.values()]
        world = observation.scene.to_world(np.asarray(found, dtype=np.float32)).tolist() if found else []
        named = dict(zip(named, world[len(boxes) :], strict=True))
        return Answer(text, response.think, response.answer, response.well_formed, world[: len(boxes)], named)

    # -- saving ----------------------------------------------------------------------------------------------------

    def saved_tensors(self) -> Iterator[torch.Tensor]:
        """What `save_pretrained` writes: neither a frozen base nor the encoders of views, which it only names."""
        whole: list[nn.Module] = [self.scene_encoder, self.connector]
        whole += [self.language] if self.full_language_model else [self.vision_tower] * self.own_vision_tower
        for module in whole:
            yield from module.parameters()
            yield from module.buffers()
        if self.view_selector is not None:
            yield from self.view_selector.parameters()
        yield from (value for name, value in self.language.named_parameters() if "lora_" in name)

    @property
    def saved_dtype(self) -> torch.dtype:
        """What `save_pretrained` writes a sharded language model in."""
        return self.language.dtype

    def save_pretrained(self, folder: str | Path) -> None:
        """Write everything that differs from the base language model, and the base itself where it was trained."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        description = {
            "format": FORMAT,
            "language_model": "language_model" if self.full_language_model else lasting(self.language_source),
            "language_width": self.language.width,
            "language_layers": self.language.num_layers,
            "dtype": str(self.language.dtype).removeprefix("torch."),
            "adapter": self.language.has_adapter,
            "vision_tower": self.own_vision_tower and not self.full_language_model,
            "connector": {
                "num_proposals": self.connector.num_proposals,
                "num_layout_tokens": self.connector.num_layout_tokens,
                "name_pool": self.connector.name_pool,
                "name_in_token": self.connector.name_in_token,
                "token_in_name": self.connector.token_in_name,
                "object_token": self.connector.object_token,
                "object_color": self.connector.object_color,
            },
            "settings": vars(self.settings),
            "views": self.view_selector.settings() if self.view_selector is not None else None,
            **prompt_record(),
        }
        if self.full_language_model:
            save_language_model(self.language, folder / "language_model")
        elif self.own_vision_tower:
            save_vision_tower(self.vision_tower, folder)
        if self.language.has_adapter:
            self.language.model.save_pretrained(folder / "adapter", selected_adapters=[POLICY])  # type: ignore[call-arg]
        self.scene_encoder.save_pretrained(folder / "scene_encoder")
        save_connector(self.connector, folder)
        (folder / "scene_vlm.json").write_text(json.dumps(description, indent=2), encoding="utf-8")

    def merge_adapter(self) -> None:
        """Add the adapter to the language model's weights, which `save_pretrained` then writes whole.

        ValueError where there is no adapter.
        """
        if not self.language.has_adapter:
            raise ValueError("This model has no adapter to merge: its language model is whole already.")
        merge_lora(self.language)
        self.full_language_model = True

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        language_model: str | None = None,
        dtype: str | None = None,
        attention: str = PACKED,
        device: str | torch.device = "cpu",
        trainable_adapter: bool = False,
        gradient_checkpointing: bool = False,
    ) -> "SceneVLM":
        """Load a model that `save_pretrained` wrote.

        Args:
            folder: that model; a checkpoint or a run, of which the newest checkpoint is taken; or a model's name on
                the hub, as `owner/name`, with `@revision` behind it if need be.
            language_model: where the base language model lies, if not where it did in training.
            trainable_adapter: load the adapter for further training.
            gradient_checkpointing: trade time for memory in training.

        Raises:
            ValueError: no such model, or its parts do not fit together.
        """
        folder = local_folder(folder)
        description = read_description(folder)
        check_prompts(folder, description)
        source = language_model or description["language_model"]
        if source == "language_model":
            source = str(folder / "language_model")
        language = load_language_model(
            source,
            dtype=dtype or description["dtype"],
            attention=attention,
            gradient_checkpointing=gradient_checkpointing,
        )
        found = (language.width, language.num_layers)
        expected = (description["language_width"], description["language_layers"])
        if found != expected:
            raise ValueError(
                f"The model in {folder} was trained on a language model of width {expected[0]} with {expected[1]} "
                f"blocks, but {source} has width {found[0]} and {found[1]} blocks; name the right base model."
            )
        if description["adapter"]:
            load_lora(language, POLICY, folder / "adapter" / POLICY, trainable=trainable_adapter)
        settings = SceneSettings(**description["settings"])
        scene_encoder = SceneEncoder.from_pretrained(folder / "scene_encoder")
        views = description["views"]
        view_selector = ViewSelector.from_settings(views) if views else None
        view_features = build_view_features(settings, view_selector)
        # a description without a key is from before there was such a thing: that model has none
        parts = {
            "name_pool": 0,
            "name_in_token": False,
            "token_in_name": False,
            "object_token": False,
            "object_color": False,
            **description["connector"],
            **token_sizes(view_features),
        }
        connector = build_connector(language, scene_encoder, **parts)
        load_connector(connector, folder)
        model = cls(
            language,
            source,
            scene_encoder,
            connector,
            view_selector,
            settings,
            view_features,
        )
        model.full_language_model = description["language_model"] == "language_model"
        if description.get("vision_tower"):
            load_vision_tower(model.vision_tower, folder)
            model.own_vision_tower = True
        return model.to(device).eval()
