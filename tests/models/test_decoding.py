"""The decoding loop against transformers' generate, and its own promises."""

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from threedr1.models.attention import Documents
from threedr1.models.decoding import Decoder, pick_tokens
from threedr1.models.inputs import IMAGE, RowWriter, assemble
from threedr1.models.kv_cache import KVCache
from threedr1.models.language_model import load_language_model
from threedr1.models.lm_head import token_logprobs

from .adapted import adapted

TEXTS = ("Where is the chair?", "How many red desks stand next to the chair?", "Look")


@pytest.fixture(scope="module")
def language(tiny_qwen):
    return load_language_model(tiny_qwen, dtype="float32").eval()


def prompts(language, texts=TEXTS):
    writer = RowWriter(language.tokenizer, merge_size=2)
    rows = [
        writer.write(system="See.", question=text, num_proposals=0, num_layout_tokens=0, grids=[(1, 4, 4)])
        for text in texts
    ]
    torch.manual_seed(0)
    pixels = torch.randn(3 * 16, 1176)[: len(texts) * 16]
    grids = torch.tensor([[1, 4, 4]] * len(texts))
    with torch.no_grad():
        inputs = assemble(
            rows,
            embed_tokens=language.embedding,
            scene_tokens=None,
            image_tokens=language.embed_images(pixels, [(1, 4, 4)] * len(texts)),
            pad_id=language.tokenizer.pad_token_id,
            packed_length=0,
        )
    return rows, pixels, grids, inputs


def run(language, inputs, **changes):
    lengths = inputs.attends.starts_N.diff().tolist()
    return Decoder(language)(inputs, lengths, **{"max_new_tokens": 12, **changes})


def generators(count, seed=0):
    return [torch.Generator().manual_seed(seed + row) for row in range(count)]


def test_greedy_equals_generate_token_by_token(language):
    rows, pixels, grids, inputs = prompts(language)
    ours = run(language, inputs)
    for index, row in enumerate(rows):
        theirs = language.base.generate(
            input_ids=torch.tensor([row.token_ids]),
            pixel_values=pixels[16 * index : 16 * index + 16],
            image_grid_thw=grids[index : index + 1],
            mm_token_type_ids=torch.tensor([[int(kind == IMAGE) for kind in row.kinds]]),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=language.eos_ids,
        )[0, len(row.token_ids) :]
        assert ours.token_ids[index] == theirs.tolist()


def test_a_sample_depends_on_its_own_stream_alone(language):
    _, _, _, inputs = prompts(language)
    together = run(language, inputs, group_size=2, temperature=1.0, generators=generators(6))
    again = run(language, inputs, group_size=2, temperature=1.0, generators=generators(6))
    assert together.token_ids == again.token_ids
    start, end = inputs.attends.starts_N[1:3].tolist()
    alone = replace(
        inputs,
        inputs_embeds_BLD=inputs.inputs_embeds_BLD[:, start:end],
        position_ids_4BL=inputs.position_ids_4BL[:, :, start:end],
        attends=Documents.of([end - start], "cpu"),
    )
    single = run(language, alone, group_size=2, temperature=1.0, generators=generators(6)[2:4])
    assert single.token_ids == together.token_ids[2:4]
    assert len({tuple(ids) for ids in together.token_ids}) > 1


def test_kept_logprobs_equal_recomputed_ones(language):
    rows, pixels, grids, inputs = prompts(language)
    temperature = 0.7
    sampled = run(language, inputs, temperature=temperature, generators=generators(3))
    for index, row in enumerate(rows):
        completion = sampled.token_ids[index]
        with torch.no_grad():
            hidden = language.base.model(
                input_ids=torch.tensor([row.token_ids + completion]),
                pixel_values=pixels[16 * index : 16 * index + 16],
                image_grid_thw=grids[index : index + 1],
                mm_token_type_ids=torch.tensor([[int(kind == IMAGE) for kind in row.kinds] + [0] * len(completion)]),
            ).last_hidden_state[0]
        start = len(row.token_ids) - 1
        logps = token_logprobs(
            hidden[start : start + len(completion)],
            language.head_weight_VD.detach(),
            torch.tensor(completion),
            temperature=temperature,
        ).logps_T
        torch.testing.assert_close(logps, torch.tensor(sampled.logps[index]), atol=2e-5, rtol=1e-4)


def test_finished_rows_leave_without_touching_the_others(language):
    """A token that row 1 emits is made an end token: row 1 stops there and the others go on as before."""
    _, _, _, inputs = prompts(language)
    free = run(language, inputs, temperature=1.0, generators=generators(3))
    stop = next(token for token in free.token_ids[1] if token not in free.token_ids[0] + free.token_ids[2])
    cut = run(language, inputs, eos_ids=[stop], temperature=1.0, generators=generators(3))
    where = free.token_ids[1].index(stop)
    assert cut.token_ids[1] == free.token_ids[1][: where + 1]
    assert cut.finished[1] and not cut.finished[0]
    assert cut.token_ids[0] == free.token_ids[0] and cut.token_ids[2] == free.token_ids[2]


def test_first_token_may_end_and_length_limit_marks_unfinished(language):
    _, _, _, inputs = prompts(language)
    free = run(language, inputs)
    ended = run(language, inputs, eos_ids=[free.token_ids[0][0]])
    assert ended.token_ids[0] == free.token_ids[0][:1] and ended.finished[0]
    short = run(language, inputs, max_new_tokens=1)
    assert [len(ids) for ids in short.token_ids] == [1, 1, 1] and not any(short.finished)


def test_inverse_cdf_sampling_follows_the_distribution():
    logits = torch.tensor([[1.0, 0.0, -1.0, 2.0]])
    uniform = torch.linspace(0, 1, 20_001, dtype=torch.float64)[:-1]
    token, logp = pick_tokens(logits.expand(len(uniform), 4), 2.0, uniform)
    expected = torch.softmax(logits[0] / 2.0, dim=0)
    torch.testing.assert_close(torch.bincount(token, minlength=4) / len(uniform), expected, atol=1e-3, rtol=0)
    torch.testing.assert_close(logp, expected.log()[token])


def test_sampling_without_generators_is_refused(language):
    _, _, _, inputs = prompts(language)
    with pytest.raises(ValueError, match="needs as many generators"):
        run(language, inputs, temperature=1.0)


# The engine --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
def test_a_group_is_sampled_from_the_policy_that_is_trained(tiny_qwen, fused):
    """Log-probabilities kept while decoding equal those of the trainer's forward pass over the shared prompt."""
    language = adapted(tiny_qwen).eval()
    if fused:
        language.fuse_blocks()
    rows, _, _, inputs = prompts(language)
    ends = range(0, 400, 4)
    sampled = run(
        language, inputs, max_new_tokens=20, group_size=4, temperature=1.3, generators=generators(12), eos_ids=ends
    )
    lengths = {len(ids) for ids in sampled.token_ids}
    assert len(lengths) > 1  # rows left at different times
    with torch.no_grad():
        groups = assemble(
            rows,
            embed_tokens=language.embedding,
            scene_tokens=None,
            image_tokens=images_of(inputs, rows),
            pad_id=language.pad_id,
            packed_length=0,
            completions=[sampled.token_ids[start : start + 4] for start in range(0, 12, 4)],
        )
        hidden = language.hidden(groups)[0][groups.predicting_T]
        logps = token_logprobs(hidden, language.head_weight_VD, groups.targets_T, temperature=1.3).logps_T
    kept = [value for its in sampled.logps for value in its]
    torch.testing.assert_close(logps, torch.tensor(kept), atol=3e-5, rtol=1e-4)


def images_of(inputs, rows):
    """What stands at the images of packed rows."""
    kinds = torch.tensor([kind for row in rows for kind in row.kinds])
    return inputs.inputs_embeds_BLD[0, kinds == IMAGE]


def test_groups_batches_and_reuse_change_nothing(language, monkeypatch):
    _, _, _, inputs = prompts(language)
    lengths = inputs.attends.starts_N.diff().tolist()
    decoder = Decoder(language)
    options = {"max_new_tokens": 10, "temperature": 1.0}
    together = decoder(inputs, lengths, group_size=2, generators=generators(6), **options)
    monkeypatch.setattr("threedr1.models.decoding._TOGETHER_CPU", 20)  # prompts are encoded one by one
    assert decoder(inputs, lengths, group_size=2, generators=generators(6), **options).token_ids == together.token_ids
    # a smaller batch with the same buffers, then a larger one
    _, _, _, two = prompts(language, TEXTS[:2])
    few = decoder(two, lengths[:2], max_new_tokens=3)
    assert few.token_ids == run(language, two, max_new_tokens=3).token_ids
    again = decoder(inputs, lengths, group_size=2, generators=generators(6), **options)
    assert again.token_ids == together.token_ids and again.logps == together.logps
    decoder.release()
    assert decoder(inputs, lengths, group_size=2, generators=generators(6), **options).token_ids == again.token_ids


def test_tokens_are_told_as_they_come(language):
    _, _, _, inputs = prompts(language)
    heard: dict[int, list[int]] = {0: [], 1: [], 2: []}
    free = run(language, inputs, temperature=1.0, generators=generators(3))
    stop = free.token_ids[0][4]
    said = run(
        language,
        inputs,
        temperature=1.0,
        generators=generators(3),
        eos_ids=[stop],
        on_token=lambda row, token: heard[row].append(token),
    )
    assert [heard[row] for row in range(3)] == said.token_ids
    assert len(said.token_ids[0]) < len(free.token_ids[0])


def test_without_an_end_all_rows_are_as_long_as_they_may_be(language):
    _, _, _, inputs = prompts(language)
    said = run(language, inputs, temperature=2.0, generators=generators(3), eos_ids=[])
    assert [len(ids) for ids in said.token_ids] == [12] * 3 and not any(said.finished)


def test_padded_prompts_are_refused(language):
    rows, _, _, inputs = prompts(language)
    with pytest.raises(ValueError, match="packed prompts without padding"):
        Decoder(language)(inputs, [len(row.token_ids) for row in rows[:2]], max_new_tokens=3)


def test_decoding_works_whatever_attention_was_chosen(tiny_qwen, language):
    other = load_language_model(tiny_qwen, dtype="float32", attention="eager").eval()
    _, _, _, inputs = prompts(other)
    assert run(other, inputs).token_ids == run(language, prompts(language)[3]).token_ids
    assert other.attention == "eager"


@pytest.mark.parametrize("vocabulary", [5, 512, 1300])
def test_draws_equal_a_search_in_the_whole_distribution(vocabulary):
    generator = torch.Generator().manual_seed(vocabulary)
    logits = 4 * torch.randn(64, vocabulary, generator=generator)
    logits[:, : vocabulary // 3] = float("-inf")
    uniform = torch.rand(64, generator=generator, dtype=torch.float64)
    uniform[:2] = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    token, _ = pick_tokens(logits, 1.0, uniform)
    cdf = torch.softmax(logits, -1).double().cumsum(-1)
    expected = (cdf <= uniform[:, None] * cdf[:, -1:]).sum(1)
    assert torch.equal(token[2:], expected[2:])
    assert bool(torch.isfinite(logits.gather(1, token[:, None])).all())


# Attention of a step ----------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.integers(1, 6), st.integers(1, 3)), min_size=1, max_size=3),
    st.integers(1, 4),
    st.data(),
)
def test_a_steps_attention_equals_brute_force(prompts_and_rows, steps, data):
    """Prompts of some lengths with some rows each, of which some leave; float64 of every head by itself."""
    lengths = [length for length, _ in prompts_and_rows]
    prompt_of = [prompt for prompt, (_, rows) in enumerate(prompts_and_rows) for _ in range(rows)]
    cache = KVCache(2, 4, 2, 16, dtype=torch.float32, device=torch.device("cpu"))
    cache.start(lengths, len(prompt_of), steps)
    generator = torch.Generator().manual_seed(len(prompt_of) * 7 + steps)

    def random(*shape):
        return torch.randn(*shape, 16, generator=generator)

    key, value, query = random(sum(lengths), 2), random(sum(lengths), 2), random(sum(lengths), 4)
    cache.prefill(Documents.of(lengths, "cpu"), 0).attend(1, query, key, value, 0.3)
    starts = [sum(lengths[:prompt]) for prompt in range(len(lengths))]
    own = [[part[starts[p] : starts[p] + lengths[p]] for part in (key, value)] for p in prompt_of]
    cache.set_rows(prompt_of)
    for step in range(steps):
        cache.advance(step)
        count = len(own)
        query, key, value = random(count, 4), random(count, 2), random(count, 2)
        ours = cache.attend(1, query, key, value, 0.3)
        for row in range(count):
            own[row] = [torch.cat([old, new[row : row + 1]]) for old, new in zip(own[row], (key, value), strict=True)]
            for head in range(4):
                its_keys, its_values = (part[:, head // 2].double() for part in own[row])
                weights = (its_keys @ query[row, head].double() * 0.3).softmax(0)
                torch.testing.assert_close(ours[row, head].double(), weights @ its_values, atol=1e-5, rtol=1e-5)
        if count > 1 and data.draw(st.booleans()):
            kept = sorted(data.draw(st.sets(st.integers(0, count - 1), min_size=1)))
            cache.keep(kept)
            own = [own[row] for row in kept]
