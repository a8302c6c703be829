"""Nr3D's sentences by scene, without targets: `annotations/nr3d_captions_by_scene.json`, {scene_id: [[class, text]]}.

One file for all splits; a scene belongs to the split whose list names it. Samples have no box, so they serve texts
about scenes and cannot be scored by IoU or by selection.
"""

from pathlib import Path

from ..scannet import read_split
from ..scene import Sample
from .common import Benchmark, Index, Inputs, scene_of
from .problems import Report
from .rows import Row, annotation_file, read_json_table

FILE = "nr3d_captions_by_scene.json"


def load(root: Path, split: str, index: Index, report: Report) -> list[Sample]:
    """One grounding sample without a target per sentence. Rows are counted over the file. Meta: class."""
    path = annotation_file(root, FILE)
    scene_ids = set(read_split(root, split))

    def read(row: Row) -> Sample | None:
        scene_id = str(row.record["scene_id"])
        if scene_id not in scene_ids:
            return None
        pair = row.record["pair"]
        if not (
            isinstance(pair, list) and len(pair) == 2 and all(isinstance(one, str) and one.strip() for one in pair)
        ):
            raise row.bad("pair", f"an entry of scene {scene_id} is not a pair of texts; use the file as it came.")
        scene_of(index, scene_id, row)
        name, text = (one.strip() for one in pair)
        return Sample(
            sample_id=f"{report.dataset}-{row.number}",
            task="grounding",
            dataset=report.dataset,
            scene_id=scene_id,
            question=text,
            answer=name,
            references=[name],
            meta={"class": name},
        )

    rows, number = [], 0
    for scene_id, pairs in read_json_table(path).items():
        # an entry that is no list is one bad row
        for pair in pairs if isinstance(pairs, list) else [pairs]:
            number += 1
            rows.append(Row(path, number, {"scene_id": scene_id, "pair": pair}))
    return report.keep(rows, read)


BENCHMARK = Benchmark(load, lambda split: Inputs((f"annotations/{FILE}", f"scannetv2_{split}.txt")))
