"""LiT with TIRG: a fine-tuned text transformer that also reads the tokens of a locked image encoder.

"Leveraging efficient training and feature fusion in transformers for multimodal classification", section 3. Locked
means that image features come from the cache. Of the texts, the cache holds token ids: the text transformer is trained.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cachefuse.encoders.base import Origin
from cachefuse.errors import ConfigError
from cachefuse.feature_spec import IDS, POOLED, TOKENS, FeatureSpec
from cachefuse.fusion.base import Fusion, HeadBuilder
from cachefuse.fusion.tirg import TIRG
from cachefuse.nn.bert import build, load_weights, open_config
from cachefuse.nn.masking import masked_mean, zero_absent
from cachefuse.registry import Options

IMAGE_PART, TIRG_PART = "image", "tirg"


class LiTFusion(Fusion):
    """[text embeddings; W image tokens + b] -> text transformer -> f; TIRG(image, f) -> head -> logits.

    ``text_model`` is the spec of a BERT-like encoder of transformers, by default the one of the cached ids. Its
    tokenizer must be that of the ids. Its tables embed positions, from 0 for texts and for images, and two segments
    that tell them apart. f is the mean of the text's tokens. TIRG gets the image's pooled feature, mapped to the same
    width. Without TIRG the head gets f alone. Without the image this is the fine-tuned text model. ``grid`` averages
    the square of image tokens to grid x grid; this without TIRG resembles MMBT (arXiv 1909.02950).
    """

    name = "lit"
    mixed_precision = True
    modalities = ("image", "text")
    parts = (TIRG_PART, IMAGE_PART)
    defaults: ClassVar = {"dropout": 0.1, "lr": 5e-5, "weight_decay": 0.0, "epochs": 30, "batch_size": 128}

    @classmethod
    def views(cls, modality: str, options: Options) -> tuple[str, ...]:
        ablate = options.get("ablate", ())
        image = () if IMAGE_PART in ablate else (TOKENS,) if TIRG_PART in ablate else (POOLED, TOKENS)
        return {"text": (IDS,), "image": image}.get(modality, ())

    @classmethod
    def resolve_options(cls, options: Options, origins: Mapping[str, Origin], classes: Sequence[str]) -> Options:
        return open_config(options, origins.get("text"))

    def __init__(
        self,
        specs: Mapping[str, FeatureSpec],
        classes: int,
        head: HeadBuilder,
        *,
        text_model: Annotated[str, "the text encoder's spec, if not the one of the cached ids"] = "",
        grid: Annotated[int, "average the image's tokens to grid x grid; 0: keep all"] = 0,
        architecture: Options | None = None,
        ablate: tuple[str, ...] = (),
    ):
        super().__init__(specs, classes, head, {"ablate": ablate})
        if architecture is None:
            raise ConfigError("fusion 'lit' tunes the text model of cached ids; train it by train-head")
        self.text_model = text_model
        self.text: Any = build(architecture, self.specs["text_ids"].vocabulary)
        width = self.text.config.hidden_size
        self.head = head(width, classes)
        self.side = self.grid = 0
        if IMAGE_PART not in ablate:
            self.side, self.grid = _square(self.specs["image_tokens"]), grid
            n_tokens = (grid or self.side) ** 2
            if grid > self.side or grid < 0:
                raise ConfigError(f"grid must be between 1 and {self.side}, the image's grid. Got {grid} instead")
            if n_tokens > self.text.config.max_position_embeddings:
                raise ConfigError(
                    f"the text model has {self.text.config.max_position_embeddings} positions, fewer than the image's "
                    f"{n_tokens} tokens; give a grid, such as grid=7"
                )
            self.embed = nn.Linear(self.specs["image_tokens"].width, width)
        self.tirg = None
        if not {TIRG_PART, IMAGE_PART} & set(ablate):
            self.project = nn.Linear(self.specs["image"].width, width)
            self.tirg = TIRG(width)

    def initialize(self) -> None:
        if self.text_model:
            load_weights(self.text, self.text_model)

    def forward(self, features: dict[str, Tensor], present: dict[str, Tensor]) -> Tensor:
        f = self.read(features, present)
        if self.tirg is None:
            return self.head(f)
        has_image = present["image"]
        g = zero_absent(self.project(zero_absent(features["image"], has_image)), has_image)
        return self.head(self.tirg(g, f))

    def read(self, features: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> Tensor:
        """Return the text transformer's output f (B, W); 0 in rows without a text."""
        words = present["text_ids"]  # (B, T)
        table = self.text.get_input_embeddings()
        x, mask, segments = table(features["text_ids"].masked_fill(~words, 0)), words, torch.zeros_like(words).long()
        position = self._positions(words.shape[1]).expand_as(words)
        if self.side:
            image, patches = self._image(features["image_tokens"], present["image_tokens"])  # (B, m, W), (B, m)
            x, mask = torch.cat([x, image], dim=1), torch.cat([mask, patches], dim=1)
            segment = min(1, self.text.config.type_vocab_size - 1)
            segments = torch.cat([segments, torch.full_like(patches, segment, dtype=torch.long)], dim=1)
            position = torch.cat([position, self._positions(patches.shape[1]).expand_as(patches)], dim=1)
        mask = mask.clone()
        mask[:, 0] |= ~mask.any(1)  # an empty row attends to one token: a softmax over nothing is NaN
        hidden = self.text(
            inputs_embeds=x, attention_mask=mask.long(), token_type_ids=segments, position_ids=position
        ).last_hidden_state  # (B, T + m, W)
        return zero_absent(masked_mean(hidden[:, : words.shape[1]], words), words.any(1))

    def _image(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        x = zero_absent(x, mask)
        if self.grid and self.grid < self.side:
            missing = self.side**2 - x.shape[1]  # all tokens but one, if no row has an image
            x, mask = F.pad(x, (0, 0, 0, missing)), F.pad(mask, (0, missing))
            maps = x.transpose(1, 2).unflatten(2, (self.side, self.side))  # (B, D, s, s)
            x = F.adaptive_avg_pool2d(maps, self.grid).flatten(2).transpose(1, 2)
            mask = mask.all(1, keepdim=True).expand(-1, self.grid**2)
        return self.embed(x), mask

    def _positions(self, n: int) -> Tensor:
        padding = getattr(self.text.embeddings, "padding_idx", None)  # RoBERTa's positions begin after this index
        return torch.arange(n, device=self.text.device) + (0 if padding is None else padding + 1)


def _square(spec: FeatureSpec) -> int:
    """Return the side of an image's grid of tokens. Raises ConfigError if the tokens are no square."""
    side = math.isqrt(spec.n_tokens)
    if side * side != spec.n_tokens:
        raise ConfigError(f"the image's {spec.n_tokens} tokens are no square grid; fusion 'lit' needs one")
    return side
