"""The decoding loop against transformers' generate, and its own promises."""

import pytest
import torch

from threedr1.models.decoding import decode, pick_tokens
from threedr1.models.inputs import IMAGE, RowWriter, assemble
from threedr1.models.language_model import load_language_model
from threedr1.models.lm_head import token_logprobs


@pytest.fixture(scope="module")
def language(tiny_qwen):
    return load_language_model(tiny_qwen, dtype="float32").eval()


def prompts(language, left=True):
    writer = RowWriter(language.tokenizer, merge_size=2)
    texts = ["Where is the chair?", "How many red desks stand next to the chair?", "Look"]
    rows = [
        writer.write(system="See.", question=text, num_proposals=0, num_layout_tokens=0, grids=[(1, 4, 4)])
        for text in texts
    ]
    torch.manual_seed(0)
    pixels = torch.randn(3 * 16, 1176)
    grids = torch.tensor([[1, 4, 4]] * 3)
    with torch.no_grad():
        inputs = assemble(
            rows,
            embed_tokens=language.embedding,
            scene_tokens=[],
            image_tokens=language.embed_images(pixels, [(1, 4, 4)] * 3),
            pad_id=language.tokenizer.pad_token_id,
            left=left,
        )
    return rows, pixels, grids, inputs


def run(language, inputs, **changes):
    arguments = {"eos_ids": language.eos_ids, "max_new_tokens": 12, **changes}
    return decode(language.decoder, language.base.lm_head, language.embedding, inputs, **arguments)


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
    alone = type(inputs)(
        inputs.inputs_embeds_BLD[1:2],
        inputs.attention_mask_BL[1:2],
        inputs.position_ids_4BL[:, 1:2],
        inputs.predicting_T,
        inputs.targets_T,
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
