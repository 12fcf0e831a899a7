"""The common code of torch encoders: get weights, freeze a model, encode."""

import hashlib
import json
import logging
from abc import abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from torch import Tensor, nn

from cachefuse.encoders.base import EncoderSpec, Features, Tower, is_weights_file
from cachefuse.encoders.probe import WORDS, pictures
from cachefuse.encoders.tokenizer_settings import slow_rules, unusual_settings
from cachefuse.errors import BadSampleError, CachefuseError, EncoderError

logger = logging.getLogger(__name__)

Together: TypeAlias = Literal["all", "equal lengths", "one"]  # which samples may be encoded together
TOGETHER = {"equal lengths": "texts of equal length are encoded together", "one": "each sample is encoded alone"}
# The largest effect of a batch that may be the order of sums, relative to the largest feature. Convolutions, and
# CUDA's products, round more: they take another algorithm for another shape.
ROUNDING, CONVOLUTION_ROUNDING = 1e-5, 1e-3
# What Python raises where a library uses a value that it has not checked; the message does not say which.
UNCHECKED = (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError)


class FrozenTower(Tower):
    """A tower over a frozen torch model: mixed precision on CUDA, float32 on the CPU."""

    def __init__(self, modality: str, model: nn.Module, device: str, provenance: Mapping[str, str]):
        self.modality = modality
        self.model: Any = model.eval().requires_grad_(False).to(device)
        self.device = torch.device(device)
        self.half = torch.float16  # 3 more mantissa bits than bfloat16, which models that overflow need
        self.together: Together = "all"
        self._changes = False  # whether a pass has replaced modules of the model
        self._exact = False  # whether CUDA computes in float32, to compare features
        self._provenance = dict(provenance)

    @property
    def provenance(self) -> Mapping[str, str]:
        return self._provenance

    @abstractmethod
    def forward(self, batch: Sequence[Any], tokens: bool) -> tuple[Tensor, Tensor | None]:
        """Return pooled (B, D) and tokens (B, T, D), padded to the longest if ragged, or None without tokens."""

    def encode(self, batch: Sequence[Any], views: Collection[str]) -> Features:
        groups = self._groups(batch)
        if len(groups) == 1:
            return self._encode(batch, views)
        rows: dict[str, list[Any]] = {}
        for group in groups:
            for view, values in self._encode([batch[i] for i in group], views).items():
                for i, value in zip(group, values, strict=True):
                    rows.setdefault(view, [None] * len(batch))[i] = value
        return {view: values if self.ragged and view != "pooled" else np.stack(values) for view, values in rows.items()}

    def _encode(self, batch: Sequence[Any], views: Collection[str]) -> Features:
        """Encode samples in one pass of the model."""
        half = self.device.type == "cuda" and not self._exact
        autocast = torch.autocast(self.device.type, self.half, enabled=half)
        with torch.inference_mode(), autocast, unchanged(self.model) as replaced:
            pooled, tokens = self.forward(batch, "tokens" in views)
        self._changes = self._changes or bool(replaced)
        features: Features = {}
        if "pooled" in views:
            features["pooled"] = to_numpy(pooled)
        if "tokens" in views and tokens is not None:
            rows = to_numpy(tokens)
            features["tokens"] = (
                [row[: self.length(sample)] for row, sample in zip(rows, batch, strict=True)] if self.ragged else rows
            )
        return features

    def _groups(self, batch: Sequence[Any]) -> list[list[int]]:
        """Return the positions of the samples that may be encoded together."""
        match self.together:
            case "all":
                return [list(range(len(batch)))]
            case "equal lengths":
                lengths = [self.length(sample) for sample in batch]
                return [[i for i, n in enumerate(lengths) if n == length] for length in sorted(set(lengths))]
        return [[i] for i in range(len(batch))]

    def probe(self) -> "FrozenTower":
        """Set the width, views and token shape from a sample, and find which samples may be encoded together.

        Raises EncoderError for features that are not vectors of finite numbers.
        """
        name = type(self.model).__name__
        samples = [self.prepare(sample) for sample in self.probe_samples()]
        features = self.encode(samples[:1], self.views)
        first = features["pooled"]
        if first.ndim != 2:
            raise EncoderError(f"{name} gives features of shape {first.shape}; expected (B, D)")
        if not np.isfinite(first).all():
            raise EncoderError(f"{name} gives features that are not finite numbers")
        self.width, self.views = first.shape[1], tuple(features)
        self.token_shape = features["tokens"][0].shape if "tokens" in features else None
        self._find_together(samples)
        if self._changes:
            self._provenance["passes"] = "each by the model as loaded"
        return self

    def check_whole(self) -> None:
        """Encode a dozen different samples. Raises EncoderError if features are random, or the same for two of them."""
        samples = [self.prepare(sample) for sample in self.probe_samples()]
        pooled = [self._encode([sample], ("pooled",))["pooled"] for sample in samples]  # alone: no rounding of a batch
        self._check_repeats(pooled[0], self._encode(samples[:1], ("pooled",))["pooled"])
        if len({row.tobytes() for row in pooled}) < len(samples):
            name = type(self.model).__name__
            raise EncoderError(f"{name} gives the same features for different {self.modality}s; {self.why_same()}")

    def why_same(self) -> str:
        """Return why features of different samples may be the same."""
        return "are its files whole?"

    def probe_samples(self) -> Sequence[Any]:
        """Return a dozen different samples."""
        return pictures() if self.modality == "image" else WORDS

    def _find_together(self, samples: Sequence[Any]) -> None:
        """Find which samples may be encoded together, so that no feature depends on it."""
        self._narrow(samples[:2])

    def _narrow(self, mixed: Sequence[Any], equal: Sequence[Any] = ()) -> None:
        """Let fewer samples be encoded together, if that changes features.

        ``mixed`` are of several lengths, and tried first; ``equal`` are of one. Images have no length.
        """
        before, self._exact = self.together, True
        try:
            if self.by_length:  # Reformer's hashing is random, but short texts need none
                self._check_repeats(*(self._encode(mixed[-1:], ("pooled",))["pooled"] for _ in range(2)))
            if self.together == "all" and not self._are_the_same(mixed):
                self.together = "equal lengths" if self.by_length else "one"
            if self.together == "equal lengths" and not self._are_the_same(equal):
                self.together = "one"
        finally:
            self._exact = False
        if self.together != before:
            logger.warning("%s: a batch changes features; %s", type(self.model).__name__, TOGETHER[self.together])

    def _check_repeats(self, one: np.ndarray, other: np.ndarray) -> None:
        """Refuse a model that is random, such as one that hides patches: two features (1, D) of one sample differ."""
        if not np.allclose(one, other, rtol=0, atol=1e-3 * np.abs(one).max()):
            raise EncoderError(f"{type(self.model).__name__} gives different features each time for the same sample")

    def _are_the_same(self, samples: Sequence[Any]) -> bool:
        """Whether samples have the same features alone and in a batch, but for the order of sums."""
        exact = self.by_length and self.device.type == "cpu"
        views = [view for view in self.views if view != "ids"]
        batch = self._encode(samples, views)
        for i, sample in enumerate(samples):
            alone = self._encode([sample], views)
            for view in views:
                one, other = alone[view][0], batch[view][i]
                limit = (ROUNDING if exact else CONVOLUTION_ROUNDING) * np.abs(one).max()
                if one.shape != other.shape or np.abs(one - other).max() > limit:
                    return False
        return True


@contextmanager
def unchanged(model: nn.Module) -> Iterator[list[str]]:
    """Undo at the end what a forward pass changes of the model itself, so that each pass is the model's as loaded.

    BigBird replaces its attention for good at its first short text. The list has, at the end, the classes of the
    modules whose parts were replaced.
    """
    registries = ("_modules", "_buffers", "_parameters")
    states = [
        (module, {**vars(module), **{name: dict(vars(module)[name]) for name in registries}})
        for module in model.modules()
    ]
    replaced: list[str] = []
    try:
        yield replaced
    finally:
        for module, state in states:
            if vars(module)["_modules"] != state["_modules"]:
                replaced.append(type(module).__name__)
            vars(module).update(state)


def flatten_map(features: Tensor, channels_last: bool = False) -> Tensor:
    """Turn a feature map (B, D, H, W), or (B, H, W, D) with channels last, into tokens (B, H * W, D)."""
    return features.flatten(1, 2) if channels_last else features.flatten(2).transpose(1, 2)


def to_numpy(tensor: Tensor) -> np.ndarray:
    """Copy features to the CPU as float32."""
    return tensor.detach().float().cpu().numpy()


def weights_digest(module: nn.Module) -> str:
    """Hash a model's parameters and buffers, with names and shapes. The hash does not depend on the file."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(module.state_dict().items()):
        array = tensor.detach().cpu().contiguous()
        digest.update(f"{name}{tuple(array.shape)}{array.dtype}".encode())
        digest.update(array.flatten().view(torch.uint8).numpy().data if array.numel() else b"")
    return digest.hexdigest()


def fingerprint(value: object) -> str:
    """Hash a value made of dictionaries, lists, strings and numbers."""
    canonical = json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(canonical.encode(), digest_size=8).hexdigest()


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hash a transformers tokenizer: its rules if it has a tokenizer.json, else its files, tokens and arguments."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else slow_rules(tokenizer)
    return f"{type(tokenizer).__name__} {fingerprint(content)}{unusual_settings(tokenizer)}"


def library(module: ModuleType) -> str:
    """Return a library's name and its major.minor version."""
    return f"{module.__name__} {'.'.join(module.__version__.split('.')[:2])}"


def local_weights(spec: EncoderSpec) -> Path | None:
    """Return the .safetensors file that a spec names after ``@``, or None for a tag.

    Raises EncoderError for a file that is missing or not safetensors.
    """
    if not is_weights_file(spec.weights):
        return None
    path = Path(spec.weights).expanduser()
    if path.suffix != ".safetensors":
        raise EncoderError(f"{path} is not a .safetensors file; a pickle can run code: convert it with safetensors")
    if not path.is_file():
        raise EncoderError(f"cannot open {spec}: there is no file {path}")
    return path


def fetch(spec: EncoderSpec, repo: str, patterns: Sequence[str], revision: str | None = None) -> Path:
    """Download the matching files of a hub repository, or find them in the hub's cache; return their folder."""
    try:  # the listing comes first and is not retried: without a network it fails at once
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(patterns)))
    except Exception as error:
        offline = isinstance(error, LocalEntryNotFoundError)
        cause = "the hub is not reachable, and its cache does not have the files" if offline else brief(error)
        local = "hf:./folder" if spec.family == "hf" else f"{spec.family}:{spec.model}@./weights.safetensors"
        raise EncoderError(
            f"cannot get {spec}: tried {repo} on the Hugging Face hub ({cause}); "
            f"offline use `classic`, or weights on disk such as {local}"
        ) from error


@contextmanager
def opening(spec: EncoderSpec) -> Iterator[None]:
    """Turn any error of a library on a broken or unsupported model into an EncoderError of one line."""
    try:
        yield
    except BadSampleError as error:  # of the probe: then every sample is bad
        raise EncoderError(f"cannot open {spec}: it cannot prepare a plain sample: {error}") from error
    except CachefuseError:
        raise
    except UNCHECKED as error:
        why = f"a value in its configuration files does not fit the library ({type(error).__name__}: {brief(error)})"
        raise EncoderError(f"cannot open {spec}: {why}") from error
    except Exception as error:
        raise EncoderError(f"cannot open {spec}: {brief(error)}") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of a library in Rust, on a broken tokenizer.json
            raise
        raise EncoderError(f"cannot open {spec}: {brief(error)}") from error


def brief(error: BaseException) -> str:
    """Return an error's message on one line, at most 300 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:300] + " ..."
