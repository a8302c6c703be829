"""The one input assembler: rows of text, views and scene tokens -> inputs_embeds, labels, [4, B, L] positions.

SFT, rollouts, log-probabilities and evaluation all go through here, so they cannot disagree about what the model sees.

Rows are packed one after the other, so B is 1, each row is a document that attends to itself alone, and no arithmetic
goes into padding; or they are padded to one length, as other libraries take them. In a pack a row may have
continuations, the completions of a prompt: these stand behind all rows, and each goes on from its own.

Shapes: B rows, L tokens of the longest row (packed: of all rows), D width of the language model, I images,
K proposals, M layout tokens, T taught tokens.
M-RoPE rule: text and scene tokens advance all three axes by one; an image spans a (1, h, w) grid of merged patches
that starts at the next free position, and the text after it continues behind the grid's largest coordinate, exactly as
Qwen2.5-VL's own get_rope_index. Tokens that an image encoder or the depth add to a view stand behind its image and
advance all three axes by one, as text does: they are few, and their place in the view is in the token.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ..utils.text import format_name
from .attention import Attends, Documents, Groups
from .view_pixels import to_device

IGNORE = -100
TEXT, IMAGE, SCENE, VIEW_IMAGE, VIEW_DEPTH = 0, 1, 2, 3, 4
# An existing token that Qwen2.5-VL never uses, so no row is added to the frozen vocabulary.
SCENE_PLACEHOLDER = "<|vision_pad|>"


@dataclass
class Row:
    """One sample as tokens. `kinds` says what stands at each: text, a patch, a scene token, a view's token."""

    token_ids: list[int]
    kinds: list[int]
    labels: list[int]
    grids: list[tuple[int, int, int]]  # (1, h, w) patches of each image, before merging
    names: tuple[int, ...] | None = None  # that its proposals are called by; None: 0, 1, 2 …
    asked_box_7: tuple[float, ...] | None = None  # model frame; set where the row has a token for the object asked for

    @property
    def num_scene_tokens(self) -> int:
        return sum(kind == SCENE for kind in self.kinds)

    @property
    def num_taught(self) -> int:
        return len(self.labels) - self.labels.count(IGNORE)


def continuation(token_ids: Sequence[int]) -> Row:
    """A text that goes on from a row, taught in full."""
    return Row(list(token_ids), [TEXT] * len(token_ids), list(token_ids), [])


@dataclass
class Mentions:
    """What names carry wherever a text says them: something of the proposals that they stand for.

    So does the token behind a name, unless it is a name itself: what is said of a thing begins there.
    P counts the names that there may be, and behind them one that stands for every other token and carries nothing.
    """

    carried_BPD: Tensor  # zeros where a row has no proposal of that name
    name_of_V: Tensor  # the name that a token of the vocabulary is, int64; P - 1 for those that are none
    name_of_host_V: Tensor  # the same on the host, where rows are laid out

    @property
    def none(self) -> int:
        """What stands for all tokens that are no name."""
        return self.carried_BPD.shape[1] - 1


@dataclass
class ModelInputs:
    """A batch, padded or packed, ready for the text decoder."""

    inputs_embeds_BLD: Tensor
    attention_mask_BL: Tensor | None  # None where packed
    position_ids_4BL: Tensor
    # what is taught: the token at `targets_T[t]` by the hidden state at `predicting_T[t]`, counted over [B * L]
    predicting_T: Tensor
    targets_T: Tensor
    attends: Attends | None = None  # where packed
    mentions: Mentions | None = None  # for the names in what will be said, where names carry something


class RowWriter:
    """Writes rows in Qwen's chat format.

    Args:
        tokenizer: the language model's.
        merge_size: side of the square of patches that the vision tower merges into one token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, merge_size: int = 2):
        self.tokenizer = tokenizer
        self.merge_size = merge_size
        self._kept: dict[str, list[int]] = {}
        self.im_start = self._token("<|im_start|>")
        self.im_end = self._token("<|im_end|>")
        self.vision_start = self._token("<|vision_start|>")
        self.vision_end = self._token("<|vision_end|>")
        self.image_pad = self._token("<|image_pad|>")
        self.scene_pad = self._token(SCENE_PLACEHOLDER)

    def _token(self, name: str) -> int:
        index = self.tokenizer.convert_tokens_to_ids(name)
        if not isinstance(index, int) or index == self.tokenizer.unk_token_id:
            raise ValueError(f"The tokenizer lacks {name}; 3D-R1 needs a Qwen2.5-VL tokenizer.")
        return index

    def _text(self, text: str) -> list[int]:
        # Pasted text must not smuggle in control tokens, hence encode_special_tokens: they are read as plain text. The
        # tokenizer's own call would say the same, and take three times as long for its checks.
        backend: Any = self.tokenizer.backend_tokenizer
        if not backend.encode_special_tokens:  # to set it, nobody else may be reading: another thread may be decoding
            backend.encode_special_tokens = True
        return backend.encode(text, add_special_tokens=False).ids

    def _fixed(self, text: str) -> list[int]:
        """Tokens of text that stands in every row."""
        if text not in self._kept:
            self._kept[text] = self._text(text)
        return self._kept[text]

    def embed_names(self, embed_tokens: torch.nn.Module, count: int) -> Tensor:
        """The mean embedding [count, D] of the tokens of each of the first names."""
        ids = [self._fixed(format_name(name)) for name in range(count)]
        flat = torch.tensor([token for its in ids for token in its])
        of = torch.arange(count).repeat_interleave(torch.tensor([len(its) for its in ids]))
        device = next(embed_tokens.parameters()).device
        embedded_TD = embed_tokens(to_device(flat, device))
        share_PT = torch.nn.functional.one_hot(of, count).T.float()
        share_PT = to_device(share_PT / share_PT.sum(1, keepdim=True), device)
        return share_PT.to(embedded_TD.dtype) @ embedded_TD

    def name_of_tokens(self, count: int, vocabulary: int) -> Tensor:
        """Which of the first names each token of a vocabulary is, int64 [V]; `count` for those that are none.

        ValueError where a name is several tokens: in the middle of one nobody knows yet what it stands for.
        """
        ids = [self._fixed(format_name(name)) for name in range(count)]
        for name, its in enumerate(ids):
            if len(its) > 1:
                raise ValueError(
                    f"model.language.token_in_name takes names of one token each, and {format_name(name)} is "
                    f"{len(its)}; set it to false, or take a language model whose tokenizer has the first {count} "
                    "names (python main.py names)."
                )
        name_of_V = torch.full((vocabulary,), count)
        name_of_V[torch.tensor([token for (token,) in ids])] = torch.arange(count)
        return name_of_V

    def write(
        self,
        *,
        system: str,
        question: str,
        num_proposals: int,
        num_layout_tokens: int,
        grids: Sequence[tuple[int, int, int]] = (),
        num_view_image_tokens: int = 0,
        num_view_depth_tokens: int = 0,
        target: str | None = None,
        names: Sequence[int] | None = None,
        asked_box_7: Sequence[float] | None = None,
        after_object: str = "",
    ) -> Row:
        """One row: system, views, named proposals, layout, question, and the target where one is taught.

        Scene tokens stand in the order proposals 0..K-1, then layout tokens, then that of the object asked for.

        Args:
            num_view_image_tokens, num_view_depth_tokens: behind the image of each view, in this order.
            names: numbers that the proposals are called by; None: 0, 1, 2 …
            asked_box_7: box of the object asked for, model frame. Its token stands behind `question`, whose rest is
                `after_object`. None without such a token.
        """
        ids: list[int] = []
        kinds: list[int] = []

        def put(tokens: list[int], kind: int = TEXT) -> None:
            ids.extend(tokens)
            kinds.extend([kind] * len(tokens))

        put([self.im_start, *self._fixed(f"system\n{system}"), self.im_end, *self._fixed("\n")])
        put([self.im_start, *self._fixed("user\n")])
        if grids:
            put(self._fixed("Views: "))
            for _, height, width in grids:
                put([self.vision_start])
                put([self.image_pad] * (height * width // self.merge_size**2), IMAGE)
                put([self.vision_end])
                put([self.scene_pad] * num_view_image_tokens, VIEW_IMAGE)
                put([self.scene_pad] * num_view_depth_tokens, VIEW_DEPTH)
            put(self._fixed("\n"))
        if num_proposals:
            put(self._fixed("Objects: "))
            for name in range(num_proposals) if names is None else names:
                called = self._fixed(format_name(name))
                ids += called
                ids.append(self.scene_pad)
                kinds += [TEXT] * len(called)
                kinds.append(SCENE)
            put(self._fixed("\n"))
        if num_layout_tokens:
            put(self._fixed("Layout: "))
            put([self.scene_pad] * num_layout_tokens, SCENE)
            put(self._fixed("\n"))
        put(self._text(question))
        if asked_box_7 is not None:
            put([self.scene_pad], SCENE)
            put(self._text(after_object))
        put([self.im_end, *self._fixed("\n")])
        put([self.im_start, *self._fixed("assistant\n")])
        labels = [IGNORE] * len(ids)
        if target is not None:
            answer = [*self._text(target), self.im_end]
            put(answer)
            labels += answer
        return Row(
            ids,
            kinds,
            labels,
            list(grids),
            names=None if names is None else tuple(names),
            asked_box_7=None if asked_box_7 is None else tuple(map(float, asked_box_7)),
        )


def mrope_positions(kinds: Sequence[int], grids: Sequence[tuple[int, int, int]], merge_size: int = 2) -> Tensor:
    """M-RoPE positions [3, L] (temporal, height, width) of one row.

    Raises:
        ValueError: two images touch, or tokens and grids disagree.
    """
    if not grids and IMAGE not in kinds:
        return torch.arange(len(kinds)).expand(3, -1)
    chunks: list[Tensor] = []
    position, start, images = 0, 0, iter(grids)
    while start < len(kinds):
        end = start
        is_image = kinds[start] == IMAGE
        while end < len(kinds) and (kinds[end] == IMAGE) == is_image:
            end += 1
        length = end - start
        if is_image:
            _, height, width = next(images, (0, 0, 0))
            height, width = height // merge_size, width // merge_size
            if height * width != length:
                raise ValueError(f"{length} image tokens in a run, but the view's grid has {height} x {width}.")
            rows = torch.arange(height).repeat_interleave(width)
            columns = torch.arange(width).repeat(height)
            chunks.append(torch.stack([torch.zeros_like(rows), rows, columns]) + position)
            position += max(height, width)
        else:
            chunks.append(torch.arange(position, position + length).expand(3, length))
            position += length
        start = end
    return torch.cat(chunks, dim=1) if chunks else torch.zeros(3, 0, dtype=torch.long)


@dataclass
class Layout:
    """Rows as tensors, on the host: where each row's tokens stand, and their positions (text row first)."""

    token_ids_BL: Tensor
    kinds_BL: Tensor
    labels_BL: Tensor
    attention_mask_BL: Tensor
    position_ids_4BL: Tensor
    row_BL: Tensor  # the row that a token is of, counted from 0; -1: none


def _lay_out(
    rows: Sequence[Row], starts: Sequence[tuple[int, int]], shape: tuple[int, int], pad_id: int, merge_size: int
) -> Layout:
    """Each row's tokens at (row, column) of a batch of padding; in a batch of one row, one after the other."""
    # all rows at once, T tokens
    lengths = torch.tensor([len(row.token_ids) for row in rows])
    ends = lengths.cumsum(0)
    within_T = torch.arange(int(ends[-1])) - (ends - lengths).repeat_interleave(lengths)
    positions_4T = within_T.repeat(4, 1)
    for row, end, length in zip(rows, ends.tolist(), lengths.tolist(), strict=True):
        if row.grids or IMAGE in row.kinds:
            positions_4T[1:, end - length : end] = mrope_positions(row.kinds, row.grids, merge_size)

    size = shape[0] * shape[1]
    where_T = None  # all from the first place on
    if shape[0] > 1:
        firsts = torch.tensor([index * shape[1] + start for index, start in starts])
        where_T = firsts.repeat_interleave(lengths) + within_T

    def placed(values: Tensor, filling: int) -> Tensor:
        """Values [..., T] at their places [..., B, L]."""
        if where_T is None:
            cells = torch.nn.functional.pad(values, (0, size - values.shape[-1]), value=filling)
        else:
            cells = torch.full((*values.shape[:-1], size), filling)
            cells[..., where_T] = values
        return cells.unflatten(-1, shape)

    ids_T, kinds_T, labels_T = (
        # torch.tensor of a list takes seven times as long
        torch.from_numpy(np.fromiter(chain.from_iterable(its), dtype=np.int64, count=len(within_T)))
        for its in ((row.token_ids for row in rows), (row.kinds for row in rows), (row.labels for row in rows))
    )
    return Layout(
        token_ids_BL=placed(ids_T, pad_id),
        kinds_BL=placed(kinds_T, TEXT),
        labels_BL=placed(labels_T, IGNORE),
        attention_mask_BL=placed(torch.ones_like(within_T), 0),
        position_ids_4BL=placed(positions_4T, 0),
        row_BL=placed(torch.arange(len(rows)).repeat_interleave(lengths), -1),
    )


def pad_rows(rows: Sequence[Row], pad_id: int, *, merge_size: int = 2) -> Layout:
    """Rows [B, L] filled up to the longest."""
    longest = max(len(row.token_ids) for row in rows)
    starts = [(index, 0) for index in range(len(rows))]
    return _lay_out(rows, starts, (len(rows), longest), pad_id, merge_size)


def pack_rows(rows: Sequence[Row], pad_id: int, *, length: int = 0, merge_size: int = 2) -> tuple[Layout, list[int]]:
    """Rows one after the other in one row [1, L], and the lengths of its documents.

    Args:
        length: pad up to so many tokens; the padding is a document of its own. 0: none.
    """
    lengths = [len(row.token_ids) for row in rows]
    starts = [0, *accumulate(lengths)]
    end = starts.pop()
    padding = max(0, length - end)
    layout = _lay_out(rows, [(0, start) for start in starts], (1, end + padding), pad_id, merge_size)
    if padding:
        layout.position_ids_4BL[:, 0, end:] = torch.arange(padding)
        lengths.append(padding)
    return layout, lengths


def move_behind(layout: Layout, prompts: Sequence[int], completions: Sequence[int], after: Sequence[int]) -> Tensor:
    """Let packed completions go on from their prompts, in positions, and in what their first tokens are predicted by.

    Args:
        layout: of a pack of prompts, then completions; its positions are changed.
        prompts, completions: their lengths.
        after: the prompt of each completion.

    Returns:
        for each token of the pack the one that predicts it, [L].
    """
    before_L = torch.arange(layout.token_ids_BL.shape[1]) - 1
    positions_4L = layout.position_ids_4BL[:, 0]
    begin, end = sum(prompts), sum(prompts) + sum(completions)
    # where a text behind each prompt begins: its own position, and the three that images share
    of_prompts = positions_4L[:, :begin].split(list(prompts), dim=1)
    next_P2 = torch.tensor([[int(part_4P[0].max()), int(part_4P[1:].max())] for part_4P in of_prompts]) + 1
    lengths, its_prompt = (torch.tensor(numbers, dtype=torch.int64) for numbers in (completions, after))
    text_T, images_T = next_P2[its_prompt].repeat_interleave(lengths, dim=0).unbind(1)
    positions_4L[0, begin:end] += text_T
    positions_4L[1:, begin:end] += images_T
    starts, last_P = begin + lengths.cumsum(0) - lengths, torch.tensor(prompts).cumsum(0) - 1
    some = lengths > 0
    before_L[starts[some]] = last_P[its_prompt[some]]
    return before_L


def assemble(
    rows: Sequence[Row],
    *,
    embed_tokens: torch.nn.Module,
    scene_tokens: Tensor | None,
    image_tokens: Tensor | None,
    view_image_tokens: Tensor | None = None,
    view_depth_tokens: Tensor | None = None,
    mentions: Mentions | None = None,
    pad_id: int,
    packed_length: int | None = None,
    completions: Sequence[Sequence[Sequence[int]]] | None = None,
    merge_size: int = 2,
) -> ModelInputs:
    """Embed rows and put scene, image and view features at their placeholders.

    What stands where is worked out on the host, so that a GPU is never waited for. Of a pack with completions all
    tokens of these are taught, and what the rows themselves teach is not.

    Args:
        embed_tokens: token embedding of the language model.
        scene_tokens: those of all rows one after the other [n, D], in the order of their placeholders; None without.
        image_tokens: vision-tower tokens of all rows' images one after the other [n, D]; None without images.
        view_image_tokens, view_depth_tokens: the image encoder's and the depth's tokens of the same images, likewise.
        mentions: what names carry, added to their embeddings wherever they stand; None where they carry nothing.
        packed_length: pack the rows, into so many tokens at least (0: as many as they have). None pads them.
        completions: of a pack: for each row the token ids of the texts that go on from it.
    """
    device = next(embed_tokens.parameters()).device
    attends: Attends | None = None
    before_L = None
    prompt_of = list(range(len(rows)))  # of each row that is laid out
    if packed_length is None:
        layout = pad_rows(rows, pad_id, merge_size=merge_size)
    elif completions is None:
        layout, lengths = pack_rows(rows, pad_id, length=packed_length, merge_size=merge_size)
        attends = Documents.of(lengths, device)
    else:
        texts = [continuation(ids) for its in completions for ids in its]
        after = [prompt for prompt, its in enumerate(completions) for _ in its]
        untaught = [replace(row, labels=[IGNORE] * len(row.labels)) for row in rows]
        layout, lengths = pack_rows([*untaught, *texts], pad_id, length=packed_length, merge_size=merge_size)
        prompts, behind = lengths[: len(rows)], lengths[len(rows) :]
        before_L = move_behind(layout, prompts, behind[: len(texts)], after)
        attends = Groups.of(prompts, behind, [*after, *[-1] * (len(behind) - len(texts))], device)
        prompt_of += after
    embeds_BLD = embed_tokens(to_device(layout.token_ids_BL, device))
    flat_ND = embeds_BLD.flatten(0, 1)
    if mentions is not None:
        flat_ND = _with_mentions(flat_ND, layout, prompt_of, mentions)
    for kind, features in (
        (SCENE, scene_tokens),
        (IMAGE, image_tokens),
        (VIEW_IMAGE, view_image_tokens),
        (VIEW_DEPTH, view_depth_tokens),
    ):
        (here,) = torch.nonzero(layout.kinds_BL.flatten() == kind, as_tuple=True)
        given = 0 if features is None else len(features)
        if len(here) != given:
            raise ValueError(f"{len(here)} placeholders of kind {kind}, but {given} features were given.")
        if features is not None and given:
            flat_ND = flat_ND.index_copy(0, to_device(here, device), features.to(flat_ND.dtype))
    # a row begins with what is not taught, so no document teaches the one before it
    taught_BL = layout.labels_BL != IGNORE
    (targets_at,) = torch.nonzero(taught_BL.flatten(), as_tuple=True)
    return ModelInputs(
        flat_ND.view_as(embeds_BLD),
        None if attends else to_device(layout.attention_mask_BL, device),
        to_device(layout.position_ids_4BL, device),
        to_device(targets_at - 1 if before_L is None else before_L[targets_at], device),
        to_device(layout.labels_BL.flatten()[targets_at], device),
        attends,
        mentions,
    )


def _with_mentions(flat_ND: Tensor, layout: Layout, prompt_of: Sequence[int], mentions: Mentions) -> Tensor:
    """Embeddings with what names carry; `prompt_of` says of each laid-out row whose names it uses."""
    none, row_N = mentions.none, layout.row_BL.flatten()
    said_N = torch.where(row_N < 0, none, mentions.name_of_host_V[layout.token_ids_BL.flatten()])
    before_N = torch.full_like(said_N, none)
    before_N[1:] = torch.where(row_N[1:] == row_N[:-1], said_N[:-1], none)
    name_N = torch.where(said_N < none, said_N, before_N)
    (here,) = torch.nonzero(name_N < none, as_tuple=True)
    # one index, for the gradient of a table is soon summed then
    index = torch.tensor(prompt_of)[row_N[here]] * (none + 1) + name_N[here]
    table_ND = mentions.carried_BPD.flatten(0, 1)
    carried = torch.nn.functional.embedding(to_device(index, flat_ND.device), table_ND)
    return flat_ND.index_add(0, to_device(here, flat_ND.device), carried.to(flat_ND.dtype))
