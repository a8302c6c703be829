"""GRPO's benchmark: whole steps of the lengths it says, TRL as it is meant to run, too little memory."""

import gc
import sys
from pathlib import Path

import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from threedr1.benchmarks import _grpo_peer, grpo, run_benchmark
from threedr1.benchmarks._grpo_peer import Clock, PeerResult, TrlPeer, Workload, check_lengths, exact_prompts
from threedr1.benchmarks.results import Row, read_results
from threedr1.benchmarks.sft import WORDS
from threedr1.models.language_model import LanguageModel
from threedr1.models.tiny import build_tiny

KEYS = {"step_s", "rollout_s", "update_s", "decode_tokens_per_s", "first_token_s"}
FOUND = PeerResult(1.0, 0.5, 0.4, 0.2, 0.3, 60.0, "settings")


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    return build_tiny(tmp_path_factory.mktemp("tiny") / "language", [" ".join(WORDS)] * 50)


def test_it_measures_whole_steps_of_the_lengths_it_says(tmp_path: Path):
    threads = torch.get_num_threads()
    words = ["--prompts", "2", "--group", "2", "--runs", "short", "--repeats", "1", "--threads", "1", "--peers"]
    words += ["--folder", str(tmp_path)]
    results = tmp_path / "results.json"
    try:
        assert run_benchmark("grpo", [*words, "--short", "470", "32", "--record", str(results)]) == 0
        with pytest.raises(ValueError, match="A prompt with one view has .* tokens"):
            run_benchmark("grpo", [*words, "--short", "100", "32"])
    finally:
        torch.set_num_threads(threads)
    rows = {row["name"]: row for row in read_results(results)}
    assert set(rows) == {f"grpo.{key}" for key in KEYS}
    assert all(row["value"] > 0 and row["peer_value"] is None for row in rows.values())
    step, parts = rows["grpo.step_s"]["value"], (rows["grpo.rollout_s"]["value"], rows["grpo.update_s"]["value"])
    assert step == pytest.approx(sum(parts), rel=0.01)  # as far as digits are recorded
    assert "2 prompts x 2 samples, 470 + 32 tokens" in rows["grpo.step_s"]["note"]


def test_trl_takes_whole_steps_in_passes_that_share_a_group(language: Path, monkeypatch):
    pytest.importorskip("trl")
    work = Workload(2, 4, 40, 5, rank=4)
    monkeypatch.setattr(_grpo_peer, "TOKENS_OF_A_PASS", 90)
    assert work.rows_of_a_pass() == 2
    found = TrlPeer(language, work, "cpu").measure(repeats=2)
    assert found.step_s > found.generate_s > found.decode_s > 0 and found.score_s > 0 and found.update_s > 0
    assert "2 rows a pass, gradient checkpointing off" in found.settings
    gc.collect()
    alive = [entry for entry in gc.get_objects() if isinstance(entry, Qwen2_5_VLForConditionalGeneration)]
    assert not alive  # ours would have to share the GPU with it


def test_without_trl_the_benchmark_says_so_and_goes_on(language: Path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "trl", None)
    arguments = type("Arguments", (), {"peers": ["trl"], "device": "cpu", "repeats": 1})
    assert grpo.measure_peer(language.parent, Workload(1, 2, 8, 2), arguments) is None  # type: ignore[arg-type]
    assert "trl" in capsys.readouterr().out.lower()


def test_a_peer_that_does_not_fit_tries_fewer_rows_then_checkpointing(language: Path, monkeypatch):
    tried = []

    def steps(self, repeats, warm, rows, checkpointing):
        tried.append((rows, checkpointing))
        if len(tried) < fitting:
            raise torch.OutOfMemoryError
        return FOUND

    monkeypatch.setattr(TrlPeer, "_steps", steps)
    peer = TrlPeer(language, Workload(8, 8, 600, 256), "cpu")
    fitting = 5
    assert peer.measure(1) is FOUND
    assert tried == [(4, False), (2, False), (1, False), (4, True), (2, True)]
    tried.clear()
    fitting = 100
    with pytest.raises(torch.OutOfMemoryError):
        peer.measure(1)
    assert tried[-1] == (1, True)


@pytest.mark.parametrize(
    ("prompt_tokens", "new_tokens", "rows"), [(600, 256, 4), (2500, 300, 1), (5000, 300, 1), (30, 2, 64)]
)
def test_rows_of_a_pass(prompt_tokens: int, new_tokens: int, rows: int):
    """4096 // 856 is 4; longer rows go alone; a step has 64."""
    assert Workload(8, 8, prompt_tokens, new_tokens).rows_of_a_pass() == rows


def test_prompts_have_exactly_the_tokens_asked_for(language: Path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(language)
    prompts = exact_prompts(tokenizer, 3, 37)
    assert len(set(prompts)) == 3 and {len(tokenizer(prompt)["input_ids"]) for prompt in prompts} == {37}


def test_completions_of_another_length_are_not_measured():
    check_lengths([5, 5], Workload(1, 2, 8, 5))
    with pytest.raises(ValueError, match="4 to 5 tokens, not 5"):
        check_lengths([5, 4], Workload(1, 2, 8, 5))


def test_a_clock_leaves_out_the_steps_that_warm_up():
    clock = Clock(torch.device("cpu"), warm=1)
    clock._steps, clock._prepare, clock._generate = [9.0, 2.0, 4.0, 3.0], [8.0, 1.5, 1.5, 2.0], [7.0, 1.0, 1.25, 1.0]
    clock._decode = [6.0, 0.75, 0.5, 1.0]
    found = clock.result()
    times = (found.step_s, found.generate_s, found.decode_s, found.score_s, found.update_s)
    assert times == (3.0, 1.0, 0.75, 0.5, 1.0)


def test_nothing_ends_a_completion_for_as_long_as_it_is_asked():
    before = LanguageModel.eos_ids
    with pytest.raises(KeyError), grpo.endless():
        assert LanguageModel.eos_ids.fget(None) == []  # type: ignore[attr-defined]
        raise KeyError
    assert LanguageModel.eos_ids is before


def test_rows_stand_beside_the_peers_of_the_same_phase():
    work = Workload(8, 8, 600, 256)
    ours = grpo.Times(step_s=0.8, rollout_s=0.6, decode_s=0.51, update_s=0.2, peak_gib=30.0, num_views=1)
    assert ours.first_token_s == pytest.approx(0.09)
    rows = {row.name: row for row in grpo.rows_of("grpo.", work, ours, FOUND)}
    assert set(rows) == {f"grpo.{key}" for key in KEYS | {"peak_gib"}}
    assert rows["grpo.step_s"].ratio == pytest.approx(1.25) and rows["grpo.update_s"].peer_value == pytest.approx(0.5)
    decode = rows["grpo.decode_tokens_per_s"]
    assert decode.value == pytest.approx(64 * 255 / 0.51) and decode.peer_value == pytest.approx(64 * 255 / 0.4)
    assert decode.ratio == pytest.approx(0.4 / 0.51) and rows["grpo.first_token_s"].peer_value == pytest.approx(0.1)
    assert rows["grpo.peak_gib"].ratio == 2.0 and "settings" in decode.note


def test_targets():
    assert grpo.reached([Row("grpo.step_s", 5.0, "s"), Row("grpo.decode_tokens_per_s", 8000.0, "tokens/s")])
    assert not grpo.reached([Row("grpo.step_s", 5.1, "s")])
    assert not grpo.reached([Row("grpo.long_prompt_step_s", 8.1, "s")])
    assert not grpo.reached([Row("grpo.decode_tokens_per_s", 7999.0, "tokens/s")])
    assert grpo.reached([Row("grpo.long_prompt_decode_tokens_per_s", 10.0, "tokens/s")])
