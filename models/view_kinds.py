"""Kinds of candidate views and how a pool is shared out among them; imports nothing heavy.

A source is a name (`posed`, `rendered`, `mixed`, `none`) or kinds joined by `+`, as `posed+inside+ring`.
"""

KINDS = {
    "posed": "frames of the scan, spread over positions and directions, without blurred ones and near-copies",
    "inside": "rendered from the free floor at eye height (around a single object), each showing what others do not",
    "ring": "rendered from a circle at eye height, looking at the middle",
    "top": "rendered from below the ceiling, looking straight down",
    "bottom": "rendered from a circle just above the floor, looking up at the middle",
    "object": "rendered from a sphere around the whole cloud",
}
NAMED = {"posed": ("posed",), "rendered": ("inside",), "mixed": ("posed", "inside"), "none": ()}


def kinds_of(source: str) -> tuple[str, ...]:
    """Kinds of views that a source means, in its order; ValueError for an unknown or repeated one."""
    if source in NAMED:
        return NAMED[source]
    kinds = tuple(source.split("+"))
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or len(set(kinds)) < len(kinds):
        raise ValueError(
            f"source is {source!r}; choose posed, rendered, mixed or none, or join different ones of "
            f"{', '.join(KINDS)} by +, as in posed+inside+ring."
        )
    return kinds


def share_out(kinds: tuple[str, ...], count: int) -> dict[str, int]:
    """Views of each kind: as even as `count` allows, later kinds getting the odd ones; kinds may get none."""
    bounds = [count * row // len(kinds) for row in range(len(kinds) + 1)] if kinds else []
    return {kind: bounds[row + 1] - bounds[row] for row, kind in enumerate(kinds)}
