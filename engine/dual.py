"""Training of the small dual encoder on generated rooms, in minutes on two CPU cores.

Both towers learn to name objects, each on its own: every cell of a picture the object in its middle, which the
renderer knows, by cross-entropy over names and colours; every text the object that it is about. That teaches the
picture tower many times faster than to tell whole pictures apart by what is said of them, where a picture that shows
twenty objects has one label a phrase. As texts and cells use the same names, nothing is left to align.

Shapes: n pictures or texts, L cells of a picture, N = n L, M names, B colours, S pixels a side.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from ..datasets.rooms import ROOMS_VERSION
from ..datasets.rooms.room import RoomObject
from ..models.dual_encoder import CELL, DualEncoder, prepare_pictures
from ..utils.files import write_whole
from ..utils.streams import stream
from .dual_data import (
    Phrase,
    RoomPictures,
    cell_owners,
    cell_weights,
    known_nouns,
    nouns_of,
    phrase_about,
    picture_room,
    random_window,
)
from .dual_retrieval import retrieval
from .runtime import init_runtime, log, seed_everything

_PICTURES, _TEXTS = 12, 96  # in a batch
_STEPS_A_TEXT_STEP = 4  # texts are learned in a quarter of the steps
_LEARNING_RATE, _WARMUP, _WEIGHT_DECAY = 3e-3, 20, 0.05


@dataclass(eq=False)
class TrainingSet:
    """Pictured rooms, and the names and colours that their objects have, in the order of the encoder's coordinates."""

    rooms: list[RoomPictures]
    labels: list[str]
    colors: list[str]
    nouns: list[str]  # all that an object may be called
    known: frozenset[str]
    of_label: dict[str, list[RoomObject]]

    @classmethod
    def of(cls, rooms: list[RoomPictures]) -> "TrainingSet":
        """What rooms hold."""
        things = [thing for entry in rooms for thing in entry.room.objects]
        known = known_nouns([entry.room for entry in rooms])
        labels = sorted({thing.label for thing in things})
        return cls(
            rooms,
            labels,
            sorted({thing.color for thing in things}),
            sorted({noun for thing in things for noun in nouns_of(thing, known)}),
            known,
            {label: [thing for thing in things if thing.label == label] for label in labels},
        )


@dataclass(eq=False)
class CellBatch:
    """Pictures, and the name, colour and weight of each of their cells; M and -1 where there is no object."""

    pictures_n3SS: Tensor
    name_nL: Tensor
    color_nL: Tensor
    weight_nL: Tensor


def cell_batch(data: TrainingSet, image_size: int, generator: np.random.Generator) -> CellBatch:
    """Windows of views of as many rooms."""
    windows, names, colors, weights = [], [], [], []
    for row in generator.integers(0, len(data.rooms), _PICTURES):
        entry = data.rooms[row]
        view = int(generator.integers(len(entry.images_VSS3)))
        window = random_window(entry.owners_VSS[view], generator)
        flip = slice(None, None, -1 if generator.random() < 0.5 else 1)
        windows.append(entry.images_VSS3[view][window][:, flip])
        owner_L = cell_owners(entry.owners_VSS[view][window][:, flip], image_size // CELL)
        # the last entry is what -1 reads
        name_K = np.array([data.labels.index(thing.label) for thing in entry.room.objects] + [len(data.labels)])
        color_K = np.array([data.colors.index(thing.color) for thing in entry.room.objects] + [-1])
        names.append(name_K[owner_L])
        colors.append(color_K[owner_L])
        weights.append(cell_weights(owner_L))
    light_n111 = torch.from_numpy(generator.uniform(0.8, 1.2, (len(windows), 1, 1, 1)).astype(np.float32))
    return CellBatch(
        pictures_n3SS=(prepare_pictures(windows, image_size) + 1) * light_n111 - 1,
        name_nL=torch.from_numpy(np.stack(names)),
        color_nL=torch.from_numpy(np.stack(colors)),
        weight_nL=torch.from_numpy(np.stack(weights)),
    )


def text_batch(data: TrainingSet, generator: np.random.Generator) -> list[Phrase]:
    """Half of the texts name an object, every label as often; half were said of the rooms."""
    phrases = []
    for pick in generator.integers(0, len(data.labels), _TEXTS // 2):
        things = data.of_label[data.labels[pick]]
        phrases.append(phrase_about(things[int(generator.integers(len(things)))], data.known, generator))
    for row in generator.integers(0, len(data.rooms), _TEXTS - len(phrases)):
        said = data.rooms[row].phrases
        if said:
            phrases.append(said[int(generator.integers(len(said)))])
    return phrases


def cell_loss(names_NM: Tensor, colors_NB: Tensor, name_N: Tensor, color_N: Tensor, weight_N: Tensor) -> Tensor:
    """Weighted means of the cross-entropy of names, over all cells, and of colours, over those with an object."""
    name_loss = (F.cross_entropy(names_NM, name_N, reduction="none") * weight_N).sum() / weight_N.sum()
    colored_N = weight_N * (color_N >= 0)
    color_loss = F.cross_entropy(colors_NB, color_N, reduction="none", ignore_index=-1) * colored_N
    return name_loss + color_loss.sum() / colored_N.sum().clamp_min(1e-6)


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine down to zero."""
    warm = min(1.0, (step + 1) / _WARMUP)
    return _LEARNING_RATE * warm * 0.5 * (1 + np.cos(np.pi * step / max(steps, 1)))


def fit_images(encoder: DualEncoder, data: TrainingSet, *, steps: int, seed: int, device: torch.device) -> float:
    """Train the picture tower in place; returns the mean loss of the last tenth of the steps."""

    def losses() -> Iterator[Tensor]:
        for step in range(steps):
            batch = cell_batch(data, encoder.config["image_size"], stream(seed, 31, step))
            names_nLM, colors_nLB = encoder.cell_logits(batch.pictures_n3SS.to(device))
            truth = (part.flatten().to(device) for part in (batch.name_nL, batch.color_nL, batch.weight_nL))
            yield cell_loss(names_nLM.flatten(0, 1), colors_nLB.flatten(0, 1), *truth)

    return _descend(encoder.image, losses(), steps, "pictures")


def fit_texts(encoder: DualEncoder, data: TrainingSet, *, steps: int, seed: int, device: torch.device) -> float:
    """Train the text tower in place; returns the mean loss of the last tenth of the steps."""
    name_of, color_of = ({word: row for row, word in enumerate(words)} for words in (data.labels, data.colors))

    def losses() -> Iterator[Tensor]:
        for step in range(steps):
            phrases = text_batch(data, stream(seed, 32, step))
            names_nM, colors_nB = encoder.text_logits([phrase.text for phrase in phrases])
            name_n = torch.tensor([name_of[phrase.label] for phrase in phrases], device=device)
            color_n = torch.tensor([color_of[phrase.color] for phrase in phrases], device=device)
            yield F.cross_entropy(names_nM, name_n) + F.cross_entropy(colors_nB, color_n)

    return _descend(encoder.text, losses(), steps, "texts")


def _descend(tower: nn.Module, losses: Iterator[Tensor], steps: int, name: str) -> float:
    tower.train()
    parameters = list(tower.parameters())
    groups = [
        {"params": [entry for entry in parameters if entry.ndim > 1], "weight_decay": _WEIGHT_DECAY},
        {"params": [entry for entry in parameters if entry.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    found: list[float] = []
    bar = tqdm(losses, desc=name, total=steps, mininterval=1.0)
    for step, loss in enumerate(bar):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        found.append(float(loss.detach()))
        bar.set_postfix(loss=f"{found[-1]:.3f}", refresh=False)
    tower.eval().requires_grad_(False)
    return float(np.mean(found[-max(1, steps // 10) :])) if found else float("nan")


def train_dual(
    out: str | Path, *, rooms: int = 64, held_out: int = 8, steps: int = 2000, seed: int = 0, device: str = "auto"
) -> dict:
    """Train on `rooms` training rooms, test on `held_out` held-out ones, write the encoder and dual.json to `out`.

    The same arguments give the same weights on the same machine. Returns the content of dual.json but for the words.
    """
    if rooms < 1:
        raise ValueError(f"Training needs at least one room, not {rooms}.")
    out, runtime = Path(out), init_runtime(device)
    seed_everything(seed)
    data = TrainingSet.of(pictured_rooms("train", rooms, seed))
    log.info("%d rooms, %d names, %d colours", rooms, len(data.labels), len(data.colors))
    encoder = DualEncoder(num_names=len(data.labels), num_colors=len(data.colors)).to(runtime.device)
    text_steps = -(-steps // _STEPS_A_TEXT_STEP)
    found: dict = {"rooms": ROOMS_VERSION, "num_rooms": rooms, "steps": steps, "seed": seed}
    found["image_loss"] = fit_images(encoder, data, steps=steps, seed=seed, device=runtime.device)
    found["text_loss"] = fit_texts(encoder, data, steps=text_steps, seed=seed, device=runtime.device)
    encoder.eval().requires_grad_(False).save_pretrained(out)
    if held_out:
        found["held_out"] = retrieval(encoder, pictured_rooms("val", held_out, seed), data.nouns)
    words = {"names": data.labels, "colors": data.colors}
    write_whole(out / "dual.json", json.dumps(found | words, indent=2) + "\n")
    return found


def pictured_rooms(split: str, count: int, seed: int) -> list[RoomPictures]:
    """The first rooms of a split, rendered."""
    return [picture_room(split, index, seed) for index in tqdm(range(count), desc=f"{split} rooms", unit="room")]
