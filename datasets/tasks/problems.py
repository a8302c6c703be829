"""What is wrong with single records of an annotation file, gathered instead of raised one at a time."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

Kind = Literal[
    "missing_scene",  # the scene is not among the prepared ones
    "missing_object",  # the scene has no object of that id
    "no_box",  # the target is a wall, floor or ceiling
    "duplicate",  # an id that an earlier record has
    "unpaired",  # a question without its annotation, or the other way round
    "bad_field",  # a field is missing, empty or of the wrong kind
    "bad_record",  # the record as a whole cannot be read
]
R = TypeVar("R")
T = TypeVar("T")


@dataclass(frozen=True)
class Problem:
    """One record that was left out, and why.

    `row` counts from 1; `record_id` is what the file calls the record, "" where it has no name; `field` is "" for the
    record as a whole. `message` is a whole sentence that names file, row and remedy. `scene_id` and `object_id` say
    which scene or object is missing.
    """

    kind: Kind
    dataset: str
    split: str
    path: str
    row: int
    record_id: str
    field: str
    message: str
    scene_id: str = ""
    object_id: int | None = None


class RowError(ValueError):
    """A record that cannot be used; its text is the problem's message."""

    def __init__(
        self,
        kind: Kind,
        path: object,
        row: int,
        message: str,
        *,
        record_id: str = "",
        field: str = "",
        scene_id: str = "",
        object_id: int | None = None,
    ):
        super().__init__(message)
        self.kind: Kind = kind
        self.path, self.row, self.record_id, self.field = str(path), row, record_id, field
        self.scene_id, self.object_id = scene_id, object_id


@dataclass
class Report:
    """What a reader of one data set and split left out: problems by record, and notes for the log."""

    dataset: str
    split: str
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, error: RowError) -> None:
        """Note a record that was refused."""
        self.problems.append(
            Problem(
                kind=error.kind,
                dataset=self.dataset,
                split=self.split,
                path=error.path,
                row=error.row,
                record_id=error.record_id,
                field=error.field,
                message=str(error),
                scene_id=error.scene_id,
                object_id=error.object_id,
            )
        )

    def keep(self, rows: Iterable[R], read: Callable[[R], T | None]) -> list[T]:
        """What `read` makes of each row; refused rows become problems, None leaves a row out without one."""
        kept: list[T] = []
        for row in rows:
            try:
                made = read(row)
            except RowError as error:
                self.add(error)
            else:
                if made is not None:
                    kept.append(made)
        return kept


def count_problems(problems: Iterable[Problem]) -> Counter[tuple[str, Kind]]:
    """How many problems of each kind each data set has, by (dataset, kind)."""
    return Counter((problem.dataset, problem.kind) for problem in problems)


def in_one_sentence(problems: Sequence[Problem]) -> str:
    """The first problem's message, and how many more there are of which kinds."""
    message = problems[0].message
    if len(problems) == 1:
        return message
    kinds = Counter(problem.kind.replace("_", " ") for problem in problems[1:])
    more = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    return f"{message.removesuffix('.')}; and {len(problems) - 1} more records cannot be used ({more})."
