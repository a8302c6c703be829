"""Checks of annotation files: there, whole, as many as published, on known scenes and objects, no leaks."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..published import COUNTS, ORIGINS
from ..tasks import LOADERS, Problem, cap3d, inputs_of, scene30k, scene30k_captions
from ..tasks.cache import read_samples
from .findings import DataRow, Finding, Level, many, relative, some
from .place import Place
from .survey import Survey, survey

_TRAIN_VAL = ("train", "val")
_SPLITS = {
    "scanqa": ("train", "val", "test_w_obj", "test_wo_obj"),
    "sqa3d": ("train", "val", "test"),
    "scene30k": ("train",),
    "scene30k_captions": ("train",),
    "cap3d": ("train",),
}
# forms of other data sets that some projects hand out: looked at where they are there, and not missed
_REPACKAGED = ("scanrefer_targets", "nr3d_targets", "nr3d_captions")
_NOT_GENERATED = ("embodied_qa", "cap3d")
_DROPPED = (scene30k.FILE, scene30k_captions.FILE)  # their readers drop held-out scenes
_FOLDER = "annotations/"
_SKIP = "or leave these records out, counted: --set data.missing=skip"
Sign = tuple[str, str, tuple[tuple[str, int], ...]]


@dataclass
class _Found:
    """What is gathered over all data sets before it becomes findings, so that a shared file is told of once."""

    surveys: dict[str, Survey] = field(default_factory=dict)  # by file below the root
    broken: dict[str, str] = field(default_factory=dict)
    users: dict[str, list[tuple[str, str]]] = field(default_factory=dict)  # file -> (data set, split)
    missing: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    refused: dict[str, list[tuple[str, str]]] = field(default_factory=dict)  # a reader's sentence -> its data sets
    problems: dict[Sign, tuple[list[str], list[Problem]]] = field(default_factory=dict)
    notes: list[Finding] = field(default_factory=list)


def check_annotations(place: Place) -> tuple[list[DataRow], list[Finding]]:
    """One row per data set and split, and all findings about annotation files."""
    found = _Found()
    rows = [
        row
        for dataset in LOADERS
        for split in _SPLITS.get(dataset, _TRAIN_VAL)
        if (row := _check(place, dataset, split, found)) is not None
    ]
    findings = [*_missing(place, found), *_broken(place, found), *_counts(place, found)]
    for (kind, split, _), (names, problems) in found.problems.items():
        findings += _problems(place, kind, split, names, problems)
    findings += [*_leaks(place, found), *_trained_scenes(place, found), *_objects(place, found), *found.notes]
    return rows, findings


def _check(place: Place, dataset: str, split: str, found: _Found) -> DataRow | None:
    """Look at one data set in one split; None where it is not to be expected."""
    inputs = inputs_of(dataset, split)
    if not any(name.startswith(_FOLDER) for name in (*inputs.needed, *inputs.either)):
        return None  # made of the scenes
    missing = tuple(inputs.absent(place.root))
    wanted = dataset not in _REPACKAGED
    if place.generated:
        wanted = wanted and dataset not in _NOT_GENERATED and not split.startswith("test")
    either = [name for name in inputs.either if (place.root / name).is_file()][:1] or inputs.either[-1:]
    files = tuple(name for name in (*inputs.needed, *either) if name.startswith(_FOLDER))
    if missing and not wanted:
        return None
    row = DataRow(dataset, split, "missing", files, missing)
    published = COUNTS.get(Path(files[0]).name)
    if published is not None and not place.generated:
        row.published, row.published_source = published.records, published.source
    for name in missing:
        if name.startswith(_FOLDER):
            found.missing.setdefault(name, []).append((dataset, split))
    for name in set(files) - set(missing):
        found.users.setdefault(name, []).append((dataset, split))
        _take_survey(place, name, found)
    if files[0] in found.surveys:
        row.records = found.surveys[files[0]].records
    if any(name in found.broken for name in files):
        row.state = "broken"
    elif not missing:
        _read(place, row, found)
    return row


def _take_survey(place: Place, name: str, found: _Found) -> None:
    if name in found.surveys or name in found.broken:
        return
    try:
        found.surveys[name] = survey(place.root / name)
    except (ValueError, OSError) as error:
        found.broken[name] = str(error)


def _read(place: Place, row: DataRow, found: _Found) -> None:
    """What the reader makes of a data set whose files are all there."""
    row.state = "unchecked"
    if place.scenes is None:
        return
    if row.dataset == "cap3d":  # objects are not among the scans, so most captions have none and that is no problem
        row.usable = len(found.surveys[row.files[0]].scenes.keys() & place.prepared)
        row.state = "ok" if row.usable else "unchecked"
        return
    try:
        samples, report = read_samples(
            LOADERS[row.dataset], row.dataset, place.root, row.split, place.scenes, strict=False
        )
    except (ValueError, OSError) as error:
        row.state = "broken"
        found.refused.setdefault(str(error), []).append((row.dataset, row.split))
        return
    row.usable, row.problems = len(samples), dict(Counter(problem.kind for problem in report.problems))
    row.state = "problems" if report.problems else "ok" if samples else "empty"
    if row.state == "empty":
        message = f"{row.dataset} ({row.split}) gives no samples: commands that need them will refuse it."
        fix = "take it out of data.datasets, or put a file with records of this split there"
        found.notes.append(Finding("warning", "empty", message, fix, row.dataset, row.split, count=0, files=row.files))
    found.notes += [Finding("note", "reader", note, "", row.dataset, row.split) for note in report.notes]
    by_kind: dict[str, list[Problem]] = {}
    for problem in report.problems:
        by_kind.setdefault(_kind(place, problem), []).append(problem)
    for kind, some_problems in by_kind.items():
        rows = tuple((problem.path, problem.row) for problem in some_problems)
        found.problems.setdefault((kind, row.split, rows), ([], some_problems))[0].append(row.dataset)


def _kind(place: Place, problem: Problem) -> str:
    """The problem's kind; of missing scenes, why they are missing."""
    if problem.kind != "missing_scene":
        return problem.kind
    if problem.scene_id in place.sources:
        return "scene_not_prepared"
    return "scene_without_scan" if problem.scene_id in place.listed else "scene_unknown"


def _label(uses: Sequence[tuple[str, str]]) -> str:
    """Data sets and splits in words, each once."""
    datasets, splits = (list(dict.fromkeys(names)) for names in zip(*uses, strict=True))
    return f"{', '.join(datasets)} ({', '.join(splits)})"


def _split(uses: Sequence[tuple[str, str]]) -> str:
    """The one split that all have; "" where they differ."""
    splits = {split for _, split in uses}
    return splits.pop() if len(splits) == 1 else ""


def _again(place: Place, uses: Sequence[tuple[str, str]]) -> str:
    """How to get a data set's files."""
    if place.generated:
        return f"python main.py rooms --out {place.root} with the --train, --val and --seed of the first time"
    origin = ORIGINS[uses[0][0]]
    return f"put the official file into {place.root / 'annotations'} ({origin.place}; terms: {origin.terms})"


def _missing(place: Place, found: _Found) -> Iterator[Finding]:
    for name, uses in found.missing.items():
        message = f"{_label(uses)}: {name} is missing."
        published = COUNTS.get(Path(name).name)
        expected = published.records if published is not None and not place.generated else None
        fix = _again(place, uses)
        yield Finding("warning", "file_missing", message, fix, uses[0][0], _split(uses), 0, expected, (name,))


def _broken(place: Place, found: _Found) -> Iterator[Finding]:
    for name, sentence in found.broken.items():
        uses = found.users[name]
        message = f"{_label(uses)}: {sentence}"
        yield Finding("error", "file_broken", message, _again(place, uses), uses[0][0], _split(uses), files=(name,))
    for sentence, uses in found.refused.items():
        files = inputs_of(*uses[0]).all
        message = f"{_label(uses)}: {sentence}"
        yield Finding("error", "file_refused", message, _again(place, uses), uses[0][0], _split(uses), files=files)


def _counts(place: Place, found: _Found) -> Iterator[Finding]:
    """Files with another number of records or scenes than published."""
    for name, counted in found.surveys.items():
        published = COUNTS.get(Path(name).name)
        if published is None or place.generated:
            continue
        uses = found.users[name]
        wrong = [
            (words, count, expected)
            for words, count, expected in (
                ("records", counted.records, published.records),
                ("scenes", len(counted.scenes), published.scenes),
            )
            if expected is not None and count != expected
        ]
        if not wrong:
            continue
        words, count, expected = wrong[0]
        level: Level = "note" if published.source == "unverified" else "warning"
        mark = " (a number that we could not verify)" if level == "note" else ""
        message = f"{_label(uses)}: {name} has {count:,} {words}; published are {expected:,}{mark}."
        fix = "" if level == "note" else f"{_again(place, uses)}, or say the number beside the scores"
        yield Finding(level, "count_differs", message, fix, uses[0][0], _split(uses), count, expected, (name,))


def _problems(place: Place, kind: str, split: str, names: list[str], problems: list[Problem]) -> Iterator[Finding]:
    """One finding on all records of a kind."""
    label = f"{', '.join(names)} ({split})"
    scenes = sorted({problem.scene_id for problem in problems if problem.scene_id})
    files = tuple(sorted({relative(problem.path, place.root) for problem in problems}))
    count = len(problems)
    records, places = many(count, "record"), many(len(scenes), "scene")
    words: dict[str, tuple[str, str]] = {
        "scene_not_prepared": (
            f"{records} on {places} not prepared: {some(scenes)}.",
            place.prepare,
        ),
        "scene_without_scan": (
            f"{records} on {places} whose scans are missing: {some(scenes)}.",
            f"copy the scans to {place.root / 'scans'} and run {place.prepare}, {_SKIP}",
        ),
        "scene_unknown": (
            f"{records} on {places} in no list of scenes: {some(scenes)}.",
            f"check that annotations and lists of scenes belong together, {_SKIP}",
        ),
        "missing_object": (
            f"{records} on objects that their scans do not have, in {places}: {_objects_named(problems)}.",
            f"check that annotations and scans are of one release, {_SKIP}",
        ),
        "no_box": (
            f"{records} on walls, floors or ceilings, which have no box: {_objects_named(problems)}.",
            f"take the records out, {_SKIP}",
        ),
    }
    others = (f"{records}: {kind.replace('_', ' ')}. First: {problems[0].message}", "mend or take out the records")
    message, fix = words.get(kind, others)
    where = (
        f"{'row' if count == 1 else 'rows'} {some([str(problem.row) for problem in problems])} of {', '.join(files)}"
    )
    if kind not in ("scene_not_prepared", "scene_without_scan"):
        fix = f"{fix} ({where})"
    yield Finding("error", kind, f"{label}: {message}", fix, names[0], split, count, 0, files)


def _objects_named(problems: list[Problem]) -> str:
    return some(list(dict.fromkeys(f"object {problem.object_id} of {problem.scene_id}" for problem in problems)))


def _is_training(name: str) -> bool:
    """Whether a file is for training alone; those of all splits are told apart by the lists of scenes."""
    return "train" in Path(name).name or Path(name).name in _DROPPED


def _leaks(place: Place, found: _Found) -> Iterator[Finding]:
    """Records of training files on validation or test scenes."""
    held_out = place.held_out
    for name, counted in found.surveys.items():
        leaked = counted.on(held_out) if _is_training(name) else 0
        if not leaked:
            continue
        uses = found.users[name]
        scenes = len(counted.scenes.keys() & held_out)
        message = (
            f"{_label(uses)}: {leaked:,} of {counted.records:,} rows of {name} are on "
            f"{many(scenes, 'validation or test scene')}"
        )
        if Path(name).name in _DROPPED:
            message += "; they are dropped before training."
            level: Level = "warning"
            fix = "nothing to do here; do not compare with models that were trained on the whole file"
        else:
            message += ", and training would read them."
            level, fix = "error", f"take these rows out, or {_again(place, uses)}"
        yield Finding(level, "leak", message, fix, uses[0][0], _split(uses), leaked, 0, (name,))


def _trained_scenes(place: Place, found: _Found) -> Iterator[Finding]:
    """Evaluation files about scenes that training files are about as well."""
    training = {name: one for name, one in found.surveys.items() if _is_training(name)}
    train = set(place.lists.get("train", ()))
    on_train: list[tuple[str, int]] = []
    scenes: set[str] = set()
    for name, counted in found.surveys.items():
        splits = {split for _, split in found.users[name]}
        if name not in training and "train" not in splits and (count := counted.on(train)):
            on_train.append((name, count))
            scenes |= counted.scenes.keys() & train
    if not on_train:
        return
    shared = [Path(name).name for name, one in training.items() if one.scenes.keys() & scenes]
    shared_words = f"; here {', '.join(shared)} {'are' if len(shared) > 1 else 'is'}" if shared else ""
    listed = ", ".join(f"{Path(name).name} {count:,}" for name, count in on_train)
    message = (
        f"Questions for evaluation are on {many(len(scenes), 'scene')} of the train list ({listed}). Training data of "
        f"other data sets may be about the same scenes{shared_words}."
    )
    fix = "nothing to mend, the files were published so; say it beside the scores, or train without these scenes"
    files = tuple(name for name, _ in on_train)
    yield Finding("warning", "evaluation_on_train_scenes", message, fix, count=len(scenes), expected=0, files=files)


def _objects(place: Place, found: _Found) -> Iterator[Finding]:
    """Cap3D's objects: captions without any cloud, or clouds that are not prepared."""
    counted = found.surveys.get(f"{_FOLDER}{cap3d.FILE}")
    if counted is None:
        return
    clouds = {path.stem for path in (place.root / cap3d.FOLDER).glob("*.ply")}
    captioned = counted.scenes.keys()
    waiting = sorted((clouds & captioned) - place.prepared)
    count, expected = len(captioned & place.prepared), len(captioned)
    if not clouds and not count:
        message = f"cap3d: none of {expected:,} captioned objects has a cloud."
        fix = f"copy clouds to {place.root / cap3d.FOLDER}/<uid>.ply: {ORIGINS['cap3d'].place}"
        yield Finding("warning", "clouds_missing", message, fix, "cap3d", "", count, expected, (cap3d.FOLDER,))
    elif waiting:
        message = f"cap3d: {many(len(waiting), 'cloud')} not prepared: {some(waiting)}."
        yield Finding("warning", "clouds_not_prepared", message, place.prepare, "cap3d", "", len(waiting), 0)
