"""The doctor on real annotation files: published counts, hashes of ScanNet's lists, whole files surveyed."""

import pytest

from threedr1.datasets.doctor import examine
from threedr1.datasets.doctor.survey import survey
from threedr1.datasets.published import COUNTS


@pytest.fixture(scope="module")
def real_root(real_data, tmp_path_factory):
    """A root with ScanNet's lists and the real annotations, without any scan."""
    root = tmp_path_factory.mktemp("real")
    (root / "annotations").symlink_to(real_data / "annotations")
    for path in (real_data / "scannet").glob("scannetv2*"):
        (root / path.name).symlink_to(path)
    return root


@pytest.mark.real
def test_counted_numbers_are_those_of_the_files(real_data):
    counted = 0
    for name, count in COUNTS.items():
        path = real_data / "annotations" / name
        if path.exists():
            found = survey(path)
            assert (found.records, len(found.scenes)) == (count.records, count.scenes), name
            assert count.source == "counted"
            counted += 1
    assert counted == sum(count.source == "counted" for count in COUNTS.values()) == 12


@pytest.mark.real
def test_real_files_agree_with_what_is_published(real_root):
    examination = examine(real_root)
    codes = {finding.code for finding in examination.findings}
    assert codes == {"file_missing", "scans_missing", "evaluation_on_train_scenes"}
    assert [(row.split, row.scenes, row.official) for row in examination.scenes] == [
        ("train", 1201, True),
        ("val", 312, True),
        ("test", 100, True),
    ]
    rows = {(row.dataset, row.split): row.records for row in examination.datasets if row.state != "missing"}
    assert rows["scanqa", "val"] == 4675 and rows["sqa3d", "test"] == 3519 and rows["embodied_qa", "train"] == 14_944
    (shared,) = [one for one in examination.findings if one.code == "evaluation_on_train_scenes"]
    # LL3DA's validation files of 3D-LLM are all on scenes of ScanNet's train list
    assert len(shared.files) == 4 and shared.count == 61


@pytest.mark.real
def test_a_reordered_list_is_still_scannets(real_data, tmp_path):
    scene_ids = (real_data / "scannet" / "scannetv2_val.txt").read_text().split()
    (tmp_path / "scannetv2_val.txt").write_text("\r\n".join(reversed(scene_ids)))
    examination = examine(tmp_path)
    (row,) = [row for row in examination.scenes if row.split == "val"]
    assert row.official is True
    assert [one.split for one in examination.findings if one.code == "list_reordered"] == ["val"]
