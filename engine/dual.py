"""Training of the small dual encoder on generated rooms, in minutes on two CPU cores.

A batch is windows of rendered views and phrases; every pair is right, wrong or not asked (dual_data.py). The loss is
SigLIP's, a logistic loss a pair, with the wrong pairs of a phrase together weighing as much as its right ones, plus,
for each phrase, a softmax over the pictures: choosing among views is what the encoder is for. Single cells of the
pictures learn the same of the object in them, which teaches the picture tower many times faster than whole pictures.

Shapes: n pictures, R cells picked of each, L all cells of one, N = n R, P phrases, A attributes, K objects, V views,
S pixels a side, D width of the space.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from ..datasets.rooms import ROOMS_VERSION
from ..models.dual_encoder import CELL, DualEncoder, prepare_pictures
from ..utils.streams import stream
from .dual_data import (
    HINTED,
    SHOWN,
    Phrase,
    RoomPictures,
    attributes_of,
    fits,
    known_nouns,
    phrase_about,
    picture_room,
    random_window,
    shares,
)
from .dual_retrieval import retrieval
from .runtime import init_runtime, log, seed_everything

_ROOMS_A_BATCH, _WINDOWS_A_ROOM = 8, 4
_PHRASES_A_PICTURE, _OTHER_PHRASES = 2, 16
_CELLS_A_PICTURE, _OBJECT_CELLS = 16, 12
_LEARNING_RATE, _WARMUP, _WEIGHT_DECAY = 3e-3, 20, 0.05


@dataclass(eq=False)
class TrainingSet:
    """Pictured rooms, and which attribute fits which object."""

    rooms: list[RoomPictures]
    attributes: list[tuple[str, str]]
    fits_KA: list[np.ndarray]  # of each room, bool

    @classmethod
    def of(cls, rooms: list[RoomPictures]) -> "TrainingSet":
        """All attributes that fit an object of the rooms, or that something said of them is about."""
        known = known_nouns([pictures.room for pictures in rooms])
        found = {key for entry in rooms for thing in entry.room.objects for key in attributes_of(thing, known)}
        attributes = sorted(found | {phrase.attribute for entry in rooms for phrase in entry.phrases})
        tables = [
            np.array([[fits(thing, key, known) for key in attributes] for thing in entry.room.objects])
            for entry in rooms
        ]
        return cls(rooms, attributes, tables)


@dataclass(eq=False)
class DualBatch:
    """Pictures, some cells of each, texts, and what is right (1), wrong (0) or not asked (-1) of either."""

    pictures_n3SS: Tensor
    cells_nR: Tensor
    texts: list[str]
    truth_nP: Tensor
    cell_truth_nRP: Tensor


def make_batch(data: TrainingSet, image_size: int, generator: np.random.Generator) -> DualBatch:
    """Windows of several views of several rooms, and phrases about what they show and about other things."""
    windows, cells, truth, cell_truth, phrases = [], [], [], [], []
    number = {attribute: row for row, attribute in enumerate(data.attributes)}
    for row in generator.permutation(len(data.rooms))[:_ROOMS_A_BATCH]:
        entry, fits_KA = data.rooms[row], data.fits_KA[row]
        for view in generator.integers(0, len(entry.images_VSS3), _WINDOWS_A_ROOM):
            window = random_window(entry.owners_VSS[view], generator)
            flip = slice(None, None, -1 if generator.random() < 0.5 else 1)
            windows.append(entry.images_VSS3[view][window][:, flip])
            owner_SS = entry.owners_VSS[view][window][:, flip]
            share_K = shares(owner_SS, len(entry.room.objects))
            shown_A, hinted_A = fits_KA[share_K >= SHOWN].any(0), fits_KA[share_K >= HINTED].any(0)
            truth.append(np.where(shown_A, 1, np.where(hinted_A, -1, 0)))
            owner_L = cell_owners(owner_SS, image_size // CELL)
            cells.append(pick_cells(owner_L, generator))
            owner_R1 = owner_L[cells[-1]][:, None]
            cell_truth.append(np.where(owner_R1 >= 0, fits_KA[np.maximum(owner_R1[:, 0], 0)], False))
            phrases += _phrases_about(data, shown_A, generator)
        if entry.phrases:
            picks = generator.integers(0, len(entry.phrases), _WINDOWS_A_ROOM)
            phrases += [entry.phrases[pick] for pick in picks]
    others = generator.integers(0, len(data.attributes), _OTHER_PHRASES)
    phrases += [phrase_about(data.attributes[pick], generator) for pick in others]
    phrases = list({phrase.text: phrase for phrase in phrases}.values())
    columns = [number[phrase.attribute] for phrase in phrases]
    light_n111 = torch.from_numpy(generator.uniform(0.8, 1.2, (len(windows), 1, 1, 1)).astype(np.float32))
    return DualBatch(
        pictures_n3SS=(prepare_pictures(windows, image_size) + 1) * light_n111 - 1,
        cells_nR=torch.from_numpy(np.stack(cells)),
        texts=[phrase.text for phrase in phrases],
        truth_nP=torch.from_numpy(np.stack(truth)[:, columns]),
        cell_truth_nRP=torch.from_numpy(np.stack(cell_truth)[:, :, columns].astype(np.int64)),
    )


def cell_owners(owner_SS: np.ndarray, cells: int) -> np.ndarray:
    """Object in the middle of each of `cells` x `cells` cells of a square picture, [cells * cells], -1 for none."""
    middle = ((np.arange(cells) + 0.5) * len(owner_SS) / cells).astype(np.int64)
    return owner_SS[middle[:, None], middle].ravel()


def pick_cells(owner_L: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Sixteen cells, most of them of objects where there are any."""
    of_objects = np.flatnonzero(owner_L >= 0)
    picks = generator.integers(0, len(owner_L), _CELLS_A_PICTURE)
    if len(of_objects):
        picks[:_OBJECT_CELLS] = generator.choice(of_objects, _OBJECT_CELLS)
    return picks


def _phrases_about(data: TrainingSet, shown_A: np.ndarray, generator: np.random.Generator) -> list[Phrase]:
    shown = np.flatnonzero(shown_A)
    if not len(shown):
        return []
    picks = generator.choice(shown, _PHRASES_A_PICTURE)
    return [phrase_about(data.attributes[pick], generator) for pick in picks]


class DualLoss(nn.Module):
    """The loss of a batch's cosines; its scale and bias are learned and not part of the encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(10.0).log())
        self.bias = nn.Parameter(torch.tensor(-3.0))

    def forward(self, cosine_nP: Tensor, truth_nP: Tensor) -> Tensor:
        """Mean over the phrases that are right for one picture and wrong for another."""
        right_nP, wrong_nP = truth_nP == 1, truth_nP == 0
        useful_P = right_nP.any(0) & wrong_nP.any(0)
        if not useful_P.any():
            return cosine_nP.sum() * 0
        right_nP, wrong_nP = right_nP[:, useful_P], wrong_nP[:, useful_P]
        logit_nP = cosine_nP[:, useful_P] * self.log_scale.exp()
        pair_nP = F.softplus(torch.where(right_nP, -1.0, 1.0) * (logit_nP + self.bias))
        paired_P = sum((pair_nP * kind).sum(0) / kind.sum(0) for kind in (right_nP, wrong_nP))
        asked_nP = logit_nP.masked_fill(~(right_nP | wrong_nP), -torch.inf)
        # every right picture alone against the wrong ones: else one that is easy would do for all
        over_wrong_P = logit_nP.masked_fill(~wrong_nP, -torch.inf).logsumexp(0)
        ranked_nP = torch.logaddexp(asked_nP, over_wrong_P.expand_as(asked_nP)) - logit_nP
        ranked_P = (ranked_nP.masked_fill(~right_nP, 0)).sum(0) / right_nP.sum(0)
        return (paired_P + ranked_P).mean()


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine down to zero."""
    warm = min(1.0, (step + 1) / _WARMUP)
    return _LEARNING_RATE * warm * 0.5 * (1 + np.cos(np.pi * step / max(steps, 1)))


def fit(encoder: DualEncoder, data: TrainingSet, *, steps: int, seed: int, device: torch.device) -> float:
    """Train an encoder in place; returns the mean loss of the last tenth of the steps."""
    loss_of, cell_loss_of = DualLoss().to(device), DualLoss().to(device)
    encoder.to(device).train()
    parameters = [*encoder.parameters(), *loss_of.parameters(), *cell_loss_of.parameters()]
    matrices = [entry for entry in parameters if entry.ndim > 1]
    groups = [
        {"params": matrices, "weight_decay": _WEIGHT_DECAY},
        {"params": [entry for entry in parameters if entry.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    losses: list[float] = []
    bar = tqdm(range(steps), desc="dual", mininterval=1.0)
    for step in bar:
        batch = make_batch(data, encoder.config["image_size"], stream(seed, 31, step))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        texts_PD = encoder.texts(batch.texts)
        pictures_nD, cells_nRD = encoder.pictures_and_cells(batch.pictures_n3SS.to(device), batch.cells_nR.to(device))
        loss = loss_of(pictures_nD @ texts_PD.T, batch.truth_nP.to(device))
        cells_ND, truth_NP = cells_nRD.flatten(0, 1), batch.cell_truth_nRP.flatten(0, 1).to(device)
        loss = loss + cell_loss_of(cells_ND @ texts_PD.T, truth_NP)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    encoder.eval().requires_grad_(False)
    return float(np.mean(losses[-max(1, steps // 10) :])) if losses else float("nan")


def train_dual(
    out: str | Path, *, rooms: int = 64, held_out: int = 8, steps: int = 300, seed: int = 0, device: str = "auto"
) -> dict:
    """Train on `rooms` training rooms, test on `held_out` held-out ones, write the encoder and dual.json to `out`.

    The same arguments give the same weights on the same machine. Returns the content of dual.json.
    """
    if rooms < 1:
        raise ValueError(f"Training needs at least one room, not {rooms}.")
    out, runtime = Path(out), init_runtime(device)
    seed_everything(seed)
    data = TrainingSet.of(pictured_rooms("train", rooms, seed))
    log.info("%d rooms, %d attributes", rooms, len(data.attributes))
    encoder = DualEncoder()
    loss = fit(encoder, data, steps=steps, seed=seed, device=runtime.device)
    encoder.save_pretrained(out)
    found: dict = {"rooms": ROOMS_VERSION, "num_rooms": rooms, "steps": steps, "seed": seed, "loss": loss}
    if held_out:
        found["held_out"] = retrieval(encoder, pictured_rooms("val", held_out, seed), data.attributes)
    partial = out / "dual.json.partial"
    partial.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, out / "dual.json")
    return found


def pictured_rooms(split: str, count: int, seed: int) -> list[RoomPictures]:
    """The first rooms of a split, rendered."""
    return [picture_room(split, index, seed) for index in tqdm(range(count), desc=f"{split} rooms", unit="room")]
