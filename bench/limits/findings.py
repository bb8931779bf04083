"""What an experiment found: figures, some of them bounded, in the order in which a reader wants them."""

from __future__ import annotations

from typing import Any, NamedTuple

from rich.table import Table


class Figure(NamedTuple):
    """One line of the table. A figure without a bound is only told."""

    name: str
    value: Any
    bound: str = ""
    kept: bool = True


class Findings:
    """The figures of one run."""

    def __init__(self) -> None:
        self.figures: list[Figure] = []

    def __getitem__(self, name: str) -> Any:
        return next(figure.value for figure in self.figures if figure.name == name)

    @property
    def hold(self) -> bool:
        return not self.broken

    @property
    def broken(self) -> list[str]:
        """The names of the figures that are out of their bounds."""
        return [figure.name for figure in self.figures if not figure.kept]

    def tell(self, name: str, value: Any) -> None:
        self.figures.append(Figure(name, _short(value)))

    def at_most(self, name: str, value: float, bound: float) -> None:
        self.figures.append(Figure(name, _short(value), f"≤ {bound:g}", value <= bound))

    def at_least(self, name: str, value: float, bound: float) -> None:
        self.figures.append(Figure(name, _short(value), f"≥ {bound:g}", value >= bound))

    def table(self, title: str) -> Table:
        table = Table("what", "measured", "bound", "", title=title)
        for figure in self.figures:
            table.add_row(figure.name, str(figure.value), figure.bound, "" if figure.kept else "[red]broken[/red]")
        return table

    def as_json(self) -> list[dict[str, Any]]:
        return [figure._asdict() for figure in self.figures]


def _short(value: Any) -> Any:
    """Keep as many digits as anybody reads."""
    return round(value, 3) if isinstance(value, float) else value
