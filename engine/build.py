"""Builds the assembled model from configuration objects; nothing below the engine knows them."""

from collections.abc import Iterable

from ..datasets.multiview import open_multiview
from ..datasets.scene import Sample
from ..models.connector import build_connector
from ..models.language_model import add_lora, load_language_model
from ..models.observation import SceneSettings
from ..models.scene_encoder.build import build_scene_encoder
from ..models.scene_vlm import POLICY, SceneVLM
from ..models.view_selector import ViewSelector
from ..models.view_tokens import build_view_features, token_sizes
from .config import DataConfig, ModelConfig, ViewsConfig
from .runtime import log

_MOST_JOINED = 512 * 2**20  # bytes of a decoder whose blocks are fused on a CPU


def build_view_selector(config: ViewsConfig) -> ViewSelector | None:
    """The configured selector; None where the model takes no views."""
    if config.source == "none":
        return None
    return ViewSelector.from_settings(
        {
            "encoder": config.encoder,
            "num_views": config.num_views,
            "w_text": config.w_text,
            "w_image": config.w_image,
            "w_clip": config.w_clip,
            "num_references": config.num_references,
            "redundancy": config.redundancy,
            "standardize": config.standardize,
            "choice": config.choice,
        }
    )


def build_model(config: ModelConfig, data: DataConfig) -> SceneVLM:
    """A model ready for SFT: pretrained parts where the configuration names them, a fresh adapter and connector."""
    language_config = config.language
    scene_encoder = build_scene_encoder(config.encoder)  # first: that it is missing is soon said
    language = load_language_model(
        language_config.model,
        dtype=language_config.dtype,
        attention=language_config.attention,
        gradient_checkpointing=language_config.gradient_checkpointing,
    )
    settings, view_selector = scene_settings(config, data), build_view_selector(config.views)
    view_features = build_view_features(settings, view_selector)
    connector = build_connector(
        language,
        scene_encoder,
        num_proposals=language_config.num_proposals,
        num_layout_tokens=language_config.num_layout_tokens,
        name_pool=language_config.name_pool,
        name_in_token=language_config.name_in_token,
        token_in_name=language_config.token_in_name,
        object_token=language_config.object_token,
        object_color=language_config.object_color,
        **token_sizes(view_features),
    )
    if language_config.train == "lora":
        add_lora(
            language,
            POLICY,
            rank=language_config.lora_rank,
            alpha=language_config.lora_alpha,
            last_blocks=language_config.lora_last_blocks,
        )
    return SceneVLM(
        language,
        language_config.model,
        scene_encoder,
        connector,
        view_selector,
        settings,
        view_features,
    )


def scene_settings(config: ModelConfig, data: DataConfig) -> SceneSettings:
    """What the configuration says the model takes of a scene."""
    return SceneSettings(
        num_points=data.num_points,
        use_color=config.encoder.use_color,
        use_height=config.encoder.use_height,
        use_normal=config.encoder.use_normal,
        multiview_dim=config.encoder.multiview_dim,
        num_proposals=config.language.num_proposals,
        left_to_right=config.language.left_to_right,
        view_source=config.views.source,
        num_candidates=config.views.num_candidates,
        view_size=config.views.image_size,
        view_image_tokens=config.views.image_encoder_tokens,
        view_image_encoder=config.views.token_encoder,
        view_depth_tokens=config.views.depth_tokens,
        view_depth_encoder=config.depth.encoder,
    )


def check_settings(model: SceneVLM, config: ModelConfig, data: DataConfig) -> None:
    """ValueError where a loaded model was made with other settings than the configuration asks for.

    They come with the weights; a configuration that says otherwise would be a lie beside them.
    """
    pairs = {
        name: (value, getattr(model.settings, name)) for name, value in vars(scene_settings(config, data)).items()
    }
    pairs["num_layout_tokens"] = (config.language.num_layout_tokens, model.connector.num_layout_tokens)
    for name in ("name_pool", "name_in_token", "token_in_name", "object_token", "object_color"):
        pairs[name] = (getattr(config.language, name), getattr(model.connector, name))
    if model.view_selector is not None:
        pairs["num_views"] = (config.views.num_views, model.view_selector.num_views)
        for name in ("num_references", "redundancy", "standardize", "choice"):
            pairs[name] = (getattr(config.views, name), getattr(model.view_selector, name))
        pairs["view encoder"] = (config.views.encoder, model.view_selector.encoder_name)
        if config.views.weights == "fixed":
            for name in ("w_text", "w_image"):
                pairs[f"view weight {name}"] = (
                    round(getattr(config.views, name), 4),
                    round(float(getattr(model.view_selector, name)), 4),
                )
    for name, (asked, found) in pairs.items():
        if asked != found:
            raise ValueError(
                f"The model to start from was made with {name} {found}, but the configuration says {asked}; "
                "give it the same settings, or build a new model."
            )


def give_multiview(model: SceneVLM, data: DataConfig, samples: Iterable[Sample]) -> None:
    """Open the file of multi-view features where the model takes them.

    ValueError: the data names no file, or one without the samples' scenes or of another width.
    """
    model.multiview = open_multiview(data.multiview, model.settings.multiview_dim)
    if model.multiview is not None:
        model.multiview.check(sorted({sample.scene_id for sample in samples}))


def speed_up(model: SceneVLM, blocks: str) -> None:
    """Let the language model's blocks run as the configuration says (SftConfig.blocks)."""
    on_gpu = model.device.type == "cuda"
    adapted = any("lora_" in name for name in model.trainable_parameters())
    sharded = model.language.sharded_from is not None  # waits for other GPUs more than for kernels
    if blocks == "auto":
        blocks = "plain" if sharded or not on_gpu else "fused" if adapted else "compiled"
    if blocks == "compiled" or (on_gpu and not sharded):
        model.language.compile_blocks(decoder=blocks == "compiled")
    if blocks == "fused":
        model.language.fuse_blocks()


def prepare_to_answer(model: SceneVLM) -> SceneVLM:
    """A loaded model that answers and does not learn: its blocks run fused, where its adapter can be.

    Not so large ones on a CPU: their products take nearly all of the time, and joined they would be a copy in memory
    of what is otherwise read from its file as it is needed.
    """
    model.requires_grad_(False)
    blocks = model.language.decoder.parameters()
    if model.device.type == "cpu" and sum(weight.nbytes for weight in blocks) > _MOST_JOINED:
        return model.eval()
    try:
        model.language.fuse_blocks()
    except ValueError as error:
        log.warning("answers come from transformers' own blocks, which are slower: %s", error)
    return model.eval()
