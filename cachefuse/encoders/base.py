"""The interface of encoders: a family opens a spec as one tower per modality; a tower turns samples into features."""

import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cachefuse.errors import EncoderError

if TYPE_CHECKING:
    import numpy as np
from cachefuse.files import JsonObject

ALIGNED = "aligned"  # the family of encoders that use other encoders' features
OPTION = re.compile(r",(?P<name>[a-z_-]+)=(?P<value>[^,=]+)$")  # at the end of a spec
DEFAULTS = {"long_texts": "cut"}  # options with a value that is the same as none
PICKLES = {".bin", ".ckpt", ".pkl", ".pt", ".pth"}  # loading such weights can run code

# view -> (B, D) or (B, T, D) float32 array; ragged tokens are a list of B (T_i, D) arrays, ids of B (T_i,) int32,
# n-grams of B (T_i, 2) int32
Features = JsonObject


@dataclass(frozen=True)
class EncoderSpec:
    """``family:model[@weights][,option=value ...]``; weights are a tag, a revision or a local file."""

    family: str
    model: str = ""
    weights: str = ""
    options: tuple[tuple[str, str], ...] = ()  # by name, without those that have their default

    @classmethod
    def parse(cls, text: str) -> "EncoderSpec":
        """Parse a spec. An ``@`` or an ``,option=value`` in an existing path is part of the path.

        Raises EncoderError for a spec without a family, or with an option twice.
        """
        name, options = text.strip(), {}
        while not _exists(name) and (match := OPTION.search(name)):
            option = match["name"].replace("-", "_")
            if option in options:
                raise EncoderError(f"encoder {text.strip()} says {option} twice")
            options[option], name = match["value"], name[: match.start()]
        family, _, rest = name.partition(":")
        if not family:
            raise EncoderError(f"encoder {text!r} must look like family:model or family:model@weights")
        model, weights = (rest, "") if _exists(name) else rest.partition("@")[::2]
        return cls(family, model, weights).with_options(options)

    def option(self, name: str) -> str | None:
        """Return the value of an option; None for its default."""
        return dict(self.options).get(name)

    def with_options(self, options: Mapping[str, str]) -> "EncoderSpec":
        """Return the spec with these options too; its own stay."""
        given = {name: value for name, value in options.items() if DEFAULTS.get(name) != value}
        return replace(self, options=tuple(sorted({**given, **dict(self.options)}.items())))

    def absolute(self) -> "EncoderSpec":
        """Return the same spec with absolute local paths: it can be opened from any folder."""
        model, weights = (str(path) if path else text for text, path in self._local_paths())
        return replace(self, model=model, weights=weights)

    @property
    def short(self) -> str:
        """The spec with paths cut to their last part, which does not depend on the folder."""
        model, weights = (path.name if path else text for text, path in self._local_paths())
        return str(replace(self, model=model, weights=weights))

    def _local_paths(self) -> list[tuple[str, Path | None]]:
        """Return model and weights, each with its absolute path, or None if it is not local."""
        texts = ((self.model, is_path(self.model)), (self.weights, is_weights_file(self.weights)))
        return [(text, Path(text).expanduser().absolute() if is_local else None) for text, is_local in texts]

    def __str__(self) -> str:
        parts = [self.family, f":{self.model}" * bool(self.model), f"@{self.weights}" * bool(self.weights)]
        return "".join([*parts, *(f",{name}={value}" for name, value in self.options)])


def _exists(spec: str) -> bool:
    """Whether all after a spec's family is a path that exists."""
    path = spec.partition(":")[2]
    return bool(path) and Path(path).expanduser().exists()


def is_path(text: str) -> bool:
    """Whether a spec's model is a local path: it exists, or looks like a path."""
    return bool(text) and (text.startswith((".", "/", "~")) or Path(text).exists())


def is_weights_file(text: str) -> bool:
    """Whether a spec's weights are a file: they look like a path or have a suffix of weights. Tags never do."""
    return text.startswith((".", "/", "~")) or Path(text).suffix in {".safetensors", *PICKLES}


class Tower(ABC):
    """One modality's frozen encoder.

    ``prepare`` takes one sample (on the CPU, in several threads at once), then ``encode`` takes a batch of prepared
    samples. A row's features do not depend on the rest of its batch.
    """

    modality: str  # the name of the column of the dataset that it reads
    width: int  # D of the pooled view, 0 without one
    token_shape: tuple[int, int] | None = None  # (T, D) of the token view; if ragged, T of one short text
    views: tuple[str, ...] = ("pooled", "tokens")
    by_length: bool = False  # whether samples vary in length, so that many are sorted by it before they are batched
    ragged: bool = False  # whether the number of tokens varies
    options: tuple[str, ...] = ()  # of its spec's options, those that change its features
    max_tokens: int = 0  # of a text: longer ones are cut or read in windows; 0 if there is no limit
    vocabulary: int = 0  # of the view ids or ngrams, if the tower has it: every id or column is less

    def check_whole(self) -> None:  # noqa: B027
        """Raise EncoderError if the features of different samples are the same, as of a model without its weights."""

    @property
    @abstractmethod
    def provenance(self) -> Mapping[str, str]:
        """Everything that the features depend on: weights, preprocessing, tokenizer, pooling, library; never a path."""

    @abstractmethod
    def prepare(self, sample: Any) -> Any:
        """Turn what one source loads, such as an RGB image, or one text into an input of ``encode``."""

    def prepare_bytes(self, width: int, height: int) -> int:
        """The bytes that ``prepare`` takes at its peak, beside an RGB image of this size: one copy, if not known."""
        return 4 * width * height

    def length(self, prepared: Any) -> int:
        """The cost of a prepared sample in tokens. Samples of similar length form a batch."""
        return 0

    def n_tokens(self, prepared: Any) -> int:
        """The tokens of a whole text, before it is cut to ``max_tokens``."""
        return self.length(prepared)

    @abstractmethod
    def encode(self, batch: Sequence[Any], views: Collection[str]) -> Features:
        """Encode B prepared samples and return the given views only.

        ``pooled`` is (B, D); ``tokens`` is (B, T, D), or a list of B (T_i, D) if ragged; ``ids``, a text's token ids
        with special tokens, is a list of B (T_i,) int32. Ids alone need no run of the model. ``ngrams``, a text's
        columns in ascending order with their counts, at least 1, is a list of B (T_i, 2) int32.
        """


def is_derived(encoder: str) -> bool:
    """Whether the encoder of a spec computes its features from another encoder's."""
    return encoder.partition(":")[0] == ALIGNED


class DerivedTower(Tower):
    """A tower over another tower's features. If a store has those, no sample is encoded again.

    ``base_encoder`` (a spec's short form), ``base_key`` and ``base_view`` identify those features. ``base`` is the
    tower itself, which encodes raw samples; None if only stored features are mapped.
    """

    views = ("pooled",)
    base_encoder: str
    base_key: str
    base_view: str
    base: Tower | None = None

    @abstractmethod
    def transform(self, rows: "np.ndarray | list[np.ndarray]") -> "np.ndarray":
        """Map B stored rows, pooled (B, D), tokens (B, T, D), or a list of B (T_i, D), to (B, width) float32."""


@dataclass(frozen=True)
class Origin:
    """The origin of a modality's features: ``source``, the spec that opens the encoder, and its provenance."""

    source: str
    provenance: Mapping[str, str]
