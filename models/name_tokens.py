"""Names of detected objects as words of the language model: `<obj12>` is one token, with an embedding of its own.

A name that is spelled in pieces (`<obj`, `1`, `2`) is found and copied in as many steps, and
`model.language.token_in_name` takes names of one token only. Qwen's tokenizer has none; `main.py tiny --names` makes a
small model that has, and `main.py names` gives them to one that is trained already.

Shapes: P names, V tokens that are known already, D width of the language model.
"""

import torch
from torch import Tensor
from transformers import AddedToken

from ..utils.text import format_name
from .language_model import LanguageModel


def name_tokens(count: int) -> list[AddedToken]:
    """The first names as tokens for a tokenizer; the blank before a name belongs to it."""
    return [AddedToken(format_name(name), normalized=False, lstrip=True) for name in range(count)]


@torch.no_grad()
def add_names(language: LanguageModel, count: int, *, seed: int = 0) -> None:
    """Give a language model names that are one token each, as words that it does not know yet.

    Their embeddings are random mixtures of those of the words it knows: they have the mean and the covariance of these
    (Hewitt, "Initializing New Word Embeddings for Pretrained Language Models", 2021). A model that was never told a
    name has moved the embeddings of all names to one place; so those of names that its tokenizer has are drawn anew.
    Where the LM head is a matrix of its own, its rows are the same mixtures, so that what copies a word copies a name.

    Args:
        language: without adapters; it is changed in place.
        count: names, `<obj0>` and on.
        seed: of the mixtures.
    """
    tokenizer, model = language.tokenizer, language.base
    tokens = name_tokens(count)
    names = [token.content for token in tokens]
    known = sorted(set(tokenizer.get_vocab().values()) - {tokenizer.get_vocab().get(name) for name in names})
    tokenizer.add_tokens(tokens)
    if len(tokenizer) > language.embedding.num_embeddings:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    ids_P = torch.tensor(tokenizer.convert_tokens_to_ids(names))
    drawn_PV = torch.randn(count, len(known), generator=torch.Generator().manual_seed(seed))
    matrices = {id(matrix): matrix for matrix in (language.embedding.weight, model.lm_head.weight)}
    for matrix in matrices.values():  # one where they are tied
        matrix[ids_P] = mixtures(matrix[torch.tensor(known)], drawn_PV).to(matrix.dtype)


def mixtures(known_VD: Tensor, drawn_PV: Tensor) -> Tensor:
    """Rows [P, D], float32, with mean and covariance of the known ones; `drawn_PV` is from a standard normal law."""
    known_VD = known_VD.float()
    mean_D = known_VD.mean(0)
    return mean_D + drawn_PV @ (known_VD - mean_D) / len(known_VD) ** 0.5
