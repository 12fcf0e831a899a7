"""The columns of a table, as its readers return them."""

from collections.abc import Iterable

Cell = object  # a text, or ``TooLong``; in parquet and jsonl also a number, a list or null


class TableColumns(dict[str, list[Cell]]):
    """Columns by name: all of a file, or those that were asked for.

    ``names`` are those of all its columns. ``notes`` are facts on the file for the user.
    """

    def __init__(self, columns: dict[str, list[Cell]], names: Iterable[str] = (), n_rows: int = 0) -> None:
        super().__init__(columns)
        self.names = tuple(names)
        self.n_rows = n_rows
        self.notes: list[str] = []

    def with_column(self, name: str, values: list[Cell]) -> "TableColumns":
        """Return the same columns and another one."""
        return TableColumns({**self, name: values}, (*self.names, name), self.n_rows)
