"""An examination as text for people."""

from collections import Counter
from collections.abc import Iterable, Sequence

from .findings import DataRow, Examination, Finding, SceneRow, many

_KINDS = {
    "absent": "not there",
    "empty": "empty",
    "generated": "generated rooms; nothing is compared with published numbers",
    "scans": "real scans",
}
_LEVELS = ("error", "warning", "note")
_UNVERIFIED = "?"
# what the table of data sets tells already: all data sets in one line
_TOGETHER = {
    "scene_without_scan": "records on scenes whose scans are missing",
    "scene_not_prepared": "records on scenes that are not prepared",
}


def to_text(examination: Examination) -> str:
    """Tables of scenes and data sets, what is wrong with its fix, and steps where there is little yet."""
    parts = [[f"data root {examination.root}: {_KINDS[examination.kind]}"]]
    if examination.scenes:
        parts.append(_scene_table(examination.scenes))
    parts.append(_data_table([row for row in examination.datasets if row.state != "missing"]))
    missing = [finding for finding in examination.findings if finding.code == "file_missing"]
    parts.append(_missing_files(missing))
    parts.append(findings_text(finding for finding in examination.findings if finding.code != "file_missing"))
    parts.append(examination.advice)
    parts.append([_summary(examination)])
    return "\n\n".join("\n".join(part) for part in parts if part)


def findings_text(findings: Iterable[Finding]) -> list[str]:
    """Lines of findings, errors first; those with the same fix stand together, above it."""
    groups: dict[tuple[str, str], list[Finding]] = {}
    for finding in findings:
        groups.setdefault((finding.level, finding.fix), []).append(finding)
    lines = []
    for (level, fix), group in sorted(groups.items(), key=lambda item: _LEVELS.index(item[0][0])):
        lines += [f"[{level}] {message}" for message in _messages(group)]
        if fix:
            lines.append(f"  fix: {fix}")
    return lines


def _messages(findings: Sequence[Finding]) -> list[str]:
    """Messages of findings with one fix; those of some kinds become one."""
    code = findings[0].code
    if code not in _TOGETHER or len(findings) == 1:
        return [finding.message for finding in findings]
    parts = [f"{finding.message.partition(': ')[0]} {finding.count:,}" for finding in findings]
    return [f"{_TOGETHER[code]}: {'; '.join(parts)}"]


def _scene_table(rows: Sequence[SceneRow]) -> list[str]:
    names = {True: "ScanNet's own", False: "another list", None: ""}
    cells = [["scenes", "listed", "published", "with scan", "prepared", ""]]
    for row in rows:
        if row.scenes is not None or row.expected is not None:
            counts = [row.scenes, row.expected, row.scans, row.prepared]
            cells.append([row.split, *map(_number, counts), names[row.official]])
    return _table(cells, left=1)


def _data_table(rows: Sequence[DataRow]) -> list[str]:
    if not rows:
        return []
    cells = [["data set", "split", "records", "published", "usable", "state"]]
    for row in rows:
        published = _number(row.published) + (_UNVERIFIED if row.published_source == "unverified" else "")
        cells.append([row.dataset, row.split, _number(row.records), published, _number(row.usable), _state(row)])
    lines = _table(cells, left=2)
    lines.append("(records: in the file; usable: samples that the split makes of them, in captioning one an object)")
    if any(row.published_source == "unverified" for row in rows):
        lines.append(f"({_UNVERIFIED}: a number that we could not verify)")
    return lines


def _state(row: DataRow) -> str:
    if row.state == "problems":
        return ", ".join(f"{count:,} {kind.replace('_', ' ')}" for kind, count in row.problems.items())
    return "no prepared scenes to check against" if row.state == "unchecked" else row.state


def _missing_files(findings: Sequence[Finding]) -> list[str]:
    """One line a missing file, those from one place together."""
    groups: dict[str, list[Finding]] = {}
    for finding in findings:
        groups.setdefault(finding.fix, []).append(finding)
    lines = [f"[warning] {many(len(findings), 'annotation file')} missing, needed only for the data sets in brackets:"]
    for fix, group in groups.items():
        for finding in group:
            uses = finding.message.partition(": ")[0]
            lines.append(f"  {finding.files[0].rpartition('/')[2]}   [{uses}]")
        lines.append(f"    fix: {fix}")
    return lines if findings else []


def _summary(examination: Examination) -> str:
    counts = Counter(finding.level for finding in examination.findings)
    words = [many(counts[level], level) for level in _LEVELS if counts[level]]
    if not words:
        return "Nothing is wrong."
    return f"{', '.join(words)}. {'Errors stop commands.' if examination.blocking else 'Nothing stops a command.'}"


def _number(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _table(cells: Sequence[Sequence[str]], *, left: int) -> list[str]:
    """Columns side by side: the first `left` and the last one to the left, the others to the right."""
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = []
    for row in cells:
        padded = [
            text.ljust(width) if column < left or column == len(row) - 1 else text.rjust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(padded).rstrip())
    return lines
