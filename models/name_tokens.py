"""Names of detected objects as words of the language model: `<obj12>` is one token, with an embedding of its own.

A name that is spelled in pieces (`<obj`, `1`, `2`) is found and copied in as many steps, and
`model.language.token_in_name` takes names of one token only. Qwen's tokenizer has none; `main.py tiny --names` makes a
small model that has, and `main.py names` gives them to one that is trained already.

Shapes: P names, V tokens that are no names, D width of the language model.
"""

import torch
from torch import Tensor
from transformers import AddedToken

from ..utils.text import format_name, is_name
from .language_model import LanguageModel


def name_tokens(count: int) -> list[AddedToken]:
    """The first names as tokens for a tokenizer; the blank before a name belongs to it."""
    return [AddedToken(format_name(name), normalized=False, lstrip=True) for name in range(count)]


@torch.no_grad()
def add_names(language: LanguageModel, count: int, *, redraw: bool = False, seed: int = 0) -> None:
    """Give a language model the first `count` names as tokens, each with an embedding of its own.

    Their embeddings are random mixtures of those of the words: they have the mean and the covariance of these (Hewitt,
    "Initializing New Word Embeddings for Pretrained Language Models", 2021). Where the LM head is a matrix of its own,
    its rows are the same mixtures, so that what copies a word copies a name.

    Args:
        language: without adapters; it is changed in place.
        redraw: draw all names anew, those that the tokenizer has already too: training that never tells a name moves
            the embeddings of all names to one place. False keeps what they have learned.
        seed: of the mixtures.

    Raises:
        ValueError: there is nothing to do.
    """
    tokenizer, model = language.tokenizer, language.base
    vocabulary = tokenizer.get_vocab()
    had = [token for token in vocabulary if is_name(token)]
    words_V = torch.tensor(sorted(number for token, number in vocabulary.items() if not is_name(token)))
    tokens = name_tokens(count)
    drawn = [token.content for token in tokens if token.content not in had] + (sorted(had) if redraw else [])
    if not drawn:
        raise ValueError(f"The tokenizer has these {count} names already; ask for more, or draw them anew (--redraw).")
    tokenizer.add_tokens(tokens)
    if len(tokenizer) > language.embedding.num_embeddings:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    names_P = torch.tensor(tokenizer.convert_tokens_to_ids(drawn))
    drawn_PV = torch.randn(len(drawn), len(words_V), generator=torch.Generator().manual_seed(seed))
    matrices = {id(matrix): matrix for matrix in (language.embedding.weight, model.lm_head.weight)}
    for matrix in matrices.values():  # one where they are tied
        matrix[names_P] = mixtures(matrix[words_V], drawn_PV).to(matrix.dtype)


def mixtures(words_VD: Tensor, drawn_PV: Tensor) -> Tensor:
    """Rows [P, D], float32, with mean and covariance of the words'; `drawn_PV` is from a standard normal law."""
    words_VD = words_VD.float()
    mean_D = words_VD.mean(0)
    return mean_D + drawn_PV @ (words_VD - mean_D) / len(words_VD) ** 0.5
