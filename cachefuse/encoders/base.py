"""What an encoder is: a family opens a spec to one tower a modality; a tower turns samples into features."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cachefuse.errors import EncoderError

if TYPE_CHECKING:
    import numpy as np
from cachefuse.files import JsonObject

ALIGNED = "aligned"  # the family of encoders that are made of others
PICKLES = {".bin", ".ckpt", ".pkl", ".pt", ".pth"}  # weights in these can run code when they are loaded

# view -> (B, D) or (B, T, D) float32 array; for ragged tokens a list of B (T_i, D) arrays, for ids of B (T_i,) int32
Features = JsonObject


@dataclass(frozen=True)
class EncoderSpec:
    """``family:model[@weights]``; weights are a tag, a revision or a local file."""

    family: str
    model: str = ""
    weights: str = ""

    @classmethod
    def parse(cls, text: str) -> "EncoderSpec":
        """Parse a spec. An ``@`` inside a path that exists belongs to the path."""
        family, _, rest = text.strip().partition(":")
        if not family:
            raise EncoderError(f"encoder {text!r} must look like family:model or family:model@weights")
        if Path(rest).expanduser().exists():
            return cls(family, rest)
        model, _, weights = rest.partition("@")
        return cls(family, model, weights)

    def absolute(self) -> "EncoderSpec":
        """The same encoder with local paths made absolute, so that it can be opened from any folder."""
        model, weights = (str(path) if path else part for part, path in self._local_parts())
        return EncoderSpec(self.family, model, weights)

    @property
    def short(self) -> str:
        """The spec with paths cut to their last part: the same wherever the files lie."""
        model, weights = (path.name if path else part for part, path in self._local_parts())
        return f"{self.family}{':' + model if model else ''}{'@' + weights if weights else ''}"

    def _local_parts(self) -> list[tuple[str, Path | None]]:
        local = ((self.model, is_path(self.model)), (self.weights, is_weights_file(self.weights)))
        return [(part, Path(part).expanduser().absolute() if here else None) for part, here in local]

    def __str__(self) -> str:
        return f"{self.family}{':' + self.model if self.model else ''}{'@' + self.weights if self.weights else ''}"


def is_path(text: str) -> bool:
    """Whether a spec's model is a local path: it exists, or is written like one."""
    return bool(text) and (text.startswith((".", "/", "~")) or Path(text).exists())


def is_weights_file(text: str) -> bool:
    """Whether a spec's weights are a file: written like a path, or named like one. A tag never is."""
    return text.startswith((".", "/", "~")) or Path(text).suffix in {".safetensors", *PICKLES}


class Tower(ABC):
    """One modality's frozen encoder.

    A sample passes ``prepare`` (CPU, called from several threads at once), then a batch of prepared samples
    ``encode``. A row's features do not depend on the rest of its batch.
    """

    modality: str  # "image" or "text"
    width: int  # D of the pooled view
    token_shape: tuple[int, int] | None = None  # (T, D) of the token view; if ragged, T is that of one short text
    views: tuple[str, ...] = ("pooled", "tokens")
    ragged: bool = False  # whether samples differ in their number of tokens
    vocabulary: int = 0  # of the view ids, if there is one: every id is less

    @property
    @abstractmethod
    def provenance(self) -> Mapping[str, str]:
        """What the features depend on: weights, preprocessing, tokenizer, pooling, library; never a path."""

    @abstractmethod
    def prepare(self, sample: Any) -> Any:
        """Turn one RGB image or one text into what ``encode`` takes."""

    def length(self, prepared: Any) -> int:
        """The cost of a prepared sample in tokens; batches are made of samples of like length."""
        return 0

    @abstractmethod
    def encode(self, batch: Sequence[Any], views: Collection[str]) -> Features:
        """Encode B prepared samples to the views asked for, so that no token nobody wants is copied.

        ``pooled`` is (B, D); ``tokens`` is (B, T, D), or a list of B (T_i, D) if ragged; ``ids``, the numbers of a
        text's tokens, special ones included, are a list of B (T_i,) int32. For ids alone the model is not run.
        """


def is_derived(encoder: str) -> bool:
    """Whether an encoder, by its spec, makes its features of another's."""
    return encoder.partition(":")[0] == ALIGNED


class DerivedTower(Tower):
    """A tower over another tower's features: where a store has those, no sample has to be encoded again.

    ``base_encoder`` (a spec's short form), ``base_key`` and ``base_view`` say which features those are.
    """

    views = ("pooled",)
    base_encoder: str
    base_key: str
    base_view: str

    @abstractmethod
    def transform(self, rows: "np.ndarray | list[np.ndarray]") -> "np.ndarray":
        """Map B stored rows, pooled (B, D), tokens (B, T, D), or a list of B (T_i, D), to (B, width) float32."""


@dataclass(frozen=True)
class Origin:
    """Where a modality's features are from: the encoder's ``source``, which opens it again, and its provenance."""

    source: str
    provenance: Mapping[str, str]
