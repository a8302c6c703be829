"""The table of what GRPO sampled."""

import json
import re

from threedr1.visualization.completions import completions_section
from threedr1.visualization.report import write_report


def rows(step):
    return [
        {
            "step": step,
            "group": prompt,
            "sample_id": "s" if prompt < 2 else "t",
            "question": "Where is <it>?",
            "text": f"text {step} {prompt} {number} & more",
            "rewards": {"format": float(number), "some/file.py:own": None},
            "reward": None if number == 2 else number / 2,
            "advantage": number - 0.5,
        }
        for prompt in range(3)
        for number in range(3)
    ]


def test_groups_of_the_first_and_the_last_step_the_best_first(tmp_path):
    written = [row for step in (0, 10, 20) for row in rows(step)]
    (tmp_path / "completions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in written))
    section = completions_section(tmp_path)
    texts = re.findall(r"text (\d+) (\d) (\d) &amp; more", section)
    # a completion whose reward failed stands last
    assert texts == [(step, prompt, row) for step in ("0", "20") for prompt in "01" for row in "102"]
    assert "Where is &lt;it&gt;?" in section and "<th>own</th>" in section
    assert section.count("<td>0.50</td><td>0.50</td><td>1.00</td><td>–</td>") == 4

    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "reward": 0.5}\n{"step": 1, "reward": 0.7}\n')
    page = write_report(tmp_path, tmp_path / "report.html").read_text()
    assert "GRPO: reward" in page and "Sampled completions" in page


def test_a_run_without_completions_has_no_table(tmp_path):
    assert completions_section(tmp_path) == ""
    (tmp_path / "completions.jsonl").write_text('{"step": 0, "sample_id": "a", "text": "", "rewards": {}}\n')
    assert completions_section(tmp_path) == ""  # as versions before wrote them
