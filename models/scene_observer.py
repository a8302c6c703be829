"""What is made of a scene before the language model sees it: sampled points, detected objects, chosen views.

A scene is observed once (points sampled, candidate views made) and encoded to proposals and layout tokens. While the
encoder is frozen its output is computed once for each scene.

Shapes: B scenes, K proposals, T encoder tokens, E encoder width, N points, F features, V views, k chosen views.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import nn

from ..datasets.multiview import MultiviewFeatures
from ..datasets.scene import Sample, Scene
from .named_proposals import NamedProposals
from .observation import EncodedScene, Observation, SceneSettings
from .scene_encoder import SceneEncoder, select_proposals
from .scene_encoder.inputs import point_features
from .scene_encoder.object_color import NUM_COLOR_CHANNELS, colors_in_boxes
from .view_cache import ViewCache
from .view_pool import ViewPool, build_view_pool
from .view_selector import Selection, ViewSelector

_UNNAMED = 64  # proposals that views are chosen by where the language model is told of none
_ENCODED_TOGETHER = 8  # scenes in one pass of the scene encoder


def view_question(sample: Sample) -> str:
    """What views are chosen for: the question as it was asked, behind its situation where it has one."""
    return f"{sample.situation} {sample.question}".strip()


class SceneObserver(nn.Module):
    """The scene's side of the model: it observes and encodes scenes and chooses their views.

    It makes no parts itself: SceneVLM does, all in one place, since their order is that of the optimiser's state.
    """

    scene_encoder: SceneEncoder
    view_selector: ViewSelector | None  # None where the model takes no views
    settings: SceneSettings
    multiview: MultiviewFeatures | None = None  # given after loading: the file is the data's, not the model's
    view_cache: ViewCache | None = None  # where views and their embeddings are kept on disk, set by the engine
    train_scene_encoder = False

    @property
    def device(self) -> torch.device:
        return next(self.scene_encoder.parameters()).device

    # -- scenes ----------------------------------------------------------------------------------------------------

    def observe(self, scene: Scene, seed: int = 0) -> Observation:
        """Sample a scene's points; the same seed gives the same sample."""
        settings = self.settings
        sampled = point_features(
            scene,
            settings.num_points,
            np.random.default_rng(seed),
            use_color=settings.use_color,
            use_height=settings.use_height,
            use_normal=settings.use_normal,
            multiview_dim=settings.multiview_dim,
            multiview=self.multiview,
        )
        return Observation(
            scene, torch.from_numpy(sampled.points_N3), torch.from_numpy(sampled.features_NF), seed=seed
        )

    def observe_again(self, observation: Observation, seed: int) -> Observation:
        """The same scene with freshly sampled points, not encoded yet; views and what was made of them are shared."""
        fresh = self.observe(observation.scene, seed)
        fresh.pool = self.view_pool(observation)
        fresh.pixels, fresh.image_tokens = observation.pixels, observation.image_tokens
        fresh.view_features = observation.view_features
        return fresh

    def encode(self, observations: Sequence[Observation]) -> list[EncodedScene]:
        """Encode the scenes that are not encoded yet, a few at a time."""
        todo = list({id(entry): entry for entry in observations if entry.encoded is None}.values())
        if todo:  # walking through its modules takes longer than writing a sample
            self.scene_encoder.train(self.train_scene_encoder and self.training)
        for start in range(0, len(todo), _ENCODED_TOGETHER):
            part = todo[start : start + _ENCODED_TOGETHER]
            with torch.set_grad_enabled(self.train_scene_encoder and torch.is_grad_enabled()):
                points_BN3 = torch.stack([observation.points_N3 for observation in part]).to(self.device)
                features_BNF = torch.stack([observation.features_NF for observation in part]).to(self.device)
                encoding = self.scene_encoder(points_BN3, features_BNF)
                chosen = select_proposals(
                    encoding, self.settings.num_proposals or _UNNAMED, left_to_right=self.settings.left_to_right
                )
                boxes, valid_BK = chosen.boxes_BK7.cpu().numpy(), chosen.valid_BK.cpu()
                for row, observation in enumerate(part):
                    boxes_K7, valid_n = chosen.boxes_BK7[row].clone(), torch.nonzero(valid_BK[row])[:, 0]
                    # clones, since a view of one row would keep the whole batch in memory
                    observation.encoded = EncodedScene(
                        features_KE=chosen.features_BKD[row].clone(),
                        boxes_K7=boxes_K7,
                        class_probs_KC=chosen.class_probs_BKC[row].clone(),
                        objectness_K=chosen.objectness_BK[row].clone(),
                        token_xyz_T3=encoding.token_xyz_BM3[row].clone(),
                        tokens_TE=encoding.tokens_BMD[row].clone(),
                        colors_K6=self._colors(boxes_K7, points_BN3[row], features_BNF[row]),
                        valid_n=valid_n,
                        # by an array: a tensor of one index would be read as a number
                        found=NamedProposals(boxes[row, valid_n.numpy()]),
                        are_named=self.settings.num_proposals > 0,
                    )
        return [observation.encoded for observation in observations if observation.encoded is not None]

    def _colors(self, boxes_K7: torch.Tensor, points_N3: torch.Tensor, features_NF: torch.Tensor) -> torch.Tensor:
        """Colours [K, 6] in boxes; zeros where the model is not given any."""
        if not self.settings.use_color:
            return boxes_K7.new_zeros(len(boxes_K7), NUM_COLOR_CHANNELS)
        return colors_in_boxes(boxes_K7, points_N3, features_NF[:, :3])

    # -- views -----------------------------------------------------------------------------------------------------

    def view_pool(self, observation: Observation) -> ViewPool:
        """The scene's candidate views, made once."""
        if observation.pool is None:
            self.give_pool(observation, self.pool_maker(observation)(device=self.device))
        assert observation.pool is not None
        return observation.pool

    def pool_maker(self, observation: Observation) -> Callable[..., ViewPool]:
        """What makes the scene's candidate views on a `device`; it pickles, so that another process may call it.

        Cameras look for what the encoder detected. While the encoder trains, its detections move; then the pool is
        made from the points alone, so that it is the same at every step and after a resume.
        """
        boxes_K7 = np.zeros((0, 7), dtype=np.float32)
        if not self.train_scene_encoder:
            boxes_K7 = observation.scene.to_world(self.encode([observation])[0].proposals)
        return partial(
            build_view_pool if self.view_cache is None else self.view_cache.pool,
            replace(observation.scene),  # without its normals, which are not sent
            source=self.settings.view_source,
            num_candidates=self.settings.num_candidates,
            image_size=(self.settings.view_size, self.settings.view_size),
            seed=observation.seed,
            boxes_K7=boxes_K7,
        )

    def give_pool(self, observation: Observation, pool: ViewPool) -> None:
        """Let a scene keep its candidate views, with their embeddings where those are on disk."""
        observation.pool = pool
        selector = self.view_selector
        if self.view_cache is not None and selector is not None and selector.encoder.has_images:
            self.view_cache.embed(observation.scene.scene_id, pool, selector.encoder, selector.encoder_name)

    def choose_views(self, sample: Sample, observation: Observation) -> list[int]:
        """Indices of the views selected for a sample in the scene's pool, best first.

        A question is put with its situation. A caption is asked of one object, so its views are those that show it.
        """
        if self.view_selector is None:
            return []
        if self.view_selector.learns:
            with torch.no_grad():
                return self._select(sample, observation).indices
        box_7, question = sample.query_box_7, view_question(sample)
        key = question if box_7 is None else f"{question} {np.round(box_7, 3).tolist()}"
        if key not in observation.choices:
            observation.choices[key] = self._select(sample, observation).indices
        return observation.choices[key]

    def view_gates(
        self, samples: Sequence[Sample], observations: Sequence[Observation], temperature: float
    ) -> list[torch.Tensor] | None:
        """Gates of each sample's chosen views, 1 in value, through which learned view weights get their gradient.

        None where the weights do not learn. `temperature` is that of the relaxed choice (Selection.gates).
        """
        if self.view_selector is None or not self.view_selector.learns:
            return None
        pairs = zip(samples, observations, strict=True)
        return [self._select(sample, observation).gates(temperature) for sample, observation in pairs]

    def _select(self, sample: Sample, observation: Observation) -> Selection:
        """The view selector's answer to a sample, with the weights as they are now."""
        assert self.view_selector is not None
        (encoded,) = self.encode([observation])
        pool, box_7 = self.view_pool(observation), sample.query_box_7
        if self.train_scene_encoder:
            pool = replace(pool, visible_VK=pool.visibility(observation.scene.to_world(encoded.proposals)))
        focus_V = None if box_7 is None else pool.visibility(box_7)[:, 0]
        return self.view_selector.select(view_question(sample), pool, encoded.host_probs_nC, focus_V)

    def expect(self, samples: Sequence[Sample]) -> None:
        """Tell the view selector which questions come next, so that it embeds them in one batch."""
        if self.view_selector is not None:
            self.view_selector.remember([view_question(sample) for sample in samples])
