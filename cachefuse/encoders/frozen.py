"""The common code of torch encoders: get weights, freeze a model, encode."""

import hashlib
import json
from abc import abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from PIL import Image
from torch import Tensor, nn

from cachefuse.encoders.base import EncoderSpec, Features, Tower, is_weights_file
from cachefuse.errors import CachefuseError, EncoderError


class FrozenTower(Tower):
    """A tower over a frozen torch model: mixed precision on CUDA, float32 on the CPU."""

    def __init__(self, modality: str, model: nn.Module, device: str, provenance: Mapping[str, str]):
        self.modality = modality
        self.model: Any = model.eval().requires_grad_(False).to(device)
        self.device = torch.device(device)
        self.half = torch.float16  # 3 more mantissa bits than bfloat16, which models that overflow need
        self._provenance = dict(provenance)

    @property
    def provenance(self) -> Mapping[str, str]:
        return self._provenance

    @abstractmethod
    def forward(self, batch: Sequence[Any], tokens: bool) -> tuple[Tensor, Tensor | None]:
        """Return pooled (B, D) and tokens (B, T, D), padded to the longest if ragged, or None without tokens."""

    def encode(self, batch: Sequence[Any], views: Collection[str]) -> Features:
        cuda = self.device.type == "cuda"
        with torch.inference_mode(), torch.autocast(self.device.type, self.half, enabled=cuda):
            pooled, tokens = self.forward(batch, "tokens" in views)
        features: Features = {}
        if "pooled" in views:
            features["pooled"] = to_numpy(pooled)
        if "tokens" in views and tokens is not None:
            rows = to_numpy(tokens)
            features["tokens"] = (
                [row[: self.length(sample)] for row, sample in zip(rows, batch, strict=True)] if self.ragged else rows
            )
        return features

    def probe(self) -> "FrozenTower":
        """Set the width, views and token shape from one sample. Raises EncoderError if the features are random."""
        sample = self.prepare(Image.linear_gradient("L").convert("RGB") if self.modality == "image" else "a sample")
        features = self.encode([sample], self.views)
        first, again = features["pooled"], self.encode([sample], ("pooled",))["pooled"]
        if first.ndim != 2:
            raise EncoderError(f"{type(self.model).__name__} gives features of shape {first.shape}; expected (B, D)")
        if not np.allclose(first, again, rtol=0, atol=1e-3 * np.abs(first).max()):
            raise EncoderError(f"{type(self.model).__name__} gives different features each time for the same sample")
        self.width, self.views = first.shape[1], tuple(features)
        self.token_shape = features["tokens"][0].shape if "tokens" in features else None
        return self


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
    """Hash a transformers tokenizer: its rules if it has a tokenizer.json, else its vocabulary."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    return f"{type(tokenizer).__name__} {fingerprint(content)}"


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
    except CachefuseError:
        raise
    except Exception as error:
        raise EncoderError(f"cannot open {spec}: {brief(error)}") from error


def brief(error: Exception) -> str:
    """Return an error's message on one line, at most 300 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:300] + " ..."
