"""What the doctor found: one Finding a matter, one row a list of scenes, one row a data set and split."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

Level = Literal["error", "warning", "note"]
# how a data root stands as a whole
Kind = Literal["absent", "empty", "generated", "scans"]
# how a data set stands in one split
State = Literal["ok", "empty", "problems", "missing", "broken", "unchecked"]
SCHEMA = 1  # raise it when a field of the JSON form changes its meaning or goes
MAX_NAMED = 3


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong or worth knowing.

    `level`: error (a command stops, or its result is wrong), warning (a part is missing or unusual) or note. `code`
    names the kind of finding and is kept between versions. `count` is what was counted, `expected` what it should be,
    `files` what the finding is about, relative to the data root. `fix` is a command or says which file to put where.
    """

    level: Level
    code: str
    message: str
    fix: str = ""
    dataset: str = ""
    split: str = ""
    count: int | None = None
    expected: int | None = None
    files: tuple[str, ...] = ()


@dataclass
class SceneRow:
    """One of the lists of scenes: how many it names, and of these how many have a scan and are prepared.

    `scenes` is None where the file is missing or unreadable. `official` says whether it is ScanNet's own list; None
    where that was not asked, for generated rooms.
    """

    split: str
    scenes: int | None
    expected: int | None
    official: bool | None
    scans: int = 0
    prepared: int = 0


@dataclass
class DataRow:
    """One data set in one split.

    `records` are those in its (first) file, `published` as many as there should be (`published_source` of Count);
    `usable` are the samples that the reader makes of them. Problems are counts by kind (datasets/tasks/problems.py).
    """

    dataset: str
    split: str
    state: State
    files: tuple[str, ...]
    missing: tuple[str, ...] = ()
    records: int | None = None
    published: int | None = None
    published_source: str = ""
    usable: int | None = None
    problems: dict[str, int] = field(default_factory=dict)


@dataclass
class Examination:
    """All that was found out about a data root."""

    root: str
    kind: Kind
    scenes: list[SceneRow] = field(default_factory=list)
    datasets: list[DataRow] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)

    @property
    def blocking(self) -> bool:
        """Whether something was found that stops a command or makes its result wrong."""
        return any(finding.level == "error" for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)


def many(count: int, word: str) -> str:
    """A count with its word, as "1 scan" and "1,201 scans"."""
    return f"{count:,} {word}{'' if count == 1 else 's'}"


def some(names: Sequence[str]) -> str:
    """The first few of some names, and how many more there are."""
    more = f" and {len(names) - MAX_NAMED:,} more" if len(names) > MAX_NAMED else ""
    return f"{', '.join(names[:MAX_NAMED])}{more}"


def relative(path: str | Path, root: Path) -> str:
    """A path as it stands below the data root."""
    path = Path(path)
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)
