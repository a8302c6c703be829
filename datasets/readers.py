"""Any scan -> Scene: point clouds, meshes, prepared and raw ScanNet scans, posed RGB-D frames.

`read_scene` says in `Scene.notes` what it assumed (up-axis, scale, colours). Labels are read where the format has
them (ScanNet); any other scan has none.
"""

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from . import scannet
from .alignment import AlignOptions
from .alignment import align as estimate_alignment
from .captures import Capture, read_capture
from .frames import evenly, has_frames, list_frames, list_pictures
from .fusion import MAX_DEPTH, unproject, voxel_mean
from .labelled_cloud import GREY, keep_points, transform
from .outliers import inliers
from .ply import read_ply, to_uint8
from .scannet import LABEL_MAP_NAME
from .scene import BrokenScene, Frame, Scene, floor_centre, load_scene

ALIGN_MODES = ("auto", "none")
MESH_SUFFIXES = (".obj", ".glb", ".gltf", ".stl", ".off")
Y_UP_SUFFIXES = (".glb", ".gltf")  # by the format's definition
SURFACE_POINTS = 200_000
DENSE_VERTICES = 20_000  # a mesh with fewer is sampled on its faces
MOST_FUSED = 300  # frames of a capture: a phone takes 60 a second, hardly different ones
VOXEL = 0.02  # metres
MOST_BYTES = 1 << 29  # that an array of an .npz file may have when it is unpacked
MAX_EXTENT = 1e7  # units of the file; a room in millimetres spans 1e4
_MAGIC = {b"ply": ".ply", b"PK\x03\x04": ".npz", b"glTF": ".glb", b"OFF": ".off"}  # what files begin with
_POINT_KEYS = ("xyz", "points", "points_N3", "coords", "coord", "positions")
_COLOR_KEYS = ("rgb", "colors", "colors_N3", "color", "colours")


class _Cloud:
    """Points as a file holds them, with what is known about them."""

    def __init__(self, points_N3: np.ndarray, colors_N3: np.ndarray | None, *, up: str = "z"):
        self.points_N3 = np.asarray(points_N3)
        self.colors_N3 = colors_N3
        self.up = up
        self.up_hint_3: np.ndarray | None = None
        self.up_hint_name = "the cameras' mean up direction"
        self.frames: list[Frame] = []  # poses in the cloud's own frame
        self.notes: list[str] = []


def read_scene(
    path: str | Path, *, align: str | AlignOptions = "auto", max_points: int = 200_000, seed: int = 0
) -> Scene:
    """Read a scan.

    Args:
        path: a .ply, .npz, .obj, .glb, .gltf, .stl or .off file; a raw ScanNet scan folder; or a folder of posed
            RGB-D frames or of a phone scanner's export (captures.py), which is fused into a cloud.
        align: `auto` turns up to +z, scales to metres and turns walls along x and y (recorded in axis_align_44);
            `none` takes the file's frame as it is; AlignOptions is `auto` with what is known. Scans that bring their
            own alignment keep it under any.
        max_points: a larger cloud is thinned by a seeded choice.

    Raises:
        ValueError: nothing there, an unknown format, an empty cloud, no finite point; one sentence each.
    """
    path = Path(path)
    if isinstance(align, str) and align not in ALIGN_MODES:
        raise ValueError(f"Unknown alignment {align!r}; it is one of {', '.join(ALIGN_MODES)}.")
    if max_points < 1:
        raise ValueError(f"max_points is {max_points}; a scene keeps at least one point.")
    check_there(path)
    if path.is_dir():
        if (path / f"{path.name}_vh_clean_2.ply").exists():
            return _read_scannet(path, max_points, seed)
        cloud = _fuse_folder(path)
    elif path.suffix.lower() == ".ply":
        cloud = _read_ply_cloud(path, seed)
    elif path.suffix.lower() == ".npz":
        cloud = _read_npz(path)
        if isinstance(cloud, Scene):
            return cloud
    elif path.suffix.lower() in MESH_SUFFIXES:
        cloud = _read_mesh(path, seed)
    else:
        if path.suffix.lower() == ".r3d":
            raise ValueError(
                f"{path} is Record3D's own recording, which we do not unpack; export it from the app as PLY."
            )
        known = ", ".join((".ply", ".npz", *MESH_SUFFIXES))
        raise ValueError(
            f"{path} is of no format that we read ({known}, a ScanNet scan or a folder of RGB-D frames)"
            f"{_looks_like(path)}."
        )
    return _to_scene(path.name if path.is_dir() else path.stem, path, cloud, align, max_points, seed)


def check_there(path: str | Path) -> None:
    """ValueError where there is no scan at a path."""
    if not Path(path).exists():
        raise ValueError(f"There is no scan at {path}; check the path.")


def _to_scene(name: str, path: Path, cloud: _Cloud, align: str | AlignOptions, max_points: int, seed: int) -> Scene:
    points_N3, colors_N3, notes = cloud.points_N3, cloud.colors_N3, list(cloud.notes)
    if points_N3.ndim != 2 or points_N3.shape[1] != 3:
        raise ValueError(f"{path}: points have shape {points_N3.shape}, not [N, 3].")
    if len(points_N3) == 0:
        raise ValueError(f"{path} is an empty cloud: it has 0 points. Export it again from the scanning software.")
    if colors_N3 is not None and colors_N3.shape != points_N3.shape:
        raise ValueError(f"{path}: colours have shape {colors_N3.shape}, points {points_N3.shape}; they must agree.")
    finite_N = np.logical_and.reduce([np.isfinite(points_N3[:, axis]) for axis in range(3)])
    if not finite_N.any():
        raise ValueError(f"{path} has no point with finite coordinates (NaN or infinite); export it again.")
    if not finite_N.all():
        notes.append(f"{int((~finite_N).sum())} points with NaN or infinite coordinates left out")
        points_N3 = points_N3[finite_N]
        colors_N3 = colors_N3[finite_N] if colors_N3 is not None else None
    # column by column: for millions of points much faster than along the first axis
    extent = max(float(points_N3[:, axis].max()) - float(points_N3[:, axis].min()) for axis in range(3))
    if extent == 0 or extent > MAX_EXTENT:
        raise ValueError(f"{path} is no room: its points span {extent:.3g} units; export the scan in metres again.")
    if colors_N3 is None:
        notes.append("no colours: grey")
        colors_N3 = np.full(points_N3.shape, GREY, np.uint8)
    rng = np.random.default_rng(seed)
    axis_align_44 = np.eye(4)
    if isinstance(align, AlignOptions) and align.from_video:
        points_N3, colors_N3, cleaned = _without_strays(points_N3, colors_N3, 2 * max_points, rng)
        notes += cleaned
    if align != "none":
        options = align if isinstance(align, AlignOptions) else AlignOptions()
        estimate = estimate_alignment(
            points_N3,
            rng,
            assumed_up=cloud.up,
            up_hint_3=cloud.up_hint_3,
            up_hint_name=cloud.up_hint_name,
            options=options,
        )
        axis_align_44 = estimate.matrix
        notes += estimate.notes
    else:
        notes.append("frame taken as it is: metres, +z up")
    world_N3 = transform(points_N3, axis_align_44)
    origin_3 = floor_centre(world_N3)
    kept = keep_points(points_N3, world_N3, max_points, rng)
    if len(kept) < len(world_N3):
        notes.append(f"{len(kept)} of {len(world_N3)} points kept")
    count = len(kept)
    return Scene(
        scene_id=name,
        points_N3=world_N3[kept],
        colors_N3=colors_N3[kept],
        instance_ids_N=np.full(count, -1, np.int32),
        nyu40_N=np.zeros(count, np.uint8),
        object_ids_K=np.zeros(0, np.int32),
        object_labels=[],
        class_ids_K=np.zeros(0, np.int32),
        boxes_K7=np.zeros((0, 7), np.float32),
        axis_align_44=axis_align_44,
        origin_3=origin_3,
        frames=[_moved(frame, axis_align_44) for frame in cloud.frames],
        notes=notes,
    )


def _without_strays(
    points_N3: np.ndarray, colors_N3: np.ndarray, at_most: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """A cloud thinned to so many points at most, without its stray points; and a note."""
    notes = []
    if len(points_N3) > at_most:
        notes.append(f"{at_most} of {len(points_N3)} points looked at")
        rows = rng.choice(len(points_N3), at_most, replace=False)
        points_N3, colors_N3 = points_N3[rows], colors_N3[rows]
    kept_N = inliers(points_N3)
    gone = int((~kept_N).sum())
    notes.append(f"{gone} stray points removed ({100 * gone / len(kept_N):.1f} %)")
    return points_N3[kept_N], colors_N3[kept_N], notes


def _moved(frame: Frame, axis_align_44: np.ndarray) -> Frame:
    """A frame moved to the world; the scale of the alignment goes to the position, not to the camera's axes."""
    pose_44 = axis_align_44 @ frame.pose_44
    pose_44[:3, :3] /= np.cbrt(np.linalg.det(pose_44[:3, :3]))
    return Frame(frame.color_path, frame.depth_path, pose_44, frame.intrinsics_33)


def _read_scannet(path: Path, max_points: int, seed: int) -> Scene:
    """A raw scan in place, labelled where its files and the data root's label table are there."""
    options = scannet.PrepareOptions(max_points=max_points, seed=seed)
    table = path.parent.parent / LABEL_MAP_NAME
    if table.exists():
        return scannet.build_scene(path, scannet.load_label_map(table), options=options)
    return scannet.build_scene(path, None, options=options)


def _read_ply_cloud(path: Path, seed: int) -> _Cloud:
    try:
        mesh = read_ply(path)
    except ValueError as error:
        raise ValueError(f"{str(error).removesuffix('.')}{_looks_like(path)}.") from None
    if len(mesh.faces_F3) and len(mesh.vertices_V3) < DENSE_VERTICES:
        return _sample_faces(mesh.vertices_V3, mesh.faces_F3, mesh.colors_V3, seed)
    return _Cloud(mesh.vertices_V3, mesh.colors_V3)


def _sample_faces(
    vertices_V3: np.ndarray, faces_F3: np.ndarray, colors_V3: np.ndarray | None, seed: int, *, up: str = "z"
) -> _Cloud:
    """Points drawn evenly from the area of a mesh, colours interpolated."""
    corners_F33 = vertices_V3[faces_F3].astype(np.float64)
    area_F = np.linalg.norm(
        np.cross(corners_F33[:, 1] - corners_F33[:, 0], corners_F33[:, 2] - corners_F33[:, 0]), axis=1
    )
    area_F = np.where(np.isfinite(area_F), area_F, 0.0)
    if area_F.sum() <= 0:
        raise ValueError("The mesh has no surface: all its faces have zero area. Export it again.")
    rng = np.random.default_rng(seed)
    face_N = rng.choice(len(faces_F3), size=SURFACE_POINTS, p=area_F / area_F.sum())
    u_N, v_N = rng.random(SURFACE_POINTS), rng.random(SURFACE_POINTS)
    over_N = u_N + v_N > 1
    u_N, v_N = np.where(over_N, 1 - u_N, u_N), np.where(over_N, 1 - v_N, v_N)
    weights_N3 = np.stack([1 - u_N - v_N, u_N, v_N], axis=1)
    points_N3 = (corners_F33[face_N] * weights_N3[:, :, None]).sum(axis=1)
    colors_N3 = None
    if colors_V3 is not None:
        colors_N3 = np.rint((colors_V3[faces_F3[face_N]] * weights_N3[:, :, None]).sum(axis=1)).astype(np.uint8)
    cloud = _Cloud(points_N3.astype(np.result_type(vertices_V3, np.float32), copy=False), colors_N3, up=up)
    cloud.notes.append(f"mesh of {len(faces_F3)} faces sampled at {SURFACE_POINTS} points")
    return cloud


def _read_mesh(path: Path, seed: int) -> _Cloud:
    """A mesh through trimesh; textures become vertex colours first."""
    import trimesh

    try:
        scene = trimesh.load_scene(path)
        mesh = scene.to_mesh()
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, OSError, MemoryError) as error:
        raise ValueError(f"{path} is not a readable mesh ({error}); export it again.") from None
    if len(mesh.faces) == 0:
        raise ValueError(f"{path} has no faces; save a plain cloud as .ply or .npz instead.")
    visual = mesh.visual
    if visual.kind == "texture":
        visual = visual.to_color()
    colors_V3 = np.asarray(visual.vertex_colors)[:, :3].astype(np.uint8) if visual.kind is not None else None
    up = "y" if path.suffix.lower() in Y_UP_SUFFIXES else "z"
    return _sample_faces(np.asarray(mesh.vertices), np.asarray(mesh.faces), colors_V3, seed, up=up)


def _read_npz(path: Path) -> _Cloud | Scene:
    try:
        archive = np.load(path)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise _NotACloud(f"{path} holds a single array; write it with np.savez(path, points=…).")
        with archive:
            names = set(archive.files)
            _refuse_bombs(path, archive)
            if "header" in names and "boxes_K7" in names:
                return load_scene(path)
            point_key = next((key for key in _POINT_KEYS if key in names), None)
            if point_key is None:
                raise _NotACloud(
                    f"{path} has no array {' or '.join(_POINT_KEYS[:2])}; it has {', '.join(sorted(names))}."
                )
            points = archive[point_key]
            color_key = next((key for key in _COLOR_KEYS if key in names), None)
            colors = archive[color_key] if color_key else None
        for array in (points, colors):
            if array is not None and array.dtype.kind not in "fiu":
                raise _NotACloud(f"{path}: points and colours are numbers, not {array.dtype}; write them again.")
    except _NotACloud as error:
        raise ValueError(str(error)) from None
    except BrokenScene:
        raise
    except (ValueError, EOFError, OSError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
        if "Object arrays" in str(error):  # NumPy does not unpickle what a stranger wrote
            raise ValueError(
                f"{path} holds Python objects; points and colours are numbers, write them again."
            ) from None
        raise ValueError(
            f"{path} is not a whole .npz file ({error}){_looks_like(path)}; copy it again from its source."
        ) from None
    if points.ndim == 2 and points.shape[1] == 6 and colors is None:
        points, colors = points[:, :3], points[:, 3:]
    return _Cloud(points.astype(np.float64, copy=False), to_uint8(colors) if colors is not None else None)


def _refuse_bombs(path: Path, archive: Any) -> None:
    """_NotACloud where an archive would unpack to more than any room needs: a few bytes can stand for terabytes."""
    largest = max((info.file_size for info in archive.zip.infolist()), default=0)
    if largest > MOST_BYTES:
        raise _NotACloud(
            f"{path} would unpack to {largest / 2**30:.1f} GiB; that is no scan of a room, or thin it to fewer points."
        )


def _looks_like(path: Path) -> str:
    """What a file of the wrong name really is, to stand in an error message; "" where it cannot be told."""
    with path.open("rb") as stream:
        start = stream.read(8)
    suffix = next((suffix for magic, suffix in _MAGIC.items() if start.startswith(magic)), None)
    if suffix is None or suffix == path.suffix.lower():
        return ""
    return f"; it looks like a {suffix} file, so name it {path.stem}{suffix}"


class _NotACloud(Exception):
    """An .npz file in order, but without points."""


def _fuse_folder(folder: Path) -> _Cloud:
    """Depth of all posed frames as one cloud: metres in the poses' frame, one point per 2 cm voxel."""
    capture = read_capture(folder)
    if capture is not None:
        return _fuse(folder, capture)
    if not has_frames(folder) and list_pictures(folder):
        raise ValueError(
            f"{folder} holds pictures without poses, from which no cloud is made; add pose/ and intrinsic/, or a mesh."
        )
    if not has_frames(folder):
        raise ValueError(
            f"{folder} is neither a raw ScanNet scan nor a folder of posed frames "
            "(000000.color.jpg, 000000.depth.png, 000000.pose.txt, intrinsics.txt), nor an export of Polycam "
            "(keyframes/), ARKitScenes (lowres_wide.traj) or nerfstudio (transforms.json)."
        )
    frames, lost = list_frames(folder, np.eye(4))
    return _fuse(folder, Capture("posed frames", frames, left_out=lost))


def _fuse(folder: Path, capture: Capture) -> _Cloud:
    """The cloud of a capture, from MOST_FUSED of its frames at most."""
    frames = capture.frames
    with_depth = [frame for frame in frames if frame.depth_path]
    if not with_depth:
        raise ValueError(f"{folder} has no frame with both a depth picture and a finite pose; nothing to fuse.")
    fused = evenly(with_depth, MOST_FUSED)
    stride = 1 if len(fused) <= 8 else 2
    parts = [
        unproject(frame, stride=stride, confidence_path=capture.confidence.get(frame.color_path)) for frame in fused
    ]
    points_N3, colors_N3 = voxel_mean(
        np.concatenate([points for points, _ in parts]), np.concatenate([colors for _, colors in parts]), VOXEL
    )
    cloud = _Cloud(points_N3, colors_N3)
    # image rows grow downwards: people hold cameras upright on average
    upright_3 = -np.mean([frame.pose_44[:3, 1] for frame in frames], axis=0)
    cloud.up_hint_3 = upright_3
    if capture.up_3 is not None:
        cloud.up_hint_3, cloud.up_hint_name = capture.up_3, "the up direction of the format"
    cloud.frames = frames
    of = f" of {len(with_depth)}" if len(fused) < len(with_depth) else ""
    cloud.notes.append(
        f"{capture.kind}: {len(fused)}{of} depth frames fused at {VOXEL * 100:.0f} cm, depth beyond {MAX_DEPTH:.0f} m "
        "left out"
    )
    if capture.left_out:
        cloud.notes.append(f"{capture.left_out} frames without a finite pose, or without a picture, left out")
    return cloud
