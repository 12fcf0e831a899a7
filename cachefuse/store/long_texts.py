"""Texts that are longer than their encoder's limit."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from cachefuse.files import JsonObject


@dataclass(frozen=True)
class LongTexts:
    """How many of ``n_texts`` are longer than ``limit`` tokens: the ``lengths`` in tokens of those that are.

    They are cut to the limit, or with ``windows`` the features are the mean over windows of the whole text.
    """

    n_texts: int
    limit: int
    lengths: tuple[int, ...]
    windows: bool

    @property
    def is_cut(self) -> bool:
        """Whether the end of some text is lost."""
        return bool(self.lengths) and not self.windows

    @property
    def message(self) -> str:
        """One line for the user; "" if no text is longer."""
        if not self.lengths:
            return ""
        fate = "read whole, in windows" if self.windows else "cut; extract --long-texts windows reads them whole"
        return (
            f"{len(self.lengths):,} of {self.n_texts:,} texts are longer than {self.limit:,} tokens "
            f"(their median: {median(self.lengths):,.0f}) and are {fate}"
        )

    @classmethod
    def total(cls, parts: Sequence["LongTexts"]) -> "LongTexts":
        """Return the counts of all parts, which have one limit. Raises IndexError for no parts."""
        lengths = tuple(n for part in parts for n in part.lengths)
        return cls(sum(part.n_texts for part in parts), parts[0].limit, lengths, parts[0].windows)

    def to_dict(self) -> JsonObject:
        """Return the counts as JSON."""
        middle = median(self.lengths) if self.lengths else None
        longer = {"longer": len(self.lengths), "median": middle}
        return {"texts": self.n_texts, "limit": self.limit, **longer, "windows": self.windows}
