"""What is published about the data sets: records of their files, hashes of ScanNet's lists, and where each comes from.

`Count.source` says how sure a number is: "counted" in a copy of the file, "stated" by its authors or by several
projects' logs, "unverified" where neither could be checked; a file that disagrees with the last kind is no finding.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Count:
    """Records of a file; `scenes` is the number of scenes that they are about, None where that is not known."""

    records: int
    scenes: int | None = None
    source: Literal["counted", "stated", "unverified"] = "stated"


@dataclass(frozen=True)
class Origin:
    """Where a data set's files come from, and on which terms."""

    place: str
    terms: str


@dataclass(frozen=True)
class SceneList:
    """One of ScanNet's lists of scenes: how many, the SHA-256 of the file, and that of its sorted ids, one a line."""

    scenes: int
    sha256: str
    sorted_sha256: str


SCENE_LISTS = {
    "train": SceneList(
        1201,
        "366f82219e7021997830566a1302d696137754190cad06fd3a0f0de260b3671b",
        "995d9cda4cb994ae2ff9897d75d1270ffdef03aac620b5b609f74a648f2680d6",
    ),
    "val": SceneList(
        312,
        "25a996252ef67aa84ee091c6fa593ad860bab0addcc72e4b80ef9f64daba8db4",
        "c04425d97dcea788f68a05c87a38d91bec6f8b4f93220044fb7c80e426e63bd5",
    ),
    "test": SceneList(
        100,
        "0214c6a3b1ee516ad653393b0321e7c0394c7662a4b3702eac1ddd7fbc00f7e0",
        "9e13281c1cb8104e367e8297c7c91a915bbdde36fc49a8d217ff42301b56eb0b",
    ),
}
LABEL_TABLE_SHA256 = "47694b4164833cd22cc141abfee284d8b7f05bade1481f55875d0da497d7349e"

COUNTS = {
    "ScanRefer_filtered_train.json": Count(36_665),
    "ScanRefer_filtered_val.json": Count(9_508),
    "nr3d.csv": Count(41_503, 641),
    "ScanQA_v1.0_train.json": Count(25_563, 562),
    "ScanQA_v1.0_val.json": Count(4_675, 71, "counted"),
    "ScanQA_v1.0_test_w_obj.json": Count(4_976, source="unverified"),
    "ScanQA_v1.0_test_wo_obj.json": Count(6_149, source="unverified"),
    "v1_balanced_questions_train_scannetv2.json": Count(26_623, source="unverified"),
    "v1_balanced_sqa_annotations_train_scannetv2.json": Count(26_623, source="unverified"),
    "v1_balanced_questions_val_scannetv2.json": Count(3_261, source="unverified"),
    "v1_balanced_sqa_annotations_val_scannetv2.json": Count(3_261, source="unverified"),
    "v1_balanced_questions_test_scannetv2.json": Count(3_519, 67, "counted"),
    "v1_balanced_sqa_annotations_test_scannetv2.json": Count(3_519, 67, "counted"),
    "3d_llm_embodied_question_answer_train.json": Count(14_944, 446, "counted"),
    "3d_llm_embodied_question_answer_val.json": Count(1_938, 60, "counted"),
    "3d_llm_embodied_dialogue_filtered_val.json": Count(1_222, 61, "counted"),
    "3d_llm_embodied_planning_filtered_val.json": Count(2_282, 61, "counted"),
    "3d_llm_scene_description_train.json": Count(912, 456, "counted"),
    "3d_llm_scene_description_val.json": Count(121, 61, "counted"),
    "Scene-30K.jsonl": Count(30_238, 633),
    "scanrefer_val_targets.json": Count(9_498, 141, "counted"),
    "nr3d_val_targets.json": Count(7_457, 130, "counted"),
    "nr3d_captions_by_scene.json": Count(41_503, 641, "counted"),
}

_SCANREFER = Origin("by form, https://github.com/daveredrum/ScanRefer", "ScanRefer's terms")
_NR3D = Origin("nr3d.csv, linked from https://github.com/referit3d/referit3d", "see there")
_LLM3D = Origin("folder data/3D_LLM of https://github.com/Open3DA/LL3DA", "see there")
_SCENE30K = Origin("https://huggingface.co/datasets/AIGeeksGroup/Scene-30K", "see there")
_OWN_LABELS = Origin("the prepared scenes' own labels", "that of the scans")
_REPACKAGED = Origin("re-packaged by other projects; no official source", "those of ScanRefer and Nr3D")
ORIGINS = {
    "scanrefer": _SCANREFER,
    "scan2cap": _SCANREFER,
    "object_caption": _SCANREFER,
    "nr3d": _NR3D,
    "scan2cap_nr3d": _NR3D,
    "scanqa": Origin("linked from https://github.com/ATR-DBI/ScanQA", "CC BY-NC-SA"),
    "sqa3d": Origin("https://zenodo.org/records/7792397", "CC BY 4.0"),
    "embodied_qa": _LLM3D,
    "dialogue": _LLM3D,
    "planning": _LLM3D,
    "scene_description": _LLM3D,
    "scene30k": _SCENE30K,
    "scene30k_captions": _SCENE30K,
    "inventory": _OWN_LABELS,
    "contents": _OWN_LABELS,
    "cap3d": Origin("https://huggingface.co/datasets/tiange/Cap3D (csv of 131 MB)", "ODC-By"),
    "scanrefer_targets": _REPACKAGED,
    "nr3d_targets": _REPACKAGED,
    "nr3d_captions": _REPACKAGED,
}
SCENE_LISTS_PLACE = "https://github.com/ScanNet/ScanNet, folder Tasks/Benchmark"


def hash_of_ids(scene_ids: Iterable[str]) -> str:
    """SHA-256 of scene ids sorted and joined by line ends, which order and line ends of the file do not change."""
    return hashlib.sha256("\n".join(sorted(scene_ids)).encode()).hexdigest()
