"""ScanRefer: find the object that a sentence describes. `annotations/ScanRefer_filtered_{train,val}.json`.

Record: scene_id, object_id (text), object_name ("coffee_table"), ann_id (text), description, token (list of texts).
"""

from collections import defaultdict
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from pathlib import Path

from ...utils.files import read_text
from ...utils.labels import DETECTION_CLASSES, OTHERS
from ...utils.text import format_box
from ..scannet import LABEL_MAP_NAME
from ..scene import Sample
from .common import Benchmark, Index, Inputs, scene_of, target_box
from .problems import Report
from .rows import Row, annotation_file, first_time, read_rows


@dataclass(frozen=True)
class Description:
    """One sentence about one object, as ScanRefer writes it."""

    row: Row
    scene_id: str
    object_id: int
    object_name: str  # words, underscores replaced
    ann_id: str
    text: str
    tokens: list[str]


def read_descriptions(path: Path, report: Report) -> list[Description]:
    """Records of a file in ScanRefer's schema, in file order."""
    seen: dict[Hashable, int] = {}

    def read(row: Row) -> Description:
        scene_id, object_id, ann_id = row.filled("scene_id"), row.integer("object_id"), row.name("ann_id")
        first_time(seen, (scene_id, object_id, ann_id), row, "scene, object_id and ann_id")
        return Description(
            row=row,
            scene_id=scene_id,
            object_id=object_id,
            object_name=row.text("object_name").replace("_", " "),
            ann_id=ann_id,
            text=row.filled("description"),
            tokens=row.strings("token"),
        )

    return report.keep(read_rows(path, report), read)


def load_name_classes(path: str | Path) -> dict[str, int]:
    """raw_category -> detection class by the name in the column nyu40class, as ScanRefer's `_get_raw2label` does it.

    Names outside the 18 are OTHERS; so is the table's "refridgerator", whose spelling ScanRefer does not correct.
    """
    lines = read_text(
        path, f"There is no label table at {path}; copy {LABEL_MAP_NAME} from ScanNet there."
    ).splitlines()
    header = lines[0].split("\t") if lines else []
    if "raw_category" not in header or "nyu40class" not in header:
        raise ValueError(f"{path} is not ScanNet's label table: its first line lacks raw_category or nyu40class.")
    raw, name = header.index("raw_category"), header.index("nyu40class")
    classes = {}
    for cells in (line.split("\t") for line in lines[1:] if line.strip()):
        known = cells[name] if len(cells) > name else ""
        classes[cells[raw]] = DETECTION_CLASSES.index(known) if known in DETECTION_CLASSES else OTHERS
    return classes


def unique_lookup(
    described: Iterable[tuple[str, int, str]], name_classes: dict[str, int]
) -> dict[tuple[str, int], tuple[bool, int]]:
    """(scene_id, object_id) -> (multiple, class), as ScanRefer's `_get_unique_multiple_lookup` has it.

    An object is "unique" when it is the only object of its class among those that the loaded split describes in its
    scene. Names absent from the label table are OTHERS.

    Args:
        described: (scene_id, object_id, object_name in words) of every description of the split.
    """
    classes: dict[tuple[str, int], int] = {}
    members: dict[tuple[str, int], set[int]] = defaultdict(set)
    for scene_id, object_id, name in described:
        number = name_classes.get(name, OTHERS)
        classes[scene_id, object_id] = number
        members[scene_id, number].add(object_id)
    return {key: (len(members[key[0], number]) > 1, number) for key, number in classes.items()}


def file_of(split: str) -> str:
    """Name of a split's file in `annotations/`."""
    return f"ScanRefer_filtered_{split}.json"


def load(root: Path, split: str, index: Index, report: Report) -> list[Sample]:
    """Grounding samples of one split; question_type is `unique` or `multiple`.

    The answer names the object and gives its box in the model frame. Meta: object_name, ann_id, multiple, others.
    """
    descriptions = read_descriptions(annotation_file(root, file_of(split)), report)
    lookup = unique_lookup(
        ((one.scene_id, one.object_id, one.object_name) for one in descriptions),
        load_name_classes(root / LABEL_MAP_NAME),
    )

    def read(one: Description) -> Sample:
        info = scene_of(index, one.scene_id, one.row)
        boxes_K7 = target_box(info, one.object_id, one.row)
        multiple, number = lookup[one.scene_id, one.object_id]
        return Sample(
            sample_id=f"scanrefer-{one.scene_id}-{one.object_id}-{one.ann_id}",
            task="grounding",
            dataset="scanrefer",
            scene_id=one.scene_id,
            question=one.text,
            answer=f"{one.object_name} {format_box(info.to_model(boxes_K7)[0].tolist())}",
            references=[one.object_name],
            target_object_ids=[one.object_id],
            target_boxes_K7=boxes_K7,
            question_type="multiple" if multiple else "unique",
            meta={
                "object_name": one.object_name,
                "ann_id": one.ann_id,
                "multiple": multiple,
                "others": number == OTHERS,
            },
        )

    return report.keep(descriptions, read)


BENCHMARK = Benchmark(load, lambda split: Inputs((f"annotations/{file_of(split)}", LABEL_MAP_NAME)))
