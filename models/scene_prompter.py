"""What a scene and a question are to the language model: rows of tokens, and what their places are filled with.

Proposals with their names, layout, the object asked for and chosen views become embeddings beside those of the text
(inputs.py puts them together).

Shapes: B rows, L tokens, K proposals, M layout tokens, T tokens of a view, D language-model width.
"""

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import nn

from ..datasets.scene import Sample
from .connector import Connector
from .inputs import Mentions, ModelInputs, Row, RowWriter, assemble
from .language_model import LanguageModel
from .observation import EncodedScene, Observation, asked_objects
from .prompt_writer import PromptWriter
from .relaxed_top_k import gated_rows
from .scene_observer import SceneObserver
from .view_pixels import Grid, PatchSettings, patchify, stack_images, to_device
from .view_tokens import ViewFeatures


class ScenePrompter(SceneObserver):
    """The prompt's side of the model. As its base, it makes no parts itself: SceneVLM does."""

    language: LanguageModel
    connector: Connector
    writer: RowWriter
    patch_settings: PatchSettings
    view_features: ViewFeatures | None  # frozen encoders of the views' further tokens
    train_vision_tower: bool
    name_of_V: torch.Tensor | None  # of each token which name it is (RowWriter.name_of_tokens), where names carry any
    name_of_host_V: torch.Tensor | None

    # -- scenes ----------------------------------------------------------------------------------------------------

    def scene_tokens(
        self,
        encoded: Sequence[EncodedScene],
        names: Sequence[Sequence[int] | None] | None = None,
        asked: Sequence[Sequence[float] | None] | None = None,
    ) -> tuple[torch.Tensor, Mentions | None]:
        """Language-model tokens [N, D] of scenes, one scene after the other: its n valid proposals where it names any,
        its layout, the object asked for where there is one; and what the names carry in a text, where they do.

        A batch is a few operations however many scenes it has: a GPU is told of each, and that takes longer than they.

        Args:
            names: of each scene the numbers that its proposals are called by; None: 0, 1, 2 …
            asked: of each scene the box of the object that is asked for, model frame; None: of none.
        """
        unique = list({id(scene): scene for scene in encoded}.values())
        layout_BMD = self.connector.layout(
            torch.stack([scene.token_xyz_T3 for scene in unique]), torch.stack([scene.tokens_TE for scene in unique])
        )
        row_of = {id(scene): row for row, scene in enumerate(unique)}
        unique_of = torch.tensor([row_of[id(scene)] for scene in encoded])
        objects_ND, mentions = self._object_tokens(encoded, unique, unique_of, names)
        counts = [len(scene.told) for scene in encoded]
        asking = {place: box for place, box in enumerate(asked or []) if box is not None}
        asked_AD = layout_BMD.new_zeros(0, layout_BMD.shape[2])
        if asking:
            queried = asked_objects(list(asking.values()), [encoded[place] for place in asking])
            asked_AD = self.connector.asked(queried)
        table_ND = torch.cat([objects_ND, layout_BMD.flatten(0, 1), asked_AD])
        size, places = layout_BMD.shape[1], torch.arange(len(encoded))
        at_N = torch.cat([
            torch.arange(len(objects_ND)),
            (len(objects_ND) + unique_of[:, None] * size + torch.arange(size)).flatten(),
            torch.arange(len(table_ND) - len(asked_AD), len(table_ND)),
        ])  # fmt: skip
        scene_N = torch.cat([
            places.repeat_interleave(torch.tensor(counts)),
            places.repeat_interleave(size),
            torch.tensor(list(asking), dtype=torch.int64),
        ])  # fmt: skip
        at_N = at_N[scene_N.argsort(stable=True)]
        return nn.functional.embedding(to_device(at_N, self.device), table_ND), mentions

    def _object_tokens(
        self,
        encoded: Sequence[EncodedScene],
        unique: Sequence[EncodedScene],
        unique_of: torch.Tensor,
        names: Sequence[Sequence[int] | None] | None,
    ) -> tuple[torch.Tensor, Mentions | None]:
        """Tokens [N, D] of the valid proposals of all scenes, each of which is a unique one; none without names."""
        if self.connector.num_proposals == 0:
            return unique[0].boxes_K7.new_zeros(0, self.language.width), None
        objects_BKD = self.connector.objects(
            torch.stack([scene.features_KE for scene in unique]),
            torch.stack([scene.boxes_K7 for scene in unique]),
            torch.stack([scene.class_probs_KC for scene in unique]),
            torch.stack([scene.colors_K6 for scene in unique]),
        )
        counts = [len(scene.valid_n) for scene in encoded]
        called = [
            number for row, its in enumerate(names or [None] * len(counts)) for number in its or range(counts[row])
        ]
        starts_N = (unique_of * objects_BKD.shape[1]).repeat_interleave(torch.tensor(counts))
        index_N = to_device(torch.cat([scene.valid_n for scene in encoded]) + starts_N, self.device)
        taken_ND = nn.functional.embedding(index_N, objects_BKD.flatten(0, 1))
        names_N = to_device(torch.tensor(called, dtype=torch.int64), self.device)
        words_PD, mentions = None, None
        if self.connector.name_in_token:
            words_PD = self.writer.embed_names(self.language.embedding, self.connector.place_embedding.num_embeddings)
        if self.connector.token_in_name:
            boxes_N7 = torch.cat([scene.boxes_K7 for scene in unique])[index_N]
            mentions = self._mentions(self.connector.carried(taken_ND, boxes_N7), names_N, counts)
        return self.connector.named(taken_ND, names_N, words_PD), mentions

    def _mentions(self, carried_ND: torch.Tensor, names_N: torch.Tensor, counts: Sequence[int]) -> Mentions:
        """What the names of so many proposals of each scene carry."""
        assert self.name_of_V is not None and self.name_of_host_V is not None
        size = self.connector.place_embedding.num_embeddings + 1
        firsts = torch.arange(len(counts)).mul(size).repeat_interleave(torch.tensor(counts))
        table = carried_ND.new_zeros(len(counts) * size, carried_ND.shape[1])
        table = table.index_copy(0, to_device(firsts, self.device) + names_N, carried_ND)
        return Mentions(table.unflatten(0, (-1, size)), self.name_of_V, self.name_of_host_V)

    # -- views -----------------------------------------------------------------------------------------------------

    @property
    def prompts(self) -> PromptWriter:
        """What writes a sample in words."""
        its = self.connector
        return PromptWriter(
            self.writer,
            name_pool=its.name_pool,
            object_token=its.object_token,
            num_layout_tokens=its.num_layout_tokens,
            num_view_image_tokens=its.num_view_image_tokens,
            num_view_depth_tokens=its.num_view_depth_tokens,
        )

    def view_grids(self, observation: Observation, views: Sequence[int]) -> list[Grid]:
        """Patches of each of these views."""
        return [self.view_grid(observation, view) for view in views]

    def view_grid(self, observation: Observation, index: int) -> Grid:
        """Patches (1, rows, columns) of one view."""
        assert observation.pool is not None
        height, width = observation.pool.images_VHW3.shape[1:3]
        return self.patch_settings.grid(height, width) or self._resized(observation, index)[1]

    def _resized(self, observation: Observation, index: int) -> tuple[torch.Tensor, Grid]:
        """Patches and grid of a view of a size that Qwen's image processor changes."""
        if index not in observation.pixels:
            assert observation.pool is not None
            made = self.language.image_processor(images=[observation.pool.images_VHW3[index]], return_tensors="pt")
            grid = made["image_grid_thw"][0].tolist()
            observation.pixels[index] = (made["pixel_values"], (grid[0], grid[1], grid[2]))
        return observation.pixels[index]

    def view_patches(self, shown: Sequence[tuple[Observation, int]]) -> torch.Tensor:
        """Patches [P, C] of all views, one after the other, on the model's device."""
        images = []
        for observation, view in shown:
            assert observation.pool is not None
            images.append(observation.pool.images_VHW3[view])
        parts = []
        for shape, group in groupby(zip(shown, images, strict=True), key=lambda entry: entry[1].shape):
            entries = list(group)
            if self.patch_settings.grid(*shape[:2]):
                stacked = stack_images([image for _, image in entries], self.device)
                parts.append(patchify(stacked, self.patch_settings))
            else:
                parts += [self._resized(*entry)[0].to(self.device) for entry, _ in entries]
        return torch.cat(parts)

    def embed_views(self, shown: Sequence[tuple[Observation, int]]) -> list[torch.Tensor]:
        """Vision-tower tokens [T, D] of each view; a frozen tower sees each view once."""
        if not shown:
            return []
        if self.train_vision_tower:
            return self._look(shown)
        new = list({(id(seen), view): (seen, view) for seen, view in shown if view not in seen.image_tokens}.values())
        if new:
            with torch.no_grad():
                for (observation, view), tokens in zip(new, self._look(new), strict=True):
                    observation.image_tokens[view] = tokens.clone()  # a part would keep the whole batch in memory
        return [observation.image_tokens[view] for observation, view in shown]

    def _look(self, shown: Sequence[tuple[Observation, int]]) -> list[torch.Tensor]:
        """Tokens of each view from the vision tower, in one batch."""
        grids = [self.view_grid(observation, view) for observation, view in shown]
        tokens_TD = self.language.embed_images(self.view_patches(shown), grids)
        return list(tokens_TD.split([grid[1] * grid[2] // self.language.merge_size**2 for grid in grids]))

    def describe_views(
        self, shown: Sequence[tuple[Observation, int]]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Tokens [n, D] of each view from the image encoder and from its depth; none where the model takes none."""
        images: list[torch.Tensor] = []
        depths: list[torch.Tensor] = []
        if self.view_features is not None and shown:
            if self.connector.num_view_image_tokens:
                images = list(self.connector.view_images(self.view_features.images(shown, self.device)))
            if self.connector.num_view_depth_tokens:
                depths = list(self.connector.view_depths(self.view_features.depths(shown, self.device)))
        return images, depths

    # -- inputs ----------------------------------------------------------------------------------------------------

    def write_row(
        self,
        sample: Sample,
        observation: Observation,
        mode: str,
        target: str | None,
        names: Sequence[int] | None = None,
    ) -> tuple[Row, list[int]]:
        """Tokens of one sample and the views that go with it (`PromptWriter.write`)."""
        (encoded,) = self.encode([observation])
        views = self.choose_views(sample, observation)
        asked_7, grids = self.asked_box(sample, observation), self.view_grids(observation, views)
        row = self.prompts.write(sample, encoded.told, mode, target, names, asked_7=asked_7, grids=grids)
        return row, views

    def asked_box(self, sample: Sample, observation: Observation) -> list[float] | None:
        """The box that a sample asks about, model frame; None without one."""
        return None if sample.query_box_7 is None else observation.scene.to_model(sample.query_box_7).tolist()

    def embed_rows(
        self,
        rows: Sequence[Row],
        observations: Sequence[Observation],
        views: Sequence[Sequence[int]],
        *,
        gates: Sequence[torch.Tensor] | None = None,
        packed_length: int | None = None,
        completions: Sequence[Sequence[Sequence[int]]] | None = None,
    ) -> ModelInputs:
        """Embed written rows with their scenes' tokens and views, these gated where `view_gates` gave gates.

        `packed_length` and `completions` are as in inputs.assemble.
        """
        encoded = self.encode(observations)
        tokens_ND, mentions = self.scene_tokens(
            encoded, [row.names for row in rows], [row.asked_box_7 for row in rows]
        )
        shown = [
            (observation, view) for observation, chosen in zip(observations, views, strict=True) for view in chosen
        ]
        nothing = None
        if self.language.sharded_from is not None and self.train_vision_tower and not shown:
            # the tower is sharded, and on other ranks it may have views to see; it comes first there too
            nothing = self._look_at_nothing()
        image_tokens, view_image_tokens, view_depth_tokens = (
            gated_rows(tokens, gates) for tokens in (self.embed_views(shown), *self.describe_views(shown))
        )
        inputs = assemble(
            rows,
            embed_tokens=self.language.embedding,
            scene_tokens=tokens_ND,
            image_tokens=image_tokens,
            view_image_tokens=view_image_tokens,
            view_depth_tokens=view_depth_tokens,
            mentions=mentions,
            pad_id=self.language.pad_id,
            packed_length=packed_length,
            completions=completions,
            merge_size=self.language.merge_size,
        )
        if nothing is not None:
            inputs.inputs_embeds_BLD = inputs.inputs_embeds_BLD + 0 * nothing.sum()
        return inputs

    def _look_at_nothing(self) -> torch.Tensor:
        """The token of a black picture of one token."""
        side, settings = self.language.merge_size, self.patch_settings
        size = side * settings.patch
        black_VHW3 = torch.zeros(1, size, size, 3, dtype=torch.uint8, device=self.device)
        return self.language.embed_images(patchify(black_VHW3, settings), [(1, side, side)])
