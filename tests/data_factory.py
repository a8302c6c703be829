"""A miniature scan in ScanNet's raw format, and a whole data root around it, for tests.

World frame: a floor of 4 x 3 m with its corner at (-2, -1.5, 0), two walls of 2.4 m, a chair and a table.
"""

import csv
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from plyfile import PlyData, PlyElement

from threedr1.datasets.scene import Scene
from threedr1.datasets.scene_store import SceneInfo

ALIGN_DEGREES = 30.0
ALIGN_SHIFT = (-5.0, -3.0, -0.05)
CHAIR, TABLE, FLOOR, WALLS = 0, 3, 1, 2  # objectIds
# centre and size, world frame
OBJECTS = {CHAIR: ((0.5, 0.25, 0.45), (0.5, 0.5, 0.9)), TABLE: ((-1.0, -0.5, 0.375), (1.2, 0.8, 0.75))}
LABELS = {CHAIR: "office chair", FLOOR: "floor", WALLS: "wall", TABLE: "table"}
NYU40 = {"office chair": 5, "floor": 2, "wall": 1, "table": 7, "lamp": 35}
NYU40_NAMES = {1: "wall", 2: "floor", 5: "chair", 7: "table", 35: "lamp"}


@dataclass
class MiniScan:
    """What the miniature scan was made of, in the world frame."""

    folder: Path
    vertices_V3: np.ndarray
    raw_V3: np.ndarray
    objects_V: np.ndarray  # objectId
    axis_align_44: np.ndarray


def axis_alignment(degrees: float = ALIGN_DEGREES, shift: tuple[float, float, float] = ALIGN_SHIFT) -> np.ndarray:
    """Raw to world: a rotation about z and a shift."""
    angle = np.radians(degrees)
    matrix_44 = np.eye(4)
    matrix_44[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    matrix_44[:3, 3] = shift
    return matrix_44


def _sheet(u: np.ndarray, v: np.ndarray, constant_axis: int, value: float) -> np.ndarray:
    grid = np.stack(np.meshgrid(u, v, indexing="ij"), axis=-1).reshape(-1, 2)
    return np.insert(grid, constant_axis, value, axis=1)


def box_shell(centre: tuple[float, ...], size: tuple[float, ...], spacing: float) -> np.ndarray:
    """Vertices on the six faces of a box, its corners included."""
    low, high = np.array(centre) - np.array(size) / 2, np.array(centre) + np.array(size) / 2
    steps = [np.linspace(low[a], high[a], max(2, int(np.ceil(size[a] / spacing)) + 1)) for a in range(3)]
    faces = []
    for axis in range(3):
        u, v = [steps[other] for other in range(3) if other != axis]
        faces += [_sheet(u, v, axis, low[axis]), _sheet(u, v, axis, high[axis])]
    return np.concatenate(faces)


def room_vertices(spacing: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    """World vertices [V, 3] and objectId of each [V]."""
    x, y, z = (np.arange(low, high + 1e-6, spacing) for low, high in ((-2, 2), (-1.5, 1.5), (0, 2.4)))
    parts = [
        (FLOOR, _sheet(x, y, 2, 0.0)),
        (WALLS, _sheet(x, z, 1, 1.5)),
        (WALLS, _sheet(y, z, 0, -2.0)),
    ]
    parts += [(object_id, box_shell(*OBJECTS[object_id], spacing)) for object_id in OBJECTS]
    vertices_V3 = np.concatenate([part for _, part in parts]).astype(np.float32)
    return vertices_V3, np.concatenate([np.full(len(part), object_id) for object_id, part in parts])


def write_ply(path: Path, vertices_V3: np.ndarray, *, colors: bool = True, faces: int = 0, text: bool = False) -> None:
    """A PLY file of vertices, optionally coloured and with `faces` triangles of consecutive vertices."""
    fields = [("x", "f4"), ("y", "f4"), ("z", "f4")] + [(c, "u1") for c in ("red", "green", "blue") if colors]
    vertex = np.empty(len(vertices_V3), dtype=fields)
    for axis, name in enumerate("xyz"):
        vertex[name] = vertices_V3[:, axis]
    if colors:
        for channel, name in enumerate(("red", "green", "blue")):
            vertex[name] = (np.arange(len(vertices_V3)) * (channel + 1)) % 256
    elements = [PlyElement.describe(vertex, "vertex")]
    if faces:
        face = np.empty(faces, dtype=[("vertex_indices", "i4", (3,))])
        face["vertex_indices"] = np.arange(faces)[:, None] + np.arange(3)
        elements.append(PlyElement.describe(face, "face"))
    PlyData(elements, text=text).write(str(path))


def write_mini_scan(scans_root: Path, scene_id: str = "scene0000_00", *, num_frames: int = 3) -> MiniScan:
    """Write `<scans_root>/<scene_id>/` in ScanNet's raw format; the last of the frames has an infinite pose."""
    folder = Path(scans_root) / scene_id
    folder.mkdir(parents=True)
    vertices_V3, objects_V = room_vertices()
    axis_align_44 = axis_alignment()
    inverse_44 = np.linalg.inv(axis_align_44)
    raw_V3 = (vertices_V3 @ inverse_44[:3, :3].T + inverse_44[:3, 3]).astype(np.float32)
    write_ply(folder / f"{scene_id}_vh_clean_2.ply", raw_V3, faces=20)
    # two segments an object: even and odd vertices
    segments_V = objects_V * 10 + np.arange(len(objects_V)) % 2 + 100
    segs = {"sceneId": scene_id, "segIndices": segments_V.tolist()}
    (folder / f"{scene_id}_vh_clean_2.0.010000.segs.json").write_text(json.dumps(segs))
    groups = [
        {"id": i, "objectId": i, "label": label, "segments": [i * 10 + 100, i * 10 + 101]}
        for i, label in LABELS.items()
    ]
    (folder / f"{scene_id}.aggregation.json").write_text(json.dumps({"sceneId": scene_id, "segGroups": groups}))
    numbers = " ".join(f"{value:.9f}" for value in axis_align_44.ravel())
    (folder / f"{scene_id}.txt").write_text(f"axisAlignment = {numbers}\ncolorHeight = 48\ncolorWidth = 64\n")
    _write_frames(folder, inverse_44, num_frames)
    return MiniScan(folder, vertices_V3, raw_V3, objects_V, axis_align_44)


def write_arrays(
    folder: Path, scene_id: str = "scene0000_00", *, unaligned_boxes: bool = False, keep: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """The miniature scan as the field's prepared arrays; every `keep`-th vertex is in them, boxes are of all.

    Returns the vertices [V, 3] and objectIds [V] written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    vertices_V3, objects_V = room_vertices()
    inverse_44 = np.linalg.inv(axis_alignment())
    boxed_V3 = vertices_V3 @ inverse_44[:3, :3].T + inverse_44[:3, 3] if unaligned_boxes else vertices_V3
    rows = []
    for object_id, label in LABELS.items():  # the exporter writes boxes of walls and floors too
        own_P3 = boxed_V3[objects_V == object_id]
        low_3, high_3 = own_P3.min(0), own_P3.max(0)
        rows.append([*(low_3 + high_3) / 2, *(high_3 - low_3), NYU40[label], object_id])
    vertices_V3, objects_V = vertices_V3[::keep], objects_V[::keep]
    nyu40_V = np.array([NYU40[LABELS[object_id]] for object_id in objects_V.tolist()])
    colors_V3 = np.arange(len(vertices_V3))[:, None] * [1, 2, 3] % 256
    arrays = {
        "aligned_vert": np.concatenate([vertices_V3, colors_V3], axis=1).astype(np.float32),
        "ins_label": (objects_V + 1).astype(np.uint32),
        "sem_label": nyu40_V.astype(np.uint32),
        "aligned_bbox": np.array(rows),
    }
    for name, array in arrays.items():
        np.save(folder / f"{scene_id}_{name}.npy", array)
    return vertices_V3, objects_V


def write_instances(folder: Path, scene_id: str = "scene0000_00", *, most: int = 512, **changes) -> dict:
    """The miniature scan as `<folder>/<scene_id>.npz` of labelled instances, at most `most` points an object.

    `changes` replace arrays, or leave one out where None. Returns what was written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    vertices_V3, objects_V = room_vertices()
    inverse_44 = np.linalg.inv(axis_alignment())
    raw_V3 = vertices_V3 @ inverse_44[:3, :3].T + inverse_44[:3, 3]
    own = [raw_V3[objects_V == object_id] for object_id in LABELS]
    kept = [np.random.default_rng(0).permutation(points_P3)[:most] for points_P3 in own]
    arrays = {
        "object_ids": np.array(list(LABELS), np.int32),
        "labels": np.array(list(LABELS.values())),
        "boxes_min_max": np.stack([np.r_[points_P3.min(0), points_P3.max(0)] for points_P3 in own]).astype(np.float32),
        "point_counts": np.array([len(points_P3) for points_P3 in own], np.int32),
        "points": np.concatenate(kept).astype(np.float16),
        "offsets": np.cumsum([0, *map(len, kept)]).astype(np.int32),
    } | changes
    arrays = {name: array for name, array in arrays.items() if array is not None}
    np.savez(folder / f"{scene_id}.npz", **arrays)
    return arrays


def write_matrices(path: Path, *scene_ids: str, degrees: float = ALIGN_DEGREES) -> None:
    """The table of axis alignments, the same for every scan."""
    numbers = axis_alignment(degrees).ravel().tolist()
    path.write_text(json.dumps(dict.fromkeys(scene_ids, numbers)))


def camera_pose(index: int = 0) -> np.ndarray:
    """Camera-to-world pose of frame `index`: at eye height, looking along +y (OpenCV axes)."""
    pose_44 = np.eye(4)
    pose_44[:3, :3] = np.array([[1, 0, 0], [0, 0, 1], [0, -1, 0]], dtype=float)  # columns: right, down, forward
    pose_44[:3, 3] = [0.1 * index, -1.4, 1.5]
    return pose_44


def _write_frames(folder: Path, inverse_44: np.ndarray, num_frames: int) -> None:
    for name in ("color", "depth", "pose", "intrinsic"):
        (folder / name).mkdir()
    for index in range(num_frames):
        rng = np.random.default_rng(index)
        Image.fromarray(rng.integers(0, 255, (48, 64, 3), dtype=np.uint8)).save(folder / "color" / f"{index}.jpg")
        depth = np.full((48, 64), 2900, np.uint16)  # the wall at y = 1.5 m
        Image.fromarray(depth).save(folder / "depth" / f"{index}.png")
        pose_44 = inverse_44 @ camera_pose(index)
        if num_frames > 1 and index == num_frames - 1:
            pose_44 = np.full((4, 4), -np.inf)
        np.savetxt(folder / "pose" / f"{index}.txt", pose_44)
    intrinsics_44 = np.eye(4)
    intrinsics_44[0, 0] = intrinsics_44[1, 1] = 60.0
    intrinsics_44[0, 2], intrinsics_44[1, 2] = 32.0, 24.0
    for name in ("intrinsic_color.txt", "intrinsic_depth.txt"):
        np.savetxt(folder / "intrinsic" / name, intrinsics_44)


def write_label_map(path: Path) -> None:
    """A label table with the miniature scan's labels, in the official columns that we read."""
    rows = ["id\traw_category\tcategory\tcount\tnyu40id\teigen13id\tnyuClass\tnyu40class"]
    rows += [f"{i}\t{raw}\t{raw}\t1\t{n}\t1\t{raw}\t{NYU40_NAMES[n]}" for i, (raw, n) in enumerate(NYU40.items())]
    path.write_text("\n".join(rows) + "\n")


def write_root(
    root: Path, train: tuple[str, ...] = ("scene0000_00",), val: tuple[str, ...] = ("scene0001_00",)
) -> Path:
    """A data root: scans, splits, label table and one small annotation file of each benchmark."""
    root = Path(root)
    for split, scene_ids in (("train", train), ("val", val)):
        for scene_id in scene_ids:
            write_mini_scan(root / "scans", scene_id)
        (root / f"scannetv2_{split}.txt").write_text("\n".join(scene_ids) + "\n")
    write_label_map(root / "scannetv2-labels.combined.tsv")
    (root / "annotations").mkdir()
    for split, scene_ids in (("train", train), ("val", val)):
        _write_annotations(root / "annotations", split, scene_ids)
    _write_nr3d(root / "annotations" / "nr3d.csv", [*train, *val])
    return root


def sqa3d_pose(
    scan_raw_V3: np.ndarray, axis_align_44: np.ndarray, position_3: np.ndarray, yaw: float
) -> tuple[dict, dict]:
    """SQA3D's position and rotation of an agent that stands at `position_3` (world) looking along `yaw` (world).

    The position's origin is the middle of the raw cloud's bounding box (x, y), and the agent looks along its -x axis.
    """
    raw_3 = (np.linalg.inv(axis_align_44) @ np.append(position_3, 1.0))[:3]
    middle_3 = (scan_raw_V3.min(0) + scan_raw_V3.max(0)) / 2
    turn = np.arctan2(axis_align_44[1, 0], axis_align_44[0, 0])
    half = (yaw - turn + np.pi) / 2
    position = {"x": float(raw_3[0] - middle_3[0]), "y": float(raw_3[1] - middle_3[1]), "z": 0}
    return position, {"_x": 0, "_y": 0, "_z": float(np.sin(half)), "_w": float(np.cos(half))}


def _dump(path: Path, rows: object) -> None:
    path.write_text(json.dumps(rows), encoding="utf-8")


def _write_annotations(folder: Path, split: str, scene_ids: tuple[str, ...]) -> None:
    refer, qa, questions, answers, cold = [], [], [], [], []
    texts: dict[str, list[dict]] = {"embodied_dialogue_filtered": [], "embodied_planning_filtered": []}
    texts["scene_description"] = []
    vertices_V3, _ = room_vertices()
    align_44 = axis_alignment()
    inverse_44 = np.linalg.inv(align_44)
    raw_V3 = vertices_V3 @ inverse_44[:3, :3].T + inverse_44[:3, 3]
    for number, scene in enumerate(scene_ids):
        for ann, (object_id, name, text) in enumerate(
            (
                (CHAIR, "office_chair", "the chair right of the table."),
                (CHAIR, "office_chair", "this is a tall chair."),
            )
        ):
            row = {"scene_id": scene, "object_id": str(object_id), "object_name": name, "ann_id": str(ann)}
            refer.append({**row, "description": text, "token": text.replace(".", " .").split()})
        qa.append(
            {
                "scene_id": scene,
                "object_ids": [TABLE],
                "object_names": ["table"],
                "question_id": f"{split}-{scene[:9]}-0",
                "question": "What is left of the chair?",
                "answers": ["table", "the table"],
            }
        )
        question_id = 220602000000 + number
        situation = "I am facing the table and the wall is on my right."
        head = {"scene_id": scene, "situation": situation, "alternative_situation": ["I stand here.", "I am here."]}
        questions.append({**head, "question": "What is in front of me?", "question_id": question_id})
        position, rotation = sqa3d_pose(raw_V3, align_44, np.array([1.0, -0.5, 0.0]), np.pi)
        answer = {"answer": "table", "answer_confidence": "yes", "answer_id": 1}
        tail = {"question_type": "N/A", "answer_type": "other", "question_id": question_id, "answers": [answer]}
        answers.append({"scene_id": scene, **tail, "rotation": rotation, "position": position})
        for rows, text, reply in zip(
            texts.values(),
            (
                "### human: hello ### assistant:",
                "### human: i want to rest. what should i do next?",
                "### human: Describe the room. ### assistant:",
            ),
            ("hello, here is a table.", "sit down on the chair", "A room with a chair and a table."),
            strict=True,
        ):
            rows.append({"question": text, "answers": [reply], "scene_id": scene})
        cot = "<think>First, look. Next, compare. Last, it is the table.</think><answer>table</answer>"
        cold.append(
            {"scene_id": scene, "question_id": f"{scene}-0", "question": "What is left of the chair?", "cot": cot}
        )
        grounding = (
            "<think>First, a chair.</think><answer>the chair <box>0.50, 0.25, 0.45, 0.50, 0.50, 0.90</box></answer>"
        )
        row = {"scene_id": scene, "question_id": f"{scene}-1", "question": "the chair by the table", "cot": grounding}
        cold.append({**row, "task": "grounding", "object_ids": [CHAIR], "gold_answer": "the chair"})
    _dump(folder / f"ScanRefer_filtered_{split}.json", refer)
    _dump(folder / f"ScanQA_v1.0_{split}.json", qa)
    _dump(folder / f"v1_balanced_questions_{split}_scannetv2.json", {"questions": questions})
    _dump(folder / f"v1_balanced_sqa_annotations_{split}_scannetv2.json", {"annotations": answers})
    for name, rows in texts.items():
        _dump(folder / f"3d_llm_{name}_{split}.json", rows)
    with (folder / "Scene-30K.jsonl").open("a", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in cold)


def _write_nr3d(path: Path, scene_ids: list[str]) -> None:
    columns = "assignmentid stimulus_id scan_id target_id instance_type utterance tokens dataset correct_guess"
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow([*columns.split(), "mentions_target_class"])
        for number, scene in enumerate(scene_ids):
            stimulus = f"{scene}-office chair-2-{CHAIR}-{TABLE}"
            tail = [stimulus, scene, CHAIR, "office chair"]
            for turn, (text, mentions) in enumerate((("the Chair left of the table", True), ("the black one", False))):
                writer.writerow([2 * number + turn, *tail, text, repr(text.split()), "nr3d", True, mentions])


def write_more_annotations(root: Path, scene_id: str = "scene0000_00", split: str = "train") -> None:
    """The files of the less common data sets, about one scene; it stands for an object of Cap3D as well."""
    folder = Path(root) / "annotations"
    question = "### human: I sit on the chair. What is in front of me? ### assistant:"
    qa = [{"question": question, "answers": ["a table,", "table"], "scene_id": scene_id}]
    _dump(folder / f"3d_llm_embodied_question_answer_{split}.json", qa)
    _dump(folder / "scene_caption.json", {scene_id: {"captions": ["A small room.", "A chair and a table."]}})
    refer = {"scan_id": scene_id, "target_id": CHAIR, "caption": "the tall chair"}
    _dump(folder / f"scanrefer_{split}_targets.json", [refer])
    _dump(folder / f"nr3d_{split}_targets.json", [{**refer, "easy": True, "view_dep": False}])
    _dump(folder / "nr3d_captions_by_scene.json", {scene_id: [["chair", "The tall one"], ["table", "The low one"]]})
    (folder / "Cap3D_automated_Objaverse_full.csv").write_text(f'{scene_id},"a chair, tall"\n', encoding="utf-8")


def fake_index(scene_ids, object_ids=()) -> dict[str, SceneInfo]:
    """Index entries of scans that are not there, with boxes of no meaning."""
    numbers = np.array(sorted(object_ids), np.int32)
    boxes_K7 = np.tile(np.array([0, 0, 0.5, 1, 1, 1, 0], np.float32), (len(numbers), 1))
    zero_3 = np.zeros(3)
    labels = ["thing"] * len(numbers)
    classes_K = np.zeros(len(numbers), np.int32)
    return {
        one: SceneInfo(one, numbers, labels, classes_K, boxes_K7, frozenset(), np.eye(4), zero_3, zero_3)
        for one in scene_ids
    }


def scene_of_boxes(
    scene_id: str, object_ids_K: np.ndarray, raw_K6: np.ndarray, labels: list[str], axis_align_44: np.ndarray
) -> Scene:
    """A scene of two points an object, its lowest and its highest corner; `raw_K6` are minimum and maximum."""
    raw_P3 = raw_K6.reshape(-1, 3).astype(np.float64)
    points_P3 = (raw_P3 @ axis_align_44[:3, :3].T + axis_align_44[:3, 3]).astype(np.float32)
    low_K3, high_K3 = np.sort(points_P3.reshape(-1, 2, 3), axis=1).transpose(1, 0, 2)
    boxes_K7 = np.concatenate([(low_K3 + high_K3) / 2, high_K3 - low_K3, np.zeros((len(low_K3), 1))], axis=1)
    return Scene(
        scene_id=scene_id,
        points_N3=points_P3,
        colors_N3=np.zeros(points_P3.shape, np.uint8),
        instance_ids_N=np.repeat(object_ids_K, 2).astype(np.int32),
        nyu40_N=np.zeros(len(points_P3), np.uint8),
        object_ids_K=object_ids_K.astype(np.int32),
        object_labels=labels,
        class_ids_K=np.zeros(len(low_K3), np.int32),
        boxes_K7=boxes_K7.astype(np.float32),
        axis_align_44=np.asarray(axis_align_44, np.float64),
        origin_3=np.zeros(3, np.float32),
    )


def copy_of_root(prepared: Path, target: Path) -> Path:
    """Annotations, prepared scenes and lists of a data root copied into `target`, for a test to break."""
    for name in ("annotations", "prepared"):
        (target / name).mkdir(parents=True)
        for path in (path for path in (prepared / name).iterdir() if path.is_file()):
            (target / name / path.name).write_bytes(path.read_bytes())
    for path in prepared.glob("scannetv2*"):
        (target / path.name).write_bytes(path.read_bytes())
    return target
