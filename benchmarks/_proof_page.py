"""The proof's page: tables with intervals over runs and questions, what must hold and whether it does, pictures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..utils.metrics.seeds import Estimate, difference_over_seeds, over_seeds
from ..visualization.curves import Curve, Panel, draw_panels
from ._proof_runs import Run

HEADLINE = ("scanrefer/Acc@0.25", "nr3d/Acc@0.25", "scanqa/EM", "sqa3d/EM")
TASKS = {
    "scanrefer/Acc@0.25": "grounding, ScanRefer's form, Acc@0.25",
    "scanrefer/Acc@0.5": "grounding, ScanRefer's form, Acc@0.5",
    "nr3d/Acc@0.25": "grounding, Nr3D's form, Acc@0.25",
    "nr3d/Acc@0.5": "grounding, Nr3D's form, Acc@0.5",
    "scanqa/EM": "questions, ScanQA's form, EM",
    "sqa3d/EM": "situated questions, SQA3D's form, EM",
    "planning/CIDEr": "planning, CIDEr",
    "planning/ROUGE-L": "planning, ROUGE-L",
}
REAL_TASKS = {
    "scanrefer_targets/Acc@0.25": "ScanRefer, Acc@0.25",
    "scanrefer_targets/Acc@0.5": "ScanRefer, Acc@0.5",
    "nr3d_targets/Acc@0.25": "Nr3D, Acc@0.25",
    "nr3d_targets/Acc@0.5": "Nr3D, Acc@0.5",
}
REAL = {"real.blind": "blind", "real": "SFT"}
MAIN = {"blind": "blind", "sft": "SFT", "grpo": "SFT + GRPO"}
REWARDS = {
    "sft": "none (SFT)",
    "grpo.format": "format",
    "grpo.perception": "perception",
    "grpo.semantic": "semantic",
    "grpo.format+perception": "format, perception",
    "grpo.format+semantic": "format, semantic",
    "grpo.perception+semantic": "perception, semantic",
    "grpo": "all three",
}
VIEWS = {
    "views.none": "none",
    "views.uniform": "uniform",
    "views.coverage": "best coverage",
    "views.ring": "ring",
    "views.top": "top-down",
    "views.ours": "selected",
}
ENCODERS = {
    "views.none": "text",
    "views.ours": "text, image",
    "encoders.depth": "text, image, depth",
    "encoders.point": "text, image, point cloud",
    "encoders.full": "text, image, depth, point cloud",
}
REWARDS_NOTE = "Where the form is not rewarded, it does not gate the other rewards either."
VIEWS_NOTE = """\
Pictures alone, no token of the point cloud. *Selected* are four of twelve views, by the question; *uniform* four of
the same twelve, evenly spaced among them; *best coverage* the four that show most of the room and its detected
objects; *ring* and *top-down* four from fixed places. All but *selected* are the same whatever the question. A view's
tokens do not say where it was taken from, so a model cannot tell from them where in the room a thing is."""
ENCODERS_NOTE = """\
With the point cloud there are objects to point at by name, and inventories that teach the names; without it boxes are
asked for and given in numbers. What the rows differ by is therefore more than an encoder."""
RANKS = {"views.ours": "before", **{f"lora.{rank}": f"rank {rank}" for rank in (4, 8, 12, 16, 32)}}
RANKS_NOTE = """\
*Before* is table 8's *selected*: the recipe, not the very models, that the other rows begin with. It was trained on
text and pictures alone. The other rows train such a model for 1,500 steps on the data of SFT, without pictures, to
read the tokens of the point cloud and the names of objects. Its own weights stay, as do the names' embeddings, which
are drawn anew (`python main.py names`). What learns are adapters of one rank on all of its blocks (alpha 32 at every
rank), and the connector, which makes tokens of what the frozen scene encoder finds. The paper's rank is 12, with
alpha 16, on the last 8 of 28 blocks."""


@dataclass(frozen=True)
class Ablation:
    """A table of the paper's: names of runs with what they are called."""

    title: str
    names: Mapping[str, str]
    own: str  # what the names begin with that no other of these tables has
    base: str  # what the others are compared to
    note: str
    picture: str = ""  # file name of its curves; table 7's are those of GRPO
    caption: str = ""
    remark: str = ""  # on the picture
    undrawn: frozenset[str] = frozenset()  # names without curves there, being trained on something else

    def measured(self, runs: Sequence[Run]) -> Mapping[str, str]:
        """The names; none before a row of the table's own is measured."""
        return self.names if any(run.name.startswith(self.own) for run in runs) else {}

    def drawn(self, runs: Sequence[Run]) -> Mapping[str, str]:
        """Those of them that its picture shows."""
        return {name: text for name, text in self.measured(runs).items() if name not in self.undrawn}


ABLATIONS = (
    Ablation("Rewards alone and in pairs (the paper's table 7)", REWARDS, "grpo", "sft", REWARDS_NOTE),
    Ablation(
        "Selection of views (table 8)",
        VIEWS,
        "views.",
        "views.ours",
        VIEWS_NOTE,
        "views.png",
        "Loss and held-out scores by choice of views",
        "Grounding is at chance in all rows.",
    ),
    Ablation(
        "Encoders one by one (table 10)",
        ENCODERS,
        "encoders.",
        "views.ours",
        ENCODERS_NOTE,
        "encoders.png",
        "Loss and held-out scores by encoders",
        "With the point cloud inventories are among the samples: losses with and without it are of different data.",
    ),
    Ablation(
        "Ranks of LoRA (table 11)",
        RANKS,
        "lora.",
        "lora.12",
        RANKS_NOTE,
        "ranks.png",
        "Loss and held-out scores by the rank of LoRA",
        undrawn=frozenset({"views.ours"}),
    ),
)
PICTURES_NOTE = """\
In pictures of training a thin line is a run, a thick one the mean of the runs. Held-out scores there are of a part of
the questions (150 of a form for the tables' 1,600 to 2,400), now and then: they show the course of training, and rows
may stand in another order than in the tables."""
THOUGHTS_NOTE = """\
Whether thoughts tell of the room: lists that count things or tell their colours, and distances, all by name, so that
boxes can be looked up. Means over runs, with the lowest and the highest."""
INTRODUCTION = """\
# The proof

Written by `python main.py bench proof` from `docs/proof/runs`, one file a trained model; do not edit by hand.

Does it learn, and does each idea help? Asked of a model of 15 million weights that start at random, on generated
rooms (`rooms-v1`) and one GPU, in stages of minutes. **These numbers are small-scale.** They say what the
machinery does; they say nothing about ScanNet, and they are not comparable with published results. A claim of the
paper that does not show here is reported as such.

The 95 % intervals cover both kinds of chance, which rooms were asked about and which seed was drawn: a crossed
bootstrap over runs and rooms, what comes of the runs widened for their small number by Student's t
(`utils/metrics/seeds.py`), so that a share's interval may reach below 0. Rooms are drawn with all their questions,
since those about one room are not independent. The interval of a single run knows the rooms alone, so it is too
narrow. Differences are taken question by question between runs of the same seed. Scores are those of
`python main.py eval`, in percent.
"""
HEADLINE_INTRODUCTION = """\
**Small-scale:** 15 million weights from random ones, generated rooms, one GPU, stages of minutes. Held-out rooms,
percent, 95 % intervals over rooms and seeds; *blind* is the same model without the scene. It says nothing of ScanNet,
and is not comparable with published results. All tables, curves and commands: [docs/proof.md](docs/proof.md).
"""
BEGIN = "<!-- proof:begin (written by `python main.py bench proof`; do not edit by hand) -->"
END = "<!-- proof:end -->"
REAL_INTRODUCTION = """\
Sentences of ScanRefer and Nr3D about the 24 validation scans whose labelled instances are at hand (no walls, no
colours): 16 scans are trained on, with the labels of all 222 training scans; 8, drawn by a seed, are tested on, with a
scene encoder that is trained on the same scans. Few scans and few sentences, so wide intervals.
"""


def scored(runs: Sequence[Run], name: str, metric: str) -> dict[int, Run]:
    """By seed the runs of one name that have values of a metric."""
    return {run.seed: run for run in runs if run.name == name and run.scores.get(metric)}


def values(runs: Sequence[Run], metric: str) -> tuple[list[list[float]], list[int]]:
    """Values of the questions, a row a run, and the number of the scene that each question is about.

    Raises:
        ValueError: the runs were not asked the same questions.
    """
    dataset = metric.partition("/")[0]
    first = runs[0].asked[dataset]
    for run in runs[1:]:
        if run.asked[dataset] != first:
            raise ValueError(
                f"{run.label} and {runs[0].label} were not asked the same questions of {dataset}; evaluate both by "
                "script/proof.sh with the same DATA."
            )
    scenes = [number for number, count in enumerate(first.scenes) for _ in range(count)]
    return [run.scores[metric] for run in runs], scenes


def estimate(runs: Sequence[Run], name: str, metric: str) -> Estimate | None:
    """What the runs of one name score, in percent; None where none was made."""
    its = list(scored(runs, name, metric).values())
    if not its:
        return None
    values_SQ, scenes_Q = values(its, metric)
    return over_seeds(values_SQ, scenes_Q).scaled(100)


def gain(runs: Sequence[Run], ours: str, other: str, metric: str) -> Estimate | None:
    """Ours minus the other's, in percent, over the seeds that both have; None without one."""
    first, second = scored(runs, ours, metric), scored(runs, other, metric)
    seeds = sorted(first.keys() & second.keys())
    if not seeds:
        return None
    values_SQ, scenes_Q = values([its[seed] for its in (first, second) for seed in seeds], metric)
    return difference_over_seeds(values_SQ[: len(seeds)], values_SQ[len(seeds) :], scenes_Q).scaled(100)


def shown(value: Estimate | None, *, signed: bool = False, digits: int = 1) -> str:
    """`41.3 (38.0 to 44.1)`, or a dash."""
    if value is None:
        return "-"
    form = f"{'+' if signed else ''}.{digits}f"
    return f"{value.mean:{form}} ({value.low:{form}} to {value.high:{form}})"


def table(runs: Sequence[Run], names: Mapping[str, str], metrics: Sequence[str], head: str) -> list[str]:
    """A table of Markdown: models as rows, metrics as columns; rows that nobody measured are left out."""
    known = [metric for metric in metrics if any(scored(runs, name, metric) for name in names)]
    rows = [name for name in names if any(scored(runs, name, metric) for metric in known)]
    if not rows:
        return ["Not measured yet."]
    lines = [f"| {head} | runs | " + " | ".join(_called(metric) for metric in known) + " |"]
    lines.append("|---|---|" + "---|" * len(known))
    for name in rows:
        count = max(len(scored(runs, name, metric)) for metric in known)
        cells = [shown(estimate(runs, name, metric)) for metric in known]
        lines.append(f"| {names[name]} | {count} | " + " | ".join(cells) + " |")
    return lines


def _called(metric: str) -> str:
    return (TASKS | REAL_TASKS)[metric]


_LOSS = 2.0  # points of questions that GRPO may lose


def demands(runs: Sequence[Run]) -> list[str]:
    """What must hold, each with the difference that was measured and whether it does."""
    checks = [
        ("SFT is at least 20 points ahead of blind in grounding", "sft", "blind", "scanrefer/Acc@0.25", 20.0),
        ("SFT is at least 20 points ahead of blind in questions", "sft", "blind", "scanqa/EM", 20.0),
        ("GRPO is ahead of SFT in grounding, beyond the interval", "grpo", "sft", "scanrefer/Acc@0.25", 0.0),
    ]
    lines = ["| what must hold | difference, points | holds |", "|---|---|---|"]
    for sentence, ours, other, metric, bound in checks:
        found = gain(runs, ours, other, metric)
        holds = "-" if found is None else "yes" if (found.mean >= bound if bound else found.low > 0) else "**no**"
        if found is not None and bound and found.low < bound <= found.mean:
            holds = f"yes, by the mean; the interval reaches below {bound:.0f}"
        lines.append(f"| {sentence} | {shown(found, signed=True)} | {holds} |")
    kept = gain(runs, "grpo", "sft", "scanqa/EM")
    # an interval so wide that it holds a loss does not say that nothing is lost
    holds = "-" if kept is None else "**no**" if kept.high < 0 else "yes" if kept.low > -_LOSS else "**not shown**"
    lines.append(
        f"| GRPO loses less than {_LOSS:.0f} points of questions | {shown(kept, signed=True, digits=2)} | {holds} |"
    )
    return lines


def thoughts(runs: Sequence[Run]) -> list[str]:
    """A table of what the models' thoughts say of the rooms: means over runs, with the lowest and highest."""
    rows = []
    for name, text in MAIN.items():
        its = [run.told for run in runs if run.name == name and run.told.get("lists")]
        if its:
            cells = [_spread([100 * told["repeated"] for told in its], ".1f")]
            cells.append(_spread([told["correlation"] for told in its if "correlation" in told], ".2f"))
            counts = [sum(int(told[key]) for told in its) for key in ("lists", "metres")]
            rows.append(f"| {text} | {len(its)} | {cells[0]} | {counts[0]} | {cells[1]} | {counts[1]} |")
    if not rows:
        return []
    twice, metres = "lists that name a thing twice, percent", "said and true metres, correlation"
    head = f"| model | runs | {twice} | of lists | {metres} | of distances |"
    return ["", THOUGHTS_NOTE, "", head, "|---|---|---|---|---|---|", *rows]


def _spread(values: Sequence[float], form: str) -> str:
    """`0.41 (0.38 to 0.44)`: mean, lowest, highest; or a dash."""
    if not values:
        return "-"
    return f"{sum(values) / len(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def differences(runs: Sequence[Run], names: Mapping[str, str], base: str, metrics: Sequence[str]) -> list[str]:
    """A sentence for each model and metric whose difference from a base lies beyond its interval, or none does."""
    found = []
    for name, text in names.items():
        for metric in metrics:
            value = gain(runs, name, base, metric) if name != base else None
            if value is not None and value.certain:
                single = ", of a single run" if value.runs == 1 else ""
                found.append(f"- {text}: {_called(metric)} {shown(value, signed=True)} points{single}.")
    measured = any(gain(runs, name, base, metric) for name in names if name != base for metric in metrics)
    if not measured:
        return []
    said = [f"Against *{names[base]}*, differences beyond their intervals:" if found else ""]
    return ["", *said, *found] if found else ["", f"No difference from *{names[base]}* lies beyond its interval."]


def curves_of(runs: Sequence[Run], names: Mapping[str, str], metric: str) -> dict[str, list[Curve]]:
    """By label the curves of one metric, a curve a seed."""
    found = {text: [run.curves[metric] for run in runs if run.name == name and metric in run.curves]
             for name, text in names.items()}  # fmt: skip
    return {text: curves for text, curves in found.items() if curves}


def panels(runs: Sequence[Run]) -> dict[str, list[Panel]]:
    """The pictures by file name; those without any curve are left out."""

    def of_encoder(name: str) -> list[Panel]:
        its = {name: "scene encoder"}
        found = {
            f"mAP@0.{metric[-2:]}": curves_of(runs, its, metric).get("scene encoder", [])
            for metric in ("map25", "map50")
        }
        return [
            Panel("scene encoder, training", curves_of(runs, its, "loss"), "loss"),
            Panel("boxes, held-out", {metric: curves for metric, curves in found.items() if curves}, "share"),
        ]

    def of_models(names: Mapping[str, str], grounding: str = "scanrefer") -> list[Panel]:
        return [
            Panel("training", curves_of(runs, names, "loss"), "loss"),
            Panel("grounding Acc@0.25, held-out", curves_of(runs, names, f"eval/{grounding}/Acc@0.25"), "percent"),
            Panel("questions EM, held-out", curves_of(runs, names, "eval/scanqa/EM"), "percent"),
        ]

    found = {
        "detect.png": of_encoder("detect"),
        "align.png": of_models({"align": "align"}),
        "sft.png": of_models({"blind": "blind", "sft": "SFT"}),
        "grpo.png": [
            Panel(name, curves_of(runs, {"grpo": "all three rewarded"}, f"rewards/{name}/mean"), "mean reward")
            for name in ("format", "perception", "semantic", "combined")
        ],
        **{its.picture: of_models(its.drawn(runs)) for its in ABLATIONS if its.picture},
        "real.png": [*of_encoder("real-detect"), *of_models(REAL, "scanrefer_targets")],
    }
    kept = {name: [panel for panel in row if any(panel.curves.values())] for name, row in found.items()}
    return {name: row for name, row in kept.items() if row}


def draw(runs: Sequence[Run], folder: Path) -> list[Path]:
    """Write the pictures of `panels` as PNG."""
    folder.mkdir(parents=True, exist_ok=True)
    return [draw_panels(row, folder / name) for name, row in panels(runs).items()]


def headline(runs: Sequence[Run]) -> str:
    """The table for a first screen: what blind, SFT and GRPO score; nothing where none was scored."""
    lines = table(runs, MAIN, HEADLINE, "model")
    if len(lines) < 3:
        return ""
    return "\n".join(["## Does it learn?", "", HEADLINE_INTRODUCTION, *lines])


def with_headline(text: str, runs: Sequence[Run]) -> str:
    """A README's text with the headline between its two marks.

    Raises:
        ValueError: the marks are not there, once each and in order.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"The README lacks the marks {BEGIN} and {END}; restore them from git.")
    shown = headline(runs)
    return before + begin + "\n" + (f"{shown}\n" if shown else "") + end + after


def render(runs: Sequence[Run], findings: str = "", summary: str = "") -> str:
    """The page.

    Args:
        summary: a paragraph that people wrote, docs/proof/summary.md: which claims show, and which do not.
        findings: a section in Markdown that people wrote, docs/proof/findings.md.
    """
    everything = tuple(TASKS)
    pictures = panels(runs)

    def picture(name: str, text: str, remark: str = "") -> list[str]:
        said = ["", remark] if remark else []
        return ["", f"![{text}](proof/{name})", *said] if name in pictures else []

    said = [summary.strip(), ""] if summary.strip() else []
    lines = [
        INTRODUCTION,
        *said,
        "## Blind, SFT, GRPO",
        "",
        *table(runs, MAIN, everything, "model"),
        "",
        *demands(runs),
    ]
    lines += thoughts(runs)
    if pictures:
        lines += ["", PICTURES_NOTE]
    lines += picture("detect.png", "Loss and mAP of the scene encoder while it is pre-trained")
    lines += picture("align.png", "Loss and held-out grounding while the model learns what names stand for (align)")
    lines += picture(
        "sft.png",
        "Loss and held-out scores while training: of the scene, and blind",
        "SFT begins with what `align` left, blind with random weights.",
    )
    lines += picture(
        "grpo.png",
        "Rewards by component while GRPO trains",
        "All three are rewarded. Each panel has its own scale.",
    )
    for its in ABLATIONS:
        lines += ["", f"## {its.title}", "", its.note, ""]
        lines += table(runs, its.measured(runs), everything, "model")
        lines += differences(runs, its.measured(runs), its.base, HEADLINE)
        lines += picture(its.picture, its.caption, its.remark)
    lines += ["", "## Real scans", "", REAL_INTRODUCTION, *table(runs, REAL, tuple(REAL_TASKS), "model")]
    lines += differences(runs, REAL, "real.blind", tuple(REAL_TASKS))
    lines += picture("real.png", "The same of real scans: scene encoder, model and blind model")
    if findings:
        lines += ["", findings.strip()]
    lines += ["", "## How it was measured", "", *provenance(runs)]
    return "\n".join(lines) + "\n"


def provenance(runs: Sequence[Run]) -> list[str]:
    """Machine, commit, versions and command of every run."""
    if not runs:
        return ["Nothing has been measured yet."]
    lines = ["| run | seeds | command | commit | machine |", "|---|---|---|---|---|"]
    groups: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.name, run.command, run.commit, f"{run.machine}; {run.versions}"), []).append(run)
    for (name, command, commit, machine), its in groups.items():
        seeds = ", ".join(str(run.seed) for run in its)
        lines.append(f"| {name} | {seeds} | `{command}` | {commit} | {machine} |")
    return lines
