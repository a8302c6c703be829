"""The proof's page: what is kept of a run, what the tables say of known numbers, and that the page is the files'."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import threedr1
from threedr1.benchmarks import _proof_page as proof_page
from threedr1.benchmarks import _proof_thoughts, proof
from threedr1.benchmarks._proof_runs import Asked, Run, collect, read_runs, thinned, write_run
from threedr1.utils.predictions import Prediction, write_predictions

ROOT = Path(threedr1.__file__).resolve().parent


def run(name: str, seed: int, rate: float, **scores) -> Run:
    """A run that answers the same share of 100 questions of each kind, each about another scene."""
    right = [1.0] * round(100 * rate) + [0.0] * (100 - round(100 * rate))
    kinds = dict.fromkeys(proof_page.HEADLINE, right) | scores
    curves = {"loss": ([0.0, 9.0], [2.0, 1.0])}
    asked = {metric.partition("/")[0]: Asked("0123", [1] * len(values)) for metric, values in kinds.items()}
    typed = f"SEEDS={seed} bash script/proof.sh {name}"
    return Run(name, seed, typed, "abc", "a GPU", "torch 2.11", kinds, asked, curves)


@pytest.fixture
def runs() -> list[Run]:
    return [run(name, seed, rate) for name, rate in (("blind", 0.1), ("sft", 0.5), ("grpo", 0.6)) for seed in range(3)]


def test_a_run_is_read_back_as_it_was_written(tmp_path):
    made = run("grpo.format+semantic", 2, 0.25, **{"planning/CIDEr": [0.1, 2.5, 0.0]})
    path = write_run(made, tmp_path)
    assert path.name == "grpo.format+semantic-2.json"
    assert json.loads(path.read_text())["scores"]["sqa3d/EM"] == "1" * 25 + "0" * 75
    assert read_runs(tmp_path) == [made]


@pytest.mark.parametrize("content", ["{", "[]", '{"name": "sft"}', '{"scores": {}, "curves": {}, "more": 1}'])
def test_a_file_that_is_no_run_is_named(tmp_path, content):
    (tmp_path / "sft-0.json").write_text(content)
    with pytest.raises(ValueError, match=r"sft-0.json is not a run of the proof"):
        read_runs(tmp_path)


def test_curves_are_thinned_to_means_at_their_last_steps():
    steps = [float(step) for step in range(10)]
    assert thinned((steps, [2 * step for step in steps]), most=4) == ([2.0, 5.0, 8.0, 9.0], [2.0, 8.0, 14.0, 18.0])
    assert thinned((steps, steps), most=10) == (steps, steps) and thinned(([], [])) == ([], [])


def test_tables_hold_means_and_differences_of_known_numbers(runs):
    page = proof_page.render(runs)
    grounding = proof_page.estimate(runs, "sft", "scanrefer/Acc@0.25")
    assert grounding.mean == pytest.approx(50) and 38 < grounding.low < 42 and 58 < grounding.high < 62
    gained = proof_page.gain(runs, "sft", "blind", "scanrefer/Acc@0.25")
    assert gained.mean == pytest.approx(40) and 29 < gained.low < gained.mean < gained.high < 51
    assert page.count("| yes |") == 4 and "**no**" not in page
    assert "| blind | 3 | 10.0 (" in page and "| SFT + GRPO | 3 | 60.0 (" in page
    assert "| all three | 3 |" in page and "- all three: grounding, ScanRefer's form, Acc@0.25 +10.0 (" in page


def test_what_does_not_hold_is_said():
    same = [run(name, 0, 0.3) for name in ("blind", "sft", "grpo")]
    page = proof_page.render(same)
    assert page.count("| **no** |") == 3 and "+0.0 (+0.0 to +0.0)" in page  # questions are not lost
    assert "No difference from *none (SFT)* lies beyond its interval." in page
    worse = [run("sft", 0, 0.9), run("grpo", 0, 0.1)]
    assert re.search(r"of questions \| -80\.00 \([^)]*\) \| \*\*no\*\* \|", proof_page.render(worse))


def test_it_is_said_where_a_mean_is_beyond_a_bound_and_its_interval_is_not():
    scores = {"blind": 0.1, "sft": 0.35}
    page = proof_page.render([run(name, seed, scores[name]) for seed in (0, 1) for name in scores])
    assert page.count("| yes, by the mean; the interval reaches below 20 |") == 2


def test_a_wide_interval_does_not_show_that_nothing_is_lost():
    few = [run("sft", seed, 0.5) for seed in (0, 1)] + [run("grpo", 0, 0.4), run("grpo", 1, 0.6)]
    assert "| **not shown** |" in proof_page.render(few)


def test_differences_take_only_seeds_that_both_have(runs):
    some = [entry for entry in runs if not (entry.name == "grpo" and entry.seed == 0)]
    assert proof_page.gain(some, "grpo", "sft", "sqa3d/EM").runs == 2
    assert proof_page.gain(runs, "grpo", "views.ours", "sqa3d/EM") is None


def test_runs_that_were_asked_other_questions_are_not_compared(runs):
    runs[0].asked["scanrefer"] = Asked("4567", [1] * 100)
    with pytest.raises(ValueError, match="blind-1 and blind-0 were not asked the same questions of scanrefer"):
        proof_page.estimate(runs, "blind", "scanrefer/Acc@0.25")
    with pytest.raises(ValueError, match="were not asked the same questions of scanrefer"):
        proof_page.gain(runs[:1] + runs[3:4], "sft", "blind", "scanrefer/Acc@0.25")
    assert proof_page.estimate(runs, "blind", "scanqa/EM").mean == pytest.approx(10)


def test_a_summary_stands_before_the_tables_and_ranks_are_drawn_without_what_they_begin_with(runs):
    drawn = {"loss": ([1.0, 2.0], [3.0, 2.0])}
    ranks = [replace(run(name, 0, 0.4), curves=drawn) for name in ("views.ours", "lora.4", "lora.12")]
    page = proof_page.render([*runs, *ranks], summary="In short: yes.\n")
    assert page.index("In short: yes.\n\n## Blind") < page.index("| before | 1 |") < page.index("proof/ranks.png")
    assert [list(panel.curves) for panel in proof_page.panels(ranks)["ranks.png"]] == [["rank 4", "rank 12"]]


def test_a_table_waits_for_a_row_of_its_own(runs):
    runs = [*runs, run("views.ours", 0, 0.4)]  # a row of tables 8, 10 and 11
    page = proof_page.render(runs)
    assert page.count("| selected | 1 |") == 1 and "| text, image | 1 |" not in page and "| before | 1 |" not in page
    assert set(proof_page.panels(runs)) == {"sft.png", "views.png"}
    runs += [run("lora.12", 0, 0.7), run("lora.4", 0, 0.5)]
    page = proof_page.render(runs)
    rows = [line.split(" |")[0] for line in page.splitlines() if line.startswith(("| before", "| rank"))]
    assert rows == ["| before", "| rank 4", "| rank 12"] and "- rank 4: questions, ScanQA's form, EM -20.0 (" in page
    assert "ranks.png" in proof_page.panels(runs) and "| text, image | 1 |" not in page


def test_a_page_of_nothing_says_so():
    page = proof_page.render([])
    assert page.count("Not measured yet.") == 6 and "Nothing has been measured yet." in page


def answers(dataset: str, task: str, **fields) -> list[Prediction]:
    made = []
    for number in (1, 2, 0):  # out of order; two about one scene
        given = {name: values[number] for name, values in fields.items()}
        made.append(
            Prediction(
                sample_id=f"{dataset}-{number}",
                scene_id=f"scene000{number // 2}_00",
                task=task,
                question="?",
                text="",
                well_formed=number == 0,
                meta={"dataset": dataset, "mode": "think"},
                **given,
            )
        )
    return made


def started(commit: str) -> str:
    facts = {"typed": "SEEDS=1 bash script/proof.sh sft", "commit": commit, "machine": "a GPU"}
    return json.dumps({"step": 0, **facts, "versions": {"python": "3.12", "torch": "2.11"}}) + "\n"


def test_runs_are_collected_from_predictions_and_metrics(tmp_path, capsys):
    box, far = [[0.0, 0, 0, 1, 1, 1, 0]], [[9.0, 0, 0, 1, 1, 1, 0]]
    folder = tmp_path / "eval" / "sft-1"
    folder.mkdir(parents=True)
    (folder / "results.json").write_text("{}")
    rows = answers("scanrefer", "grounding", boxes=[box, far, far], target_boxes=[box] * 3)
    rows += answers("scanqa", "qa", answer=["red", "blue", "red"], references=[["red"]] * 3)
    said, right = ["open the window", "no", "no"], [["open the window"]] * 3
    rows += answers("planning", "planning", answer=said, references=right)
    write_predictions(folder / "predictions.jsonl", rows)
    trained = tmp_path / "sft-1"
    trained.mkdir()
    metrics = [{"step": 0, "loss": 2.0, "lr": 1.0}, {"step": 9, "loss": 1.0, "eval/scanqa/EM": 50.0}]
    (trained / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    with pytest.raises(ValueError, match=r"starts.jsonl does not say what trained sft-1"):
        collect("sft-1", folder, trained)
    (trained / "starts.jsonl").write_text(started("abc") + started("abc") + started("def"))
    made = collect("sft-1", folder, trained)
    assert made.scores["scanrefer/Acc@0.25"] == [1.0, 0.0, 0.0] and made.scores["scanqa/EM"] == [1.0, 0.0, 1.0]
    assert made.asked["scanqa"].scenes == [2, 1] and made.asked["scanqa"].digest != made.asked["scanrefer"].digest
    assert np.argmax(made.scores["planning/ROUGE-L"]) == 0 and set(made.well_formed.values()) == {0.3333}
    assert made.curves == {"loss": ([0.0, 9.0], [2.0, 1.0]), "eval/scanqa/EM": ([9.0], [50.0])}
    assert (made.name, made.seed, made.commit) == ("sft", 1, "abc; def")
    assert (made.command, made.versions) == ("SEEDS=1 bash script/proof.sh sft", "python 3.12, torch 2.11")
    docs = tmp_path / "docs"
    readme = tmp_path / "README.md"
    readme.write_text("# It\n\nmarks\n")
    with pytest.raises(ValueError, match="README lacks the marks"):
        proof.main(["--collect", str(tmp_path), "--docs", str(docs)])
    readme.write_text(f"# It\n\n{proof_page.BEGIN}\nold\n{proof_page.END}\n\n## More\n")
    stages = tmp_path / "stages"
    stages.mkdir()
    (stages / "sft-1.done").write_text("key 5 100\n")
    for scored in (None, "key 7 99\n"):  # not at all, or before it was trained again
        if scored:
            (stages / "eval-sft-1.done").write_text(scored)
        with pytest.raises(ValueError, match="has no evaluated runs"):
            proof.main(["--collect", str(tmp_path), "--docs", str(docs)])
        assert "left out: sft-1" in capsys.readouterr().out
    (stages / "eval-sft-1.done").write_text("key 7 100\n")
    for name in ("align-1", "align-2"):  # kept once it is finished, though it is not scored
        shutil.copytree(trained, tmp_path / name)
    (stages / "align-1.done").write_text("key 4 90\n")
    assert proof.main(["--collect", str(tmp_path), "--docs", str(docs)]) == 0
    shown = readme.read_text()
    assert "old" not in shown and shown.startswith("# It\n\n<!-- proof:begin") and shown.endswith("-->\n\n## More\n")
    assert "| SFT | 1 | 33.3 (" in shown and "Small-scale" in shown
    assert {path.name for path in (docs / "proof" / "runs").iterdir()} == {"sft-1.json", "align-1.json"}
    assert (docs / "proof" / "align.png").exists() and (docs / "proof" / "sft.png").stat().st_size > 5000
    assert (docs / "proof.md").read_text() == proof.page(docs)
    (docs / "proof" / "findings.md").write_text("## Findings\n\nWhat was found.\n")
    assert "\n## Findings\n\nWhat was found.\n\n## How it was measured" in proof.page(docs)


def thought(think: str, **named) -> Prediction:
    boxes = {f"<obj{name[1:]}>": [*middle, 0.5, 1.0, 1.0, 1.0, 0.0] for name, middle in named.items()}
    return Prediction("q-0", "qa", "scene0000_00", "?", think, think=think, meta={"named": boxes})


def test_thoughts_are_compared_with_the_boxes_of_what_they_name():
    counted = thought("First, one by one, that is chair <obj1> 1, chair <obj2> 2 and chair <obj1> 3. Last, three.")
    colored = thought(
        "First, by color, the room has cup<obj1> blue and cup<obj2> red. Next, I count desk <obj3> 1. Last."
    )
    far = "Next, in meters from the bed <obj1>, from the nearest on, the red cup <obj2> 3.1, the lamp <obj3> 4.9, the"
    measured = thought(f"{far} book <obj4> 5.0 and the vase <obj9> 7.0. Last, 9.9.", n1=(1, 1), n2=(1, 4), n3=(1, 6))
    assert list(_proof_thoughts.distances(measured.think, measured.meta["named"])) == [(3.1, 3.0), (4.9, 5.0)]
    assert _proof_thoughts.told([counted, colored, measured]) == {"lists": 2, "metres": 2, "repeated": 0.5}
    again = thought(f"{far} book. Last.", n1=(0, 0), n2=(0, 3), n3=(3, 0))
    found = _proof_thoughts.told([measured, again])
    assert found == {"lists": 0, "metres": 4, "correlation": 0.5774}  # 1.8 / sqrt(3.24 * 3)
    assert _proof_thoughts.told([]) == {"lists": 0, "metres": 0}


def test_the_page_tells_what_thoughts_say(runs):
    assert "said and true metres" not in proof_page.render(runs)
    for entry in runs:
        if entry.name == "sft":
            entry.told = {
                "lists": 10,
                "metres": 5,
                "repeated": 0.1 * entry.seed,
                "correlation": 0.5 + 0.1 * entry.seed,
            }
    page = proof_page.render(runs)
    assert "| SFT | 3 | 10.0 (0.0 to 20.0) | 30 | 0.60 (0.50 to 0.70) | 15 |" in page
    runs[3].told = {"lists": 4, "metres": 0, "repeated": 0.5}
    assert "| SFT | 3 | 26.7 (10.0 to 50.0) | 24 | 0.65 (0.60 to 0.70) | 10 |" in proof_page.render(runs)


def test_a_readme_without_runs_has_empty_marks(runs):
    text = f"a\n{proof_page.BEGIN}\n{proof_page.END}\nb\n"
    assert proof_page.with_headline(text, []) == text
    assert proof_page.with_headline(proof_page.with_headline(text, runs), []) == text


def test_the_page_is_what_the_files_say():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme == proof_page.with_headline(readme, read_runs(ROOT / "docs" / "proof" / "runs"))
    assert (ROOT / "docs" / "proof.md").read_text(encoding="utf-8") == proof.page(ROOT / "docs")
    pictures = set(proof_page.panels(read_runs(ROOT / "docs" / "proof" / "runs")))
    assert {path.name for path in (ROOT / "docs" / "proof").glob("*.png")} == pictures
