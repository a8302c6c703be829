"""Dynamic view selection: which of a scene's candidate views a question needs (the paper's section on DVS).

    U(v) = w_t * S_Text->3D(v, t) + w_c * S_Image->3D(v, t) + w_clip * S_CLIP(v, t),    w_c + w_clip = 1

The paper's grid search found (0.3, 0.5, 0.5) best. It needs one space for text, pictures and the 3D scene, and trains
none; here the 3D side of a view is what a detector found in it, in the words of the encoder's own text side.
How the weights are learned is in relaxed_top_k.py; how repetition is kept out of the choice, in view_redundancy.py.

Shapes: V views, K objects, C classes, D width of the encoder's space, S points of the coverage subsample.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..utils.labels import DETECTION_CLASSES
from .image_encoder import Encoder, load_text_encoder
from .relaxed_top_k import soft_top_k, straight_through
from .view_pool import ViewPool
from .view_redundancy import choose_spread, question_weights

CHOICES = ("utility", "uniform")
_CACHED_TEXTS = 8192
_LEAST_SPREAD = 1e-3  # of utilities; bounds the gradient where a question prefers no view
_LEAST_SCORE_SPREAD = 1e-5  # of cosines; below it they differ by rounding
_WEIGHT_PRIOR = 0.3  # the paper's target of w_t


def s_text_to_3d(text_D: Tensor, visible_VK: Tensor, class_probs_KC: Tensor, classes_CD: Tensor) -> Tensor:
    """S_Text->3D [V]: cosine of the question and of what each view shows of the 3D scene.

    E_3D(v) is the mean of the detected objects' class embeddings, weighted by how much of the object the view sees
    and by the class probabilities. A view that sees no object scores 0.
    """
    view_VD = visible_VK @ (class_probs_KC @ classes_CD)
    return F.cosine_similarity(view_VD, text_D[None], dim=1)


def s_image_to_3d(features_VF: Tensor, references: Sequence[int] | None = None) -> Tensor:
    """S_Image->3D [V]: mean cosine of each view's features with those of the reference views I(t); None is all views.

    With the whole pool as I(t) it is high for a view that shows what the pool shows; with the pictures that fit the
    question (`relevant_views`), for a view that shows what these show. Features are picture embeddings, or, for an
    encoder without a picture side, the 0/1 vectors of the scene points that each view sees: the cosine is then the
    overlap |a and b| / sqrt(|a| |b|). A view that sees nothing scores 0.
    """
    unit_VF = F.normalize(features_VF.float(), dim=1)
    chosen_VF = unit_VF if references is None else unit_VF[list(references)]
    return unit_VF @ chosen_VF.mean(0)


def relevant_views(text_to_3d_V: Tensor, count: int) -> list[int]:
    """I(t): the `count` views of highest S_Text->3D, and those that tie with the last of them.

    Where the question prefers no view (nothing detected), that is the whole pool.
    """
    rounded_V = (text_to_3d_V.detach().double() * 1e6).round()
    last = rounded_V.sort(descending=True).values[min(count, len(rounded_V)) - 1]
    return torch.nonzero(rounded_V >= last)[:, 0].tolist()


def s_clip(text_D: Tensor, images_VD: Tensor) -> Tensor:
    """S_CLIP [V]: cosine of the question and of each picture."""
    return F.cosine_similarity(images_VD, text_D[None], dim=1)


def utility(scores: Mapping[str, Tensor], w_text: Tensor, w_image: Tensor) -> Tensor:
    """U [V] of the three scores; the weight of S_CLIP is 1 - w_image."""
    return w_text * scores["text_to_3d"] + w_image * scores["image_to_3d"] + (1 - w_image) * scores["clip"]


def standardized(score_V: Tensor) -> Tensor:
    """A score [V] as standard deviations from its mean over the pool; 0 where all views score alike."""
    spread = score_V.std(unbiased=False)
    return (score_V - score_V.mean()) / spread.clamp_min(_LEAST_SCORE_SPREAD)


def top_views(utility_V: Tensor, count: int) -> list[int]:
    """Indices of the `count` views of highest utility, best first; ties go to the lower index.

    Utilities are compared to six decimals, so that the last bits of a sum do not decide.
    """
    rounded_V = (utility_V.detach().double() * 1e6).round()
    return torch.argsort(-rounded_V, stable=True)[:count].tolist()


def evenly_spaced(size: int, count: int) -> list[int]:
    """`count` of `size` indices, as far apart as they go, from the first to the last; all where there are no more."""
    return np.linspace(0, size - 1, min(count, size)).round().astype(int).tolist()


@dataclass(frozen=True)
class Selection:
    """Chosen views, best first, and every candidate's scores: text_to_3d, image_to_3d, clip, utility, each [V].

    `marginal_V` is the utility less what redundancy took off it; its highest are the chosen views, unless the choice
    is uniform.
    """

    indices: list[int]
    names: list[str]
    scores: dict[str, Tensor]
    marginal_V: Tensor

    def gates(self, temperature: float) -> Tensor:
        """Gates [k] of the chosen views, all 1, with the gradient of their relaxed inclusion (relaxed_top_k.py).

        `temperature` is in standard deviations of the pool's utilities, of which no gradient is taken.
        """
        spread = float(self.scores["utility"].detach().std(unbiased=False).clamp_min(_LEAST_SPREAD))
        p_V = soft_top_k(self.marginal_V, len(self.indices), temperature * spread)
        return straight_through(p_V, self.indices)


class ViewSelector(nn.Module):
    """Chooses the views of a pool that fit a question.

    The weights w_t and w_c are parameters, so that they are saved and can be trained; w_clip is 1 - w_c. The encoder
    is frozen, and is not part of the state: `settings()` names it. While the weights do not learn, views are chosen on
    the host, where pools are: a choice is some thirty operations on a few numbers, and would wait for a GPU ten times.

    Args:
        encoder: text and pictures in one space, or text only (then w_clip must be 0).
        encoder_name: what `load_text_encoder` takes to load it again.
        num_views: views to choose.
        w_text: w_t.
        w_image: w_c.
        w_clip: w_clip.
        num_references: size of I(t), the views most relevant to the question by S_Text->3D, that S_Image->3D compares
            with. The paper leaves I(t) open; with the whole pool the term ignores the question, and a text-only
            encoder, where w_c is 1, then finds targets less often than chance.
        redundancy: how much a view's utility falls that shows only what the chosen ones show, in standard deviations
            of the pool's utilities (view_redundancy.py); 0 is the paper's plain top-k.
        standardize: weigh the scores as standard deviations from their mean over the pool. The paper weighs the
            cosines as they are, and how much each then decides depends on how far its cosines spread.
        choice: "utility", or "uniform": the same views evenly spaced in the pool whatever is asked, to compare with.
        class_names: names of the detector's classes, in its order.
        learn_weights: see `train_weights`.
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        encoder_name: str,
        num_views: int = 6,
        w_text: float = 0.3,
        w_image: float = 0.5,
        w_clip: float = 0.5,
        num_references: int = 3,
        redundancy: float = 0.0,
        standardize: bool = False,
        choice: str = "utility",
        class_names: Sequence[str] = DETECTION_CLASSES,
        learn_weights: bool = False,
    ):
        super().__init__()
        if abs(w_image + w_clip - 1) > 1e-6 or min(w_text, w_image, w_clip) < 0:
            raise ValueError(
                f"View weights must not be negative, and w_image + w_clip must be 1, not {w_image} + {w_clip}."
            )
        if num_views < 1 or num_references < 1:
            raise ValueError(
                f"num_views ({num_views}) and num_references ({num_references}) must be at least 1; turn views off "
                "with source none."
            )
        if redundancy < 0:
            raise ValueError(f"redundancy is {redundancy}; it must not be negative, and 0 turns it off.")
        if choice not in CHOICES:
            raise ValueError(f"choice is {choice!r}; choose {' or '.join(CHOICES)}.")
        if w_clip > 0 and not encoder.has_images:
            raise ValueError(
                f"The encoder {encoder_name!r} reads text only, so the question cannot be compared with pictures: "
                "set w_clip to 0 and w_image to 1, or choose a SigLIP or CLIP checkpoint."
            )
        self.num_views = num_views
        self.num_references = num_references
        self.redundancy = float(redundancy)
        self.standardize = bool(standardize)
        self.choice = choice
        self.encoder_name = encoder_name
        self.class_names = tuple(class_names)
        self.w_text = nn.Parameter(torch.tensor(float(w_text)))
        self.w_image = nn.Parameter(torch.tensor(float(w_image)))
        self._encoder = (encoder,)  # inside a tuple: no submodule, so its weights stay out of state_dict
        self._fetched: tuple[object, tuple[Tensor, Tensor]] | None = None
        self._texts: OrderedDict[str, Tensor] = OrderedDict()  # questions and class names, the latest used last
        self.train_weights(learn_weights)

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> "ViewSelector":
        """Build a selector from `settings()`: encoder (a name) and any of the other arguments."""
        options = dict(settings)
        name = options.pop("encoder")
        return cls(load_text_encoder(name), encoder_name=name, **options)

    def settings(self) -> dict[str, Any]:
        """What `from_settings` needs to build this selector again; the weights as they are now."""
        w_text, w_image = (_shortest(weight) for weight in (self.w_text, self.w_image))
        return {
            "encoder": self.encoder_name,
            "num_views": self.num_views,
            "w_text": w_text,
            "w_image": w_image,
            "w_clip": round(1 - w_image, 6),
            "num_references": self.num_references,
            "redundancy": self.redundancy,
            "standardize": self.standardize,
            "choice": self.choice,
        }

    def train_weights(self, learn: bool) -> None:
        """Choose whether w_t and w_c take gradients; w_c stays 1 with an encoder that has no picture side."""
        self.w_text.requires_grad_(learn)
        self.w_image.requires_grad_(learn and self._encoder[0].has_images)

    @property
    def learns(self) -> bool:
        """Whether the weights move, so that no choice outlives a step."""
        return self.w_text.requires_grad

    @property
    def _device(self) -> torch.device:
        """Where views are chosen."""
        return self.w_text.device if self.learns else torch.device("cpu")

    def _weights(self) -> tuple[Tensor, Tensor]:
        """w_t and w_c where views are chosen; fetched from a GPU when they have changed."""
        if self._device == self.w_text.device:
            return self.w_text, self.w_image
        key = tuple((weight.data_ptr(), weight._version) for weight in (self.w_text, self.w_image))
        if self._fetched is None or self._fetched[0] != key:
            self._fetched = key, (self.w_text.detach().cpu(), self.w_image.detach().cpu())
        return self._fetched[1]

    @torch.no_grad()
    def project(self) -> None:
        """Put the weights back where they are defined, after an optimiser step: w_t >= 0, 0 <= w_c <= 1."""
        self.w_text.clamp_(min=0)
        self.w_image.clamp_(0, 1)

    @property
    def encoder(self) -> Encoder:
        """The frozen encoder, on the device of the weights."""
        encoder = self._encoder[0]
        # asking first is cheap; moving walks through every module
        return encoder if next(encoder.parameters()).device == self.w_text.device else encoder.to(self.w_text.device)

    def remember(self, questions: Sequence[str]) -> None:
        """Embed questions in one batch before they are asked one by one."""
        if questions:
            self._embed(list(questions))

    def regularizer(self) -> Tensor:
        """L2 pull of w_t to the paper's 0.3: a scalar to add to a loss."""
        return (self.w_text - _WEIGHT_PRIOR) ** 2

    def scores(self, question: str, pool: ViewPool, class_probs_KC: Tensor | np.ndarray) -> dict[str, Tensor]:
        """The three scores and their utility [V] of every view of a pool, float32, where views are chosen.

        The scores are cosines (overlaps without a picture side), even where the utility weighs them standardised.

        Args:
            class_probs_KC: class probabilities of the boxes that the pool was built with, in the same order; a last
                column beyond the class names (no object) is left out.
        """
        probs_KC, visible_VK = self._checked(pool, class_probs_KC)
        question_D = self._embed([question])[0]
        classes_CD = self._embed(self._class_texts())
        found = {"text_to_3d": s_text_to_3d(question_D, visible_VK, probs_KC, classes_CD)}
        references = relevant_views(found["text_to_3d"], self.num_references)
        if self._encoder[0].has_images:
            images_VD = self._embed_pool(pool).to(probs_KC.device)
            found["image_to_3d"] = s_image_to_3d(images_VD, references)
            found["clip"] = s_clip(question_D, images_VD)
        else:
            coverage_VS = torch.from_numpy(pool.coverage_VS).to(probs_KC.device)
            found["image_to_3d"] = s_image_to_3d(coverage_VS, references)
            found["clip"] = torch.zeros(len(pool), device=probs_KC.device)
        weighed = {name: standardized(score_V) for name, score_V in found.items()} if self.standardize else found
        found["utility"] = utility(weighed, *self._weights())
        return found

    def select(
        self,
        question: str,
        pool: ViewPool,
        class_probs_KC: Tensor | np.ndarray,
        focus_V: np.ndarray | None = None,
    ) -> Selection:
        """Choose `num_views` views (all of a smaller pool) for a question; see `scores`.

        `focus_V` is how much of one object each view shows, for a question about that very object: it decides, and
        the utility only between views that show it alike. Redundancy is left out then: all views are of that object.
        A uniform choice follows neither.
        """
        if not len(pool):
            none = torch.zeros(0, device=self._device)
            return Selection([], [], dict.fromkeys(("text_to_3d", "image_to_3d", "clip", "utility"), none), none)
        scores = self.scores(question, pool, class_probs_KC)
        if focus_V is not None:
            scores["utility"] = torch.as_tensor(focus_V).to(scores["utility"]) + 0.01 * scores["utility"]
        marginal_V = scores["utility"]
        if self.choice == "uniform":
            indices = evenly_spaced(len(pool), self.num_views)
        elif self.redundancy == 0 or focus_V is not None:
            indices = top_views(marginal_V, self.num_views)
        else:
            probs_KC, _ = self._checked(pool, class_probs_KC)
            weight_K = question_weights(self._embed([question])[0], probs_KC, self._embed(self._class_texts()))
            indices, taken_off_V = choose_spread(
                marginal_V.detach().cpu().numpy(),
                pool.visible_VK,
                weight_K,
                count=self.num_views,
                redundancy=self.redundancy,
            )
            marginal_V = marginal_V - torch.from_numpy(taken_off_V).to(marginal_V)
        return Selection(indices, [pool.names[index] for index in indices], scores, marginal_V)

    def forward(self, question: str, pool: ViewPool, class_probs_KC: Tensor | np.ndarray) -> Selection:
        """See `select`."""
        return self.select(question, pool, class_probs_KC)

    def _checked(self, pool: ViewPool, class_probs_KC: Tensor | np.ndarray) -> tuple[Tensor, Tensor]:
        """Class probabilities [K, C] and visibility [V, K] where views are chosen; ValueError on a misfit."""
        probs_KC = torch.as_tensor(class_probs_KC, dtype=torch.float32, device=self._device)
        visible_VK = torch.from_numpy(np.asarray(pool.visible_VK, dtype=np.float32)).to(self._device)
        num_classes = len(self.class_names)
        if probs_KC.ndim != 2 or probs_KC.shape[1] not in (num_classes, num_classes + 1):
            raise ValueError(f"Class probabilities must be [K, {num_classes}], not {tuple(probs_KC.shape)}.")
        if visible_VK.shape != (len(pool), len(probs_KC)):
            raise ValueError(
                f"The pool knows the visibility of {visible_VK.shape[-1]} boxes, but there are class probabilities of "
                f"{len(probs_KC)}; build the pool with the boxes that the question is asked about."
            )
        return probs_KC[:, :num_classes], visible_VK

    def _class_texts(self) -> list[str]:
        template = self._encoder[0].class_template
        return [template.format("furniture" if name == "otherfurniture" else name) for name in self.class_names]

    def _embed(self, texts: list[str]) -> Tensor:
        """Embeddings [n, D] of texts, from the cache where they were asked for before."""
        missing = [text for text in dict.fromkeys(texts) if text not in self._texts]
        if missing:
            # a batch changes the last bits of its texts, which the gradient of learned weights would carry on
            size = 1 if self.learns else len(missing)
            for start in range(0, len(missing), size):
                part = missing[start : start + size]
                self._texts.update(zip(part, self.encoder.embed_texts(part).cpu(), strict=True))
        for text in texts:
            self._texts.move_to_end(text)
        rows_ND = torch.stack([self._texts[text] for text in texts]).to(self._device)
        while len(self._texts) > _CACHED_TEXTS:
            self._texts.popitem(last=False)
        return rows_ND

    def _embed_pool(self, pool: ViewPool) -> Tensor:
        """Embeddings [V, D] of a pool's pictures, computed once a pool and encoder."""
        if self.encoder_name not in pool.embeddings:
            pool.embeddings[self.encoder_name] = self.encoder.embed_images(list(pool.images_VHW3)).cpu()
        return pool.embeddings[self.encoder_name]


def _shortest(weight: Tensor) -> float:
    """The shortest decimal that is this float32 again: 0.3, not 0.30000001192092896, and exact."""
    return float(str(np.float32(weight.item())))
