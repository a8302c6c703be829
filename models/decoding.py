"""Autoregressive decoding over assembled inputs: prompts encoded once, sampling, log-probabilities kept.

All rows take a step together. Each prompt's keys are there once for all of its completions (kv_cache.py; row_cache.py
where it has one on a CPU), adapters stay apart from the weights, so that what is sampled from is the policy that is
trained, and rows that have finished leave. With the kernels a step is one CUDA graph for each number of rows that
there may be: what changes from step to step is on the device, which is waited for every few tokens only.

Shapes: P prompts, G completions of each, R = P * G rows, L prompt tokens packed, S tokens of a completion, V
vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import Documents
from .block_parts import compiled_on_gpu
from .inputs import Mentions, ModelInputs
from .kv_cache import KVCache, takes_kernels
from .language_model import LanguageModel
from .row_cache import RowCache

_TOGETHER = 16_384  # prompt tokens encoded at a time
_TOGETHER_CPU = 2048  # on a CPU, whose caches do not hold what more of them need between two products
_LOOK = 8  # a GPU is waited for so seldom, in tokens
# numbers of rows that graphs are made for, besides that of all rows
_SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
_BLOCK = 512  # of the vocabulary


@dataclass
class Decoded:
    """Completions in row order (the G completions of prompt 0 first), token ids without padding.

    `logps` are log-probabilities under the sampling distribution (temperature applied). A finished completion ends
    with an end token, which is included.
    """

    token_ids: list[list[int]]
    logps: list[list[float]]
    finished: list[bool]


def pick_tokens(logits_RV: Tensor, temperature: float, uniform_R: Tensor | None) -> tuple[Tensor, Tensor]:
    """Next token of each row and its log-probability: greedy at temperature 0, else by inverse CDF.

    The draws come in as numbers, so that a row's sample depends on its own stream alone, not on its neighbours.
    """
    if temperature not in (0, 1):
        logits_RV = logits_RV.float() / temperature
    if temperature > 0:
        assert uniform_R is not None
        norm_R1, sums_RN = _block_sums(logits_RV)
        token_R = _draw(logits_RV, norm_R1, sums_RN, uniform_R)
    else:
        norm_R1 = torch.logsumexp(logits_RV.float(), -1, keepdim=True)
        token_R = logits_RV.argmax(-1)
    return token_R, (logits_RV.gather(1, token_R[:, None]).float() - norm_R1)[:, 0]


@compiled_on_gpu
def _block_sums(logits_RV: Tensor) -> tuple[Tensor, Tensor]:
    """Log-sum-exp [R, 1] of the logits, and the probability of each block of the vocabulary [R, N], float64."""
    wide_RV = logits_RV.float()
    norm_R1 = torch.logsumexp(wide_RV, -1, keepdim=True)
    probs_RV = F.pad((wide_RV - norm_R1).exp(), (0, -logits_RV.shape[1] % _BLOCK))
    return norm_R1, probs_RV.unflatten(1, (-1, _BLOCK)).sum(-1, dtype=torch.float64)


def _draw(logits_RV: Tensor, norm_R1: Tensor, sums_RN: Tensor, uniform_R: Tensor) -> Tensor:
    """Where each row's CDF passes its number: first among blocks of the vocabulary, then in one of them.

    In float64: in float32 the running sum over 150,000 tokens loses the small probabilities.
    """
    cdf_RN = sums_RN.cumsum(-1)
    wanted_R1 = uniform_R.to(cdf_RN)[:, None] * cdf_RN[:, -1:]
    block_R1 = _passes(cdf_RN, wanted_R1)
    before_R1 = (cdf_RN - sums_RN).gather(1, block_R1)
    token_RB = block_R1 * _BLOCK + torch.arange(_BLOCK, device=block_R1.device)
    last = logits_RV.shape[1] - 1
    probs_RB = (logits_RV.gather(1, token_RB.clamp(max=last)).float() - norm_R1).exp().double()
    cdf_RB = probs_RB.masked_fill(token_RB > last, 0.0).cumsum(-1)
    return (block_R1 * _BLOCK + _passes(cdf_RB, wanted_R1 - before_R1))[:, 0]


def _passes(cdf_RN: Tensor, wanted_R1: Tensor) -> Tensor:
    """The first place whose CDF is above what is wanted [R, 1]; it has a probability, whatever is rounded."""
    total_R1 = cdf_RN[:, -1:]
    found_R1 = torch.searchsorted(
        cdf_RN, wanted_R1.minimum(total_R1.nextafter(torch.zeros_like(total_R1))), right=True
    )
    return found_R1.clamp(max=cdf_RN.shape[1] - 1)  # of what is no number: its log-probability tells


@dataclass
class _Batch:
    """What one call decodes."""

    num_rows: int
    max_new_tokens: int
    temperature: float
    eos_ids: tuple[int, ...]
    at_work: int  # rows that take steps: the first of the buffers
    on_token: Callable[[int, int], None] | None
    told: set[int] = field(default_factory=set)  # rows whose end `on_token` has heard of


class _Rows:
    """Where rows stand: buffers on the device, for so many rows of so many tokens at most."""

    def __init__(self, rows: int, tokens: int, device: torch.device):
        self.token_R = torch.zeros(rows, dtype=torch.long, device=device)
        self.after_4R = torch.zeros(4, rows, dtype=torch.long, device=device)  # positions of what is said first
        self.ended_R = torch.zeros(rows, dtype=torch.bool, device=device)
        self.number_R = torch.zeros(rows, dtype=torch.long, device=device)  # which of the batch's rows it is
        self.prompt_R = torch.zeros(rows, dtype=torch.long, device=device)  # the prompt that it goes on from
        self.name_R = torch.zeros(rows, dtype=torch.long, device=device)  # said right before its last token (Mentions)
        self.place_1 = torch.zeros(1, dtype=torch.long, device=device)  # of the token that comes next
        # by number:
        self.uniform_RS = torch.zeros(rows, tokens, dtype=torch.float64, device=device)
        self.ids_RS = torch.zeros(rows, tokens, dtype=torch.long, device=device)
        self.logps_RS = torch.zeros(rows, tokens, device=device)

    def begin(self, after_4R: Tensor, prompt_of_R: Tensor) -> None:
        """Rows of a new batch."""
        count = after_4R.shape[1]
        self.prompt_R[:count] = prompt_of_R
        self.after_4R[:, :count] = after_4R
        self.number_R[:count] = torch.arange(count, device=self.number_R.device)
        self.ended_R.zero_()
        self.place_1.zero_()

    def keep(self, rows: Sequence[int]) -> None:
        """Only these go on."""
        at, count = torch.tensor(rows, device=self.token_R.device), len(rows)
        for buffer_R in (self.token_R, self.ended_R, self.number_R, self.prompt_R, self.name_R):
            buffer_R[:count] = buffer_R[at]
        self.after_4R[:, :count] = self.after_4R[:, at]

    def take(self, logits_RV: Tensor, temperature: float, eos_E: Tensor) -> None:
        """Choose the next token of the first rows, and write down which it is."""
        count = len(logits_RV)
        number_R = self.number_R[:count]
        draws_R = self.uniform_RS[number_R, self.place_1] if temperature > 0 else None
        token_R, logp_R = pick_tokens(logits_RV, temperature, draws_R)
        self.token_R[:count] = token_R
        self.ended_R[:count] |= (token_R[:, None] == eos_E).any(1)
        self.ids_RS[number_R, self.place_1] = token_R
        self.logps_RS[number_R, self.place_1] = logp_R
        self.place_1 += 1

    def carried(self, mentions: Mentions, count: int) -> Tensor:
        """What the last tokens of the first rows carry [count, D]; keeps which names they are."""
        said_R, none = mentions.name_of_V[self.token_R[:count]], mentions.none
        name_R = torch.where(said_R < none, said_R, self.name_R[:count])
        self.name_R[:count] = said_R
        return mentions.carried_BPD[self.prompt_R[:count], name_R]

    @contextmanager
    def unmoved(self) -> Iterator[None]:
        """What the block chooses does not count."""
        moved = (self.token_R, self.ended_R, self.place_1, self.name_R)
        before = [buffer.clone() for buffer in moved]
        yield
        for buffer, value in zip(moved, before, strict=True):
            buffer.copy_(value)


def _cache_kind(language: LanguageModel, device: torch.device, *, shared: bool) -> type[KVCache] | type[RowCache]:
    """The cache for rows that share prompts, or share none."""
    like = torch.empty(0, language.attention_shape[2], dtype=language.dtype, device=device)
    return RowCache if device.type == "cpu" and not shared and not takes_kernels(like) else KVCache


class Decoder:
    """Decodes with one language model. Its buffers, and its graphs on a GPU, serve from call to call.

    Args:
        graphs: whether steps are captured as CUDA graphs; None: wherever they can be.
    """

    def __init__(self, language: LanguageModel, *, graphs: bool | None = None):
        self.language = language
        self.graphs = graphs
        self.release()

    def release(self) -> None:
        """Give buffers and graphs back; the next call makes them anew."""
        self._cache: KVCache | RowCache | None = None
        self._rows = _Rows(0, 0, torch.device("cpu"))
        self._mentions: Mentions | None = None  # of the prompts at work; their table's memory serves from call to call
        self._eos: dict[tuple[int, ...], Tensor] = {}
        self._graphs: dict[tuple[Any, ...], torch.cuda.CUDAGraph] = {}
        self._made_of: tuple[Any, ...] = ()  # what graphs were captured of, besides buffers
        self._side: torch.cuda.Stream | None = None

    @torch.no_grad()
    def __call__(
        self,
        prompts: ModelInputs,
        lengths: Sequence[int],
        *,
        max_new_tokens: int,
        group_size: int = 1,
        temperature: float = 0.0,
        generators: Sequence[torch.Generator] | None = None,
        eos_ids: Sequence[int] | None = None,
        on_token: Callable[[int, int], None] | None = None,
    ) -> Decoded:
        """Decode `group_size` completions of every prompt.

        Args:
            prompts: packed, without padding.
            lengths: tokens of each prompt.
            temperature: 0 is greedy.
            generators: CPU generators, one for each of the R rows; needed where temperature > 0.
            eos_ids: tokens that end a completion; None: those that end a turn.
            on_token: called with (row, token id) as tokens come, for streaming.
        """
        num_rows = len(lengths) * group_size
        if prompts.attends is None or prompts.inputs_embeds_BLD.shape[1] != sum(lengths):
            raise ValueError("Decoding takes packed prompts without padding, and the length of each.")
        if temperature > 0 and (generators is None or len(generators) != num_rows):
            raise ValueError(f"Sampling {num_rows} rows needs as many generators.")
        ends = tuple(self.language.eos_ids if eos_ids is None else eos_ids)
        batch = _Batch(num_rows, max_new_tokens, temperature, ends, num_rows, on_token)
        with self.language.uncompiled(), self.language.attending_packed(), self.language.settled():
            logits_RV = self._begin(prompts, lengths, group_size, batch)
            if temperature > 0 and generators:
                draws = [torch.rand(max_new_tokens, generator=each, dtype=torch.float64) for each in generators]
                self._rows.uniform_RS[:num_rows, :max_new_tokens] = torch.stack(draws)
            self._rows.take(logits_RV, temperature, self._eos[ends])
            count = self._go_on(batch)
        return self._read(batch, count)

    def _begin(self, prompts: ModelInputs, lengths: Sequence[int], group_size: int, batch: _Batch) -> Tensor:
        """Encode the prompts and set the rows out behind them; what their first tokens are chosen by, [R, V]."""
        language, device = self.language, prompts.inputs_embeds_BLD.device
        kind = _cache_kind(language, device, shared=group_size > 1)
        cache = self._cache
        if cache is None or (type(cache), cache.dtype, cache.device) != (kind, language.dtype, device):
            self.release()
            cache = kind(language.num_layers, *language.attention_shape, dtype=language.dtype, device=device)
            self._cache = cache
        if cache.start(lengths, batch.num_rows, batch.max_new_tokens):
            self._rows = _Rows(*cache.room, device)
            self._graphs.clear()
        if batch.eos_ids not in self._eos:
            self._eos[batch.eos_ids] = torch.tensor(batch.eos_ids, dtype=torch.long, device=device)
        last_ND = torch.cat(list(self._encode(prompts, lengths, cache)))
        prompt_of = [prompt for prompt in range(len(lengths)) for _ in range(group_size)]
        cache.set_rows(prompt_of)
        prompt_of_R = torch.tensor(prompt_of, device=device)
        # a prompt ends with text, which stands behind all that came before on every axis
        ends_N = torch.tensor(lengths, device=device).cumsum(0) - 1
        self._rows.begin(prompts.position_ids_4BL[:, 0, ends_N[prompt_of_R]] + 1, prompt_of_R)
        self._carry(prompts.mentions)
        return language.base.lm_head(last_ND)[prompt_of_R]

    def _carry(self, mentions: Mentions | None) -> None:
        """Keep what the prompts' names carry where graphs look for it."""
        if mentions is None:
            self._mentions = None
            return
        given_BPD, kept = mentions.carried_BPD, self._mentions
        if kept is None or len(kept.carried_BPD) < len(given_BPD) or kept.name_of_V is not mentions.name_of_V:
            table_BPD = torch.empty_like(given_BPD, dtype=self.language.dtype)
            self._mentions = kept = replace(mentions, carried_BPD=table_BPD)
        kept.carried_BPD[: len(given_BPD)] = given_BPD
        self._rows.name_R.fill_(mentions.none)  # a prompt does not end with a name

    def _encode(self, prompts: ModelInputs, lengths: Sequence[int], cache: KVCache | RowCache) -> Iterator[Tensor]:
        """Run the prompts, some at a time; hidden states of the last tokens of these, [some, D]."""
        first, start = 0, 0
        most = _TOGETHER_CPU if cache.device.type == "cpu" else _TOGETHER
        while first < len(lengths):
            last, end = first + 1, start + lengths[first]
            while last < len(lengths) and end + lengths[last] - start <= most:
                end, last = end + lengths[last], last + 1
            documents = Documents.of(lengths[first:last], cache.device)
            some = replace(
                prompts,
                inputs_embeds_BLD=prompts.inputs_embeds_BLD[:, start:end],
                position_ids_4BL=prompts.position_ids_4BL[:, :, start:end],
                attends=cache.prefill(documents, start),
            )
            yield self.language.hidden(some)[0, documents.starts_N[1:].long() - 1]
            first, start = last, end

    def _go_on(self, batch: _Batch) -> int:
        """Step after step until all rows have ended or said what they may; the number of tokens."""
        cache = self._cache
        assert cache is not None
        with_graphs = cache.fits_graphs and self.graphs is not False
        look = _LOOK if cache.fits_graphs and batch.on_token is None else 1
        for said in range(1, batch.max_new_tokens + 1):
            if batch.on_token is not None:
                self._tell(batch)
            if said == batch.max_new_tokens:
                break
            if (said - 1) % look == 0:
                ended = self._rows.ended_R[: batch.at_work].tolist()
                if all(ended):
                    return said
                self._let_go(batch, ended)
            cache.advance(said - 1)
            self._replay(batch) if with_graphs else self._step(batch)
        return batch.max_new_tokens

    def _tell(self, batch: _Batch) -> None:
        """Hand on the tokens that were chosen last."""
        assert batch.on_token is not None
        here = slice(batch.at_work)
        for row, token in zip(self._rows.number_R[here].tolist(), self._rows.token_R[here].tolist(), strict=True):
            if row not in batch.told:
                batch.on_token(row, token)
                if token in batch.eos_ids:
                    batch.told.add(row)

    def _let_go(self, batch: _Batch, ended: Sequence[bool]) -> None:
        """Take ended rows out; where steps may be graphs, as many as bring the rest to a number that has one."""
        assert self._cache is not None
        alive = ended.count(False)
        sizes = _SIZES if self._cache.fits_graphs else (alive,)
        wanted = min((size for size in sizes if size >= alive), default=batch.at_work)
        if wanted < batch.at_work:
            spare = [row for row, end in enumerate(ended) if end][: wanted - alive]
            rows = sorted([*(row for row, end in enumerate(ended) if not end), *spare])
            self._rows.keep(rows)
            self._cache.keep(rows)
            batch.at_work = wanted

    def _step(self, batch: _Batch) -> None:
        """Feed each row's last token, and choose its next."""
        rows, cache, language = self._rows, self._cache, self.language
        assert cache is not None
        positions_4R = rows.after_4R[:, : batch.at_work] + (rows.place_1 - 1)
        embeds_RD = language.embedding(rows.token_R[: batch.at_work])
        if self._mentions is not None:
            embeds_RD = embeds_RD + rows.carried(self._mentions, batch.at_work)
        nothing = rows.token_R[:0]
        inputs = ModelInputs(embeds_RD[None], None, positions_4R[:, None], nothing, nothing, cache)
        rows.take(language.base.lm_head(language.hidden(inputs)[0]), batch.temperature, self._eos[batch.eos_ids])

    def _replay(self, batch: _Batch) -> None:
        """A step as a graph, captured where there is none yet for what the batch is like.

        What joined blocks have made of the active adapter they renew when prompts are encoded: so each call encodes
        before it replays, under the adapter that it replays.
        """
        language, cache = self.language, self._cache
        assert cache is not None
        carried = 0 if self._mentions is None else self._mentions.carried_BPD.data_ptr()
        made_of = (language.fused, language.head_weight_VD.data_ptr(), carried)
        if made_of != self._made_of:  # the model was moved, or its blocks joined
            self._graphs.clear()
            self._made_of = made_of
        key = (batch.at_work, batch.temperature, batch.eos_ids, cache.fixed, language.active_adapter)
        if key not in self._graphs:
            self._graphs[key] = self._capture(batch, cache.device)
        self._graphs[key].replay()

    def _capture(self, batch: _Batch, device: torch.device) -> torch.cuda.CUDAGraph:
        """A step as a graph. All are made on one stream: cuBLAS keeps a workspace for each that it sees."""
        self._side = self._side or torch.cuda.Stream(device)
        current = torch.cuda.current_stream(device)
        self._side.wait_stream(current)
        with torch.cuda.stream(self._side):
            for _ in range(2):  # what compiles or allocates once does so now
                with self._rows.unmoved():
                    self._step(batch)
        current.wait_stream(self._side)
        graph = torch.cuda.CUDAGraph()
        pool = next(iter(self._graphs.values())).pool() if self._graphs else None
        # other threads may use the GPU meanwhile: one writes checkpoints
        with torch.cuda.graph(graph, pool=pool, stream=self._side, capture_error_mode="thread_local"):
            self._step(batch)
        return graph

    def _read(self, batch: _Batch, count: int) -> Decoded:
        """What was said, up to its end."""
        found = Decoded([], [], [])
        said = self._rows.ids_RS[: batch.num_rows, :count].tolist()
        for ids, logps in zip(said, self._rows.logps_RS[: batch.num_rows, :count].tolist(), strict=True):
            end = next((place for place, token in enumerate(ids) if token in batch.eos_ids), None)
            length = count if end is None else end + 1
            found.token_ids.append(ids[:length])
            found.logps.append(logps[:length])
            found.finished.append(end is not None)
        return found
