"""Peers of the SFT benchmark: transformers + peft as their users run them, with and without Liger's kernels.

They train the very adapters of our model on the very rows: token ids, pictures and targets. Scene tokens stand at
their placeholder's own embedding, which costs a peer nothing.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from ..engine.optim import Optimizer
from ..models.attention import use_packed_attention
from ..models.inputs import IMAGE, pad_rows
from ..models.scene_vlm import SceneVLM

SAMPLES = 8  # of a step, at most: peers take seconds for each


class Peer(NamedTuple):
    """One way to train with transformers + peft."""

    title: str
    rows: int = 4  # of a padded forward pass
    checkpointing: bool = False
    liger: bool = False


PEERS = {
    "peft": Peer("transformers + peft", rows=2),
    "peft_checkpointing": Peer("transformers + peft, gradient checkpointing", checkpointing=True),
    "liger": Peer("transformers + peft + Liger", liger=True),
}


class PeerStep:
    """One optimizer step of a peer; a context manager that lends it the model.

    Args:
        name: out of PEERS.
        written: gives the rows of a step (engine.sft.Taught).
        set_checkpointing: switches gradient checkpointing.
    """

    def __init__(
        self,
        name: str,
        model: SceneVLM,
        optimizer: Optimizer,
        written: Callable[[], Sequence[Any]],
        set_checkpointing: Callable[[SceneVLM, bool], None],
    ):
        self.peer = PEERS[name]
        self.model = model
        self.optimizer = optimizer
        self.written = written
        self.set_checkpointing = set_checkpointing
        self.tokens = 0
        self._batches: list[dict[str, torch.Tensor]] = []

    def __enter__(self) -> "PeerStep":
        language = self.model.language
        if self.peer.liger:
            # it changes transformers' classes for good, so peers without it come first
            from liger_kernel.transformers import apply_liger_kernel_to_qwen2_5_vl  # type: ignore[import-not-found]

            apply_liger_kernel_to_qwen2_5_vl(model=language.base)
        for part in (language.decoder, language.base.model.visual):
            config: Any = part.config
            config._attn_implementation = "sdpa"
        self.set_checkpointing(self.model, self.peer.checkpointing)
        rows, count = self.written()[:SAMPLES], self.peer.rows
        self._batches = [self._batch(rows[start : start + count]) for start in range(0, len(rows), count)]
        self.tokens = sum(len(entry.row.token_ids) for entry in rows)
        self.targets = sum(entry.row.num_taught for entry in rows)
        return self

    def __exit__(self, *_: object) -> None:
        use_packed_attention(self.model.language.decoder, self.model.language.base.model.visual)
        self.set_checkpointing(self.model, False)
        self._batches.clear()

    def _batch(self, entries: Sequence[Any]) -> dict[str, torch.Tensor]:
        language = self.model.language
        layout = pad_rows([entry.row for entry in entries], language.pad_id)
        shown = [(entry.observation, view) for entry in entries for view in entry.views]
        batch = {
            "input_ids": layout.token_ids_BL,
            "attention_mask": layout.attention_mask_BL,
            "labels": layout.labels_BL,
            "mm_token_type_ids": (layout.kinds_BL == IMAGE).long(),
            "pixel_values": self.model.view_patches(shown).to(language.head_weight_VD.dtype),
            "image_grid_thw": torch.tensor([self.model.view_grid(*entry) for entry in shown]),
        }
        return {name: value.to(self.model.device) for name, value in batch.items()}

    def __call__(self) -> None:
        language = self.model.language
        with torch.compiler.set_stance("force_eager"):  # ours has compiled the vision tower
            for batch in self._batches:
                loss = language.model(**batch, use_cache=False, num_items_in_batch=self.targets).loss
                loss.backward()
        self.optimizer.step(0)
