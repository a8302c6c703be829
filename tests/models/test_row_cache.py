"""The cache of rows that share no prompt against brute force, and when the decoder takes it."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from threedr1.models import decoding
from threedr1.models.attention import Documents
from threedr1.models.decoding import Decoder
from threedr1.models.inputs import IGNORE, TEXT, Row, assemble
from threedr1.models.kv_cache import KVCache
from threedr1.models.language_model import active_adapter, copy_lora, load_language_model
from threedr1.models.row_cache import RowCache

from .adapted import adapted

SCALE = 0.3


@pytest.fixture(scope="module")
def language(tiny_qwen):
    return load_language_model(tiny_qwen, dtype="float32").eval()


class Reference:
    """Each head of each row by itself, in float64, over lists of keys and values."""

    def __init__(self, lengths, key_LGE, value_LGE):
        self.rows = list(zip(key_LGE.double().split(lengths), value_LGE.double().split(lengths), strict=True))

    def keep(self, rows):
        self.rows = [self.rows[row] for row in rows]

    def attend(self, query_RHE, key_RGE, value_RGE):
        self.rows = [
            (torch.cat([keys, key_RGE[row, None].double()]), torch.cat([values, value_RGE[row, None].double()]))
            for row, (keys, values) in enumerate(self.rows)
        ]
        fold = query_RHE.shape[1] // key_RGE.shape[1]
        return torch.stack(
            [
                torch.stack(
                    [
                        (keys[:, head // fold] @ query_RHE[row, head].double() * SCALE).softmax(0)
                        @ values[:, head // fold]
                        for head in range(query_RHE.shape[1])
                    ]
                )
                for row, (keys, values) in enumerate(self.rows)
            ]
        )


def decode(cache, lengths, steps, *, seed, kept_after=(), dtype=torch.float32, parts=1):
    """Run prompts and steps, rows leaving after some of them; of each step what the cache and the reference give."""
    generator = torch.Generator().manual_seed(seed)

    def random(count, heads):
        return torch.randn(count, heads, 16, generator=generator).to(dtype)

    cache.start(lengths, len(lengths), steps)
    key, value, query = random(sum(lengths), 2), random(sum(lengths), 2), random(sum(lengths), 4)
    cut = len(lengths) // parts
    for first in range(0, len(lengths), cut):
        some, start = lengths[first : first + cut], sum(lengths[:first])
        here = slice(start, start + sum(some))
        cache.prefill(Documents.of(some, "cpu"), start).attend(1, query[here], key[here], value[here], SCALE)
    cache.set_rows(range(len(lengths)))
    reference, found = Reference(lengths, key, value), []
    rows = len(lengths)
    for step in range(steps):
        cache.advance(step)
        joined = random(rows, 8)  # parts of one product, as fused blocks give them
        new = joined.split([4, 2, 2], dim=1)
        found.append((cache.attend(1, *new, SCALE).double(), reference.attend(*new)))
        for kept in (kept for after, kept in kept_after if after == step):
            cache.keep(kept)
            reference.keep(kept)
            rows = len(kept)
    return found


def new_cache(dtype=torch.float32):
    return RowCache(2, 4, 2, 16, dtype=dtype, device=torch.device("cpu"))


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=5), st.integers(1, 4), st.integers(0, 99), st.data())
def test_steps_equal_brute_force(lengths, steps, seed, data):
    kept_after, rows = [], len(lengths)
    for step in range(steps):
        if rows > 1 and data.draw(st.booleans()):
            kept = sorted(data.draw(st.sets(st.integers(0, rows - 1), min_size=1)))
            kept_after.append((step, kept))
            rows = len(kept)
    parts = data.draw(st.sampled_from([1, len(lengths)]))
    for ours, expected in decode(new_cache(), lengths, steps, seed=seed, kept_after=kept_after, parts=parts):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_half_precision_is_rounded_once():
    for ours, expected in decode(new_cache(torch.bfloat16), [3, 9], 3, seed=1, dtype=torch.bfloat16):
        torch.testing.assert_close(ours, expected, atol=2e-2, rtol=2e-2)


def test_a_buffer_serves_batches_of_other_shapes_whatever_stood_in_it():
    cache = new_cache()
    sizes = []
    for lengths, steps in (([4, 4], 3), ([9], 2), ([2, 5, 1], 2), ([12, 3], 4)):
        cache._buffer.fill_(float("nan"))
        for ours, expected in decode(cache, lengths, steps, seed=steps):
            torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
        sizes.append(len(cache._buffer))
    # of keys and values of two layers, two heads of 16: 2 x (4 + 3), then 2 x (12 + 4) columns
    assert sizes == [2 * 2 * 2 * 16 * 14] * 2 + [2 * 2 * 2 * 16 * 3 * 7, 2 * 2 * 2 * 16 * 32]
    assert cache.room == (3, 4) and not cache.start([2], 1, 4) and cache.start([2], 1, 5)


# The decoder's choice ----------------------------------------------------------------------------------------------


def packed(language, lengths=(9, 14, 5)):
    generator = torch.Generator().manual_seed(2)
    ids = [torch.randint(20, 300, (length,), generator=generator).tolist() for length in lengths]
    rows = [Row(its, [TEXT] * len(its), [IGNORE] * len(its), []) for its in ids]
    with torch.no_grad():
        return assemble(
            rows,
            embed_tokens=language.embedding,
            scene_tokens=None,
            image_tokens=None,
            pad_id=language.pad_id,
            packed_length=0,
        )


def run(decoder, inputs, **changes):
    return decoder(inputs, inputs.attends.starts_N.diff().tolist(), **{"max_new_tokens": 10, "eos_ids": [], **changes})


def streams(count):
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def test_rows_that_share_a_prompt_and_rows_that_do_not_take_turns(language, monkeypatch):
    inputs, decoder = packed(language), Decoder(language)
    alone = run(decoder, inputs, temperature=1.0, generators=streams(3))
    assert type(decoder._cache) is RowCache
    group = run(decoder, inputs, group_size=2, temperature=1.0, generators=streams(6))
    assert type(decoder._cache) is KVCache
    assert run(decoder, inputs, temperature=1.0, generators=streams(3)) == alone
    assert group == run(Decoder(language), inputs, group_size=2, temperature=1.0, generators=streams(6))
    monkeypatch.setattr(decoding, "_cache_kind", lambda *_, **__: KVCache)
    other = run(Decoder(language), inputs, temperature=1.0, generators=streams(3))
    assert other.token_ids == alone.token_ids
    torch.testing.assert_close(torch.tensor(other.logps), torch.tensor(alone.logps), atol=1e-5, rtol=1e-5)


def test_rows_leave_one_by_one(language):
    """Every row ends at a token of its own; the others say what they say alone."""
    inputs = packed(language)
    free = run(Decoder(language), inputs, temperature=1.0, generators=streams(3))
    ends = {free.token_ids[row][place] for row, place in ((1, 2), (0, 5))}
    cut = run(Decoder(language), inputs, temperature=1.0, generators=streams(3), eos_ids=sorted(ends))
    for ours, whole in zip(cut.token_ids, free.token_ids, strict=True):
        end = next((place for place, token in enumerate(whole) if token in ends), len(whole) - 1)
        assert ours == whole[: end + 1]
    assert len({len(ids) for ids in cut.token_ids}) > 1


@pytest.mark.parametrize("fused", [False, True])
def test_each_call_answers_by_the_adapter_that_is_active_then(tiny_qwen, fused):
    language = adapted(tiny_qwen, std=0.3).eval()
    copy_lora(language, "policy", "ref")
    inputs, plain = packed(language), Decoder(language)
    with active_adapter(language, "ref"):
        before = run(plain, inputs)
    with language.model.disable_adapter():
        base = run(plain, inputs)
    if fused:
        language.fuse_blocks()
    decoder = Decoder(language)
    with torch.no_grad():
        for name, parameter in language.named_parameters():
            if "lora_B.policy" in name:
                parameter.mul_(-1)
    moved = run(decoder, inputs)
    assert moved.token_ids != before.token_ids != base.token_ids
    with active_adapter(language, "ref"):
        assert run(decoder, inputs).token_ids == before.token_ids
    assert run(decoder, inputs) == moved
    with language.model.disable_adapter():
        assert run(decoder, inputs).token_ids == base.token_ids


def test_an_adapter_is_settled_for_one_call_alone(tiny_qwen):
    language = adapted(tiny_qwen).eval()
    language.fuse_blocks()
    inputs = packed(language)
    assert language.fused is not None
    products, asked = language.fused.products, []

    def stop(row, token):
        asked.append([product.settled for product in products])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(Decoder(language), replace(inputs), on_token=stop)
    assert len(asked[0]) == 4 * language.num_layers and None not in asked[0]
    assert {product.settled for product in products} == {None}
