"""Two things measured side by side in one run, figure by figure, and the ratio between them that has to be kept."""

from __future__ import annotations

from typing import Any, NamedTuple

from rich.table import Table


class Line(NamedTuple):
    """One figure of both; None: it has no such figure."""

    name: str
    ours: float | None
    theirs: float | None
    digits: int = 1
    #: What the ratio may be at most; None: it is only told.
    bound: float | None = None

    @property
    def ratio(self) -> float | None:
        return self.ours / self.theirs if self.ours is not None and self.theirs else None

    @property
    def kept(self) -> bool:
        """Whether the bound is; without the other's figure there is nothing to break."""
        return self.bound is None or self.ratio is None or self.ratio <= self.bound


class Comparison:
    """The lines of one run, under the names of the two."""

    def __init__(self, ours: str, theirs: str) -> None:
        self._names = ours, theirs
        self._lines: list[Line] = []
        self._ends_of_sections: set[int] = set()

    @property
    def hold(self) -> bool:
        return not self.broken

    @property
    def broken(self) -> list[str]:
        """The names of the figures whose ratio is above its bound."""
        return [line.name for line in self._lines if not line.kept]

    def add(
        self, name: str, ours: float | None, theirs: float | None, *, digits: int = 1, at_most: float | None = None
    ) -> None:
        """Add a figure, in the order in which a reader wants them.

        Args:
            at_most: The bound of the ratio, ours by theirs.
        """
        self._lines.append(Line(name, ours, theirs, digits, at_most))

    def end_section(self) -> None:
        """Draw a line below what has been added so far."""
        self._ends_of_sections.add(len(self._lines))

    def table(self, title: str) -> Table:
        table = Table(title=title)
        table.add_column("")
        for heading in (*self._names, "ratio", "bound"):
            table.add_column(heading, justify="right")
        table.add_column("")
        for number, line in enumerate(self._lines, 1):
            table.add_row(
                line.name,
                _shown(line.ours, line.digits),
                _shown(line.theirs, line.digits),
                _shown(line.ratio, 2),
                "" if line.bound is None else f"≤ {line.bound:g}",
                "" if line.kept else "[red]broken[/red]",
                end_section=number in self._ends_of_sections,
            )
        return table

    def as_json(self) -> list[dict[str, Any]]:
        ours, theirs = self._names
        return [
            {
                "name": line.name,
                ours: line.ours,
                theirs: line.theirs,
                "ratio": line.ratio,
                "bound": line.bound,
                "kept": line.kept,
            }
            for line in self._lines
        ]


def _shown(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:,.{digits}f}"
