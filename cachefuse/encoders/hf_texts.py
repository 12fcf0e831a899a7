"""Text towers of transformers models."""

import inspect
from collections.abc import Collection, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from tokenizers.normalizers import Lowercase
from tokenizers.normalizers import Sequence as Normalizers
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from cachefuse.encoders.base import EncoderSpec, Features
from cachefuse.encoders.frozen import FrozenTower, to_numpy, unchanged
from cachefuse.encoders.hf_models import Outputs, Part
from cachefuse.encoders.pooling import POOLINGS
from cachefuse.encoders.probe import WORDS
from cachefuse.encoders.sentence_folder import SentenceFolder
from cachefuse.encoders.texts import Ids, Text, TextTower
from cachefuse.encoders.tokenizer_settings import unusual_padding
from cachefuse.errors import BadSampleError, EncoderError

MAX_TOKENS = 512  # for models without a limit of their own
NO_LIMIT = 1_000_000  # tokenizers without a limit have a huge number
# How a key calls poolings; others by sentence-transformers' names.
NAMES = {"cls": "first token", "lasttoken": "last token"}
ASKED = {"cls": "cls", "mean": "mean", "last": "lasttoken", "pooler": "pooler"}
PADDED = ("siglip",)  # model types whose texts are padded to the maximum length, as in their training, without a mask


class HFTextTower(TextTower):
    """Pooled: as ``poolings`` say, then the modules of a sentence-transformers folder. Tokens: last_hidden_state.

    Ids: the tokenizer's, cut to the limit.
    """

    views = ("pooled", "tokens", "ids")
    options = ("pooling", *TextTower.options)

    def __init__(
        self,
        spec: EncoderSpec,
        part: Part,
        tokenizer: PreTrainedTokenizerBase,
        asked: SentenceFolder,
        device: str,
        provenance: Mapping[str, str],
        poolings: Sequence[str],
    ):
        self.outputs, self.tokenizer, self.asked, self.poolings = part.outputs, tokenizer, asked, tuple(poolings)
        if asked.prompt and spec.option("long_texts") == "windows":
            raise EncoderError(
                f"cannot open {spec}: its folder writes a prompt before texts, which windows would cut off"
            )
        self.n_embeddings = n_embeddings(part)
        ids = (tokenizer.pad_token_id, getattr(part.config, "pad_token_id", None), 0)
        known = [i for i in ids if i is not None and i < (self.n_embeddings or i + 1)]
        self.pad_id = known[0]  # some tokenizers pad with a token that is unknown; where it is masked, any will do
        # Models often have a few rows more than the tokenizer has tokens, and some tokenizers skip numbers.
        self.vocabulary = max(len(tokenizer), getattr(part.config, "vocab_size", None) or 0)
        self.padded = part.config.model_type.startswith(PADDED)
        given = [name for name in tokenizer.model_input_names if name in part.accepts]
        self.takes_mask = "attention_mask" in (given if self.padded else part.accepts)
        if self.padded and not self.takes_mask and tokenizer.pad_token_id not in (None, self.pad_id):
            raise EncoderError(
                f"cannot open {spec}: its tokenizer pads with token {tokenizer.pad_token_id:,}, which its model "
                f"reads and does not know; put the tokenizer of the model there"
            )
        self.types = _token_types(tokenizer) if "token_type_ids" in given else None
        usual = _usual_padding(part, tokenizer)
        padding = unusual_padding(self.pad_id, usual, tokenizer.padding_side, self.takes_mask) if self.padded else ""
        untyped = self.types is None and "token_type_ids" in part.accepts and _has_types(tokenizer)
        self.n_excluded = 0 if asked.include_prompt else prompt_length(tokenizer, asked.prompt)
        self.min_tokens = 1
        asked.after.eval().requires_grad_(False).to(device)
        facts = {
            **provenance,
            "pooling": " + ".join(NAMES.get(name, name) for name in poolings),
            **asked.facts(),
            **({"padding": padding} if padding else {}),
            **({"token_types": "none"} if untyped else {}),
        }
        super().__init__(spec, part.model, device, facts, _limits(part, tokenizer, asked))

    def split(self, text: str) -> tuple[list[Ids], int]:
        # Always the same options: a fast tokenizer keeps them, and threads share it.
        encoded = self.tokenizer(
            self.asked.prompt + text,
            truncation=True,
            max_length=self.max_tokens,
            padding=False,
            return_overflowing_tokens=True,
        )
        if self.tokenizer.is_fast:
            windows = list(encoded["input_ids"])
            return windows, sum(map(len, windows)) - (len(windows) - 1) * self.n_special()
        rest, step = encoded.get("overflowing_tokens", []), self.max_tokens - self.n_special()
        chunks = [rest[start : start + step] for start in range(0, len(rest), step)]
        windows = [encoded["input_ids"], *map(self.tokenizer.build_inputs_with_special_tokens, chunks)]
        return windows, len(windows[0]) + len(rest)

    def n_special(self) -> int:
        return int(self.tokenizer.num_special_tokens_to_add())

    def prepare(self, sample: str) -> Text:
        text = super().prepare(sample)
        if self.n_embeddings is not None and any(max(window) >= self.n_embeddings for window in text.windows):
            raise BadSampleError("has a token that the model does not know")
        if text.n_tokens < self.min_tokens:
            kind = type(self.model).__name__
            raise BadSampleError(f"has {text.n_tokens} tokens; {kind} needs {self.min_tokens}")
        *before, end = text.windows
        if not before or len(end) >= self.min_tokens:
            return text
        return text._replace(windows=(*before, self._lengthen(before[-1], end)))

    def _lengthen(self, before: Ids, end: Ids) -> Ids:
        """Let a text's last window start in the window before it, where it is too short for the model."""
        special = self.tokenizer("")["input_ids"]
        n_first = next((i for i, token in enumerate(special) if before[i] != token), len(special))  # before the text
        n_last = self.n_special() - n_first
        content = before[n_first : len(before) - n_last]
        return [*end[:n_first], *content[len(end) - self.min_tokens :], *end[n_first:]]

    def encode(self, batch: Sequence[Text], views: Collection[str]) -> Features:
        computed = [view for view in views if view != "ids"]
        features = super().encode(batch, computed) if computed else {}
        if "pooled" in features and self.asked.after:  # after the mean of windows
            with torch.inference_mode():
                features["pooled"] = to_numpy(self.asked.after(torch.from_numpy(features["pooled"]).to(self.device)))
        if "ids" in views:
            features["ids"] = [np.array(text.windows[0], np.int32) for text in batch]
        return features

    def forward(self, batch: Sequence[Text], tokens: bool) -> tuple[Tensor, Tensor | None]:
        ids, real = self._pad(batch)
        inputs = {"input_ids": ids.to(self.device)}
        if self.takes_mask:
            inputs["attention_mask"] = real.long().to(self.device)
        if self.types is not None:
            types = sum((ids == token) * kind for token, kind in self.types.items()) + torch.zeros_like(ids)
            inputs["token_type_ids"] = types.to(self.device)
        out = self.outputs(**inputs)
        if out.hidden.shape[:2] != ids.shape:
            kind = type(self.model).__name__
            raise EncoderError(f"{kind} gives {out.hidden.shape[1]} vectors for {ids.shape[1]} tokens, not one each")
        hidden, real = self._start(out.hidden, real.to(self.device))
        pooled = torch.cat([self._pool(name, out, hidden, real) for name in self.poolings], -1)  # (B, D)
        return pooled, hidden

    def why_same(self) -> str:
        if self.poolings != ("cls",):
            return super().why_same()
        return "the first token of a causal text model sees no other token: pool by last or mean"

    def probe_samples(self) -> list[str]:
        samples = super().probe_samples()
        if not self.n_excluded:
            return samples
        # The first word may merge with the end of an excluded prompt, so that no token would count.
        return [f"{one} {other}" for one, other in zip(samples, samples[1:] + samples[:1], strict=True)]

    def probe(self) -> FrozenTower:
        """Also find the fewest tokens that the model takes: CANINE needs 4."""
        ids = self.prepare(" ".join(WORDS)).windows[0]
        for n in range(1, len(ids)):
            try:
                self._encode([Text((ids[:n],), n)], ("pooled",))
            except (RuntimeError, ValueError, IndexError):
                continue
            self.min_tokens = n
            break
        return super().probe()

    def _pad(self, batch: Sequence[Text]) -> tuple[Tensor, Tensor]:
        """Return ids (B, T), padded at the end, or as the tokenizer pads to the maximum length; and which are real."""
        left = self._left()
        rows = [torch.tensor(text.windows[0][::-1] if left else text.windows[0]) for text in batch]
        whole = torch.zeros(self.max_tokens if self.padded else 0, dtype=torch.long)
        ids = pad_sequence([*rows, whole], batch_first=True, padding_value=self.pad_id)[:-1]  # (B, T)
        real = torch.arange(ids.shape[1]) < torch.tensor([[len(row)] for row in rows])
        return (ids.flip(1), real.flip(1)) if left else (ids, real)

    def _start(self, hidden: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """Move the real tokens to the start, if padding stands there."""
        if not self._left():
            return hidden, real
        order = torch.argsort(real.int(), dim=1, descending=True, stable=True)
        return torch.take_along_dim(hidden, order.unsqueeze(-1), 1), real.gather(1, order)

    def _left(self) -> bool:
        return self.padded and self.tokenizer.padding_side == "left"

    def _pool(self, name: str, out: Outputs, hidden: Tensor, real: Tensor) -> Tensor:
        match name:
            case "shared space" if out.shared is not None:
                return out.shared
            case "pooler" if out.pooler is not None:
                return out.pooler
        counted = real.clone()
        counted[:, : self.n_excluded] = False
        return POOLINGS[name](hidden, counted)


def choose_poolings(
    spec: EncoderSpec, part: Part, tokenizer: PreTrainedTokenizerBase, asked: SentenceFolder
) -> tuple[str, ...]:
    """Return what pooled is: what the spec asks for, else the folder's modules, else the model's own, else the mean.

    The model's own is a vector of the space that it shares with images, or its pooled output, such as CLIP's end
    token. BERT's is not taken unless it is asked for: it was trained to say whether a sentence follows, or not at all.
    Raises EncoderError for a pooling that the model does not have, or that does not fit the folder's modules.
    """
    part.model.eval()
    ids = [tokenizer(word)["input_ids"] for word in WORDS]
    with torch.inference_mode(), unchanged(part.model):
        out = part.outputs(input_ids=torch.tensor([max(ids, key=len)]))
    known = {"mean", "last"}
    if len({row[0] for row in ids}) == 1:  # texts start with a class token
        known.add("cls")
    if out.pooler is not None and part.has_pooler:
        known.add("pooler")
    option = spec.option("pooling")
    if option is not None and option not in known:
        raise EncoderError(f"cannot open {spec}: it has no {option} to pool by; it has {', '.join(sorted(known))}")
    own = "pooler" in known and not hasattr(part.model, "pooler")  # as BERT's is; CLIP's and SigLIP's are inside
    names: tuple[str, ...] = ("shared space",) if out.shared is not None else ("pooler",) if own else ("mean",)
    names = (ASKED[option],) if option is not None else asked.poolings or names
    vectors = {"shared space": out.shared, "pooler": out.pooler}
    width = 0
    for name in names:
        vector = vectors.get(name)
        width += (out.hidden if vector is None else vector).shape[-1]
    if asked.takes() not in (None, width):
        asks = f"the folder's modules after it take {asked.takes()}"
        raise EncoderError(f"cannot open {spec}: its pooling {' + '.join(names)} gives {width} features; {asks}")
    return names


def n_embeddings(part: Part) -> int | None:
    """Return the number of tokens that a model knows; None for models that hash their tokens, which know any."""
    try:
        embedding = cast(Any, part.model).get_input_embeddings()
    except (AttributeError, NotImplementedError):  # the library does not say, as of one side of a dual encoder
        embedding = None
    return embedding.num_embeddings if isinstance(embedding, nn.Embedding) else getattr(part.config, "vocab_size", None)


def prompt_length(tokenizer: PreTrainedTokenizerBase, prompt: str) -> int:
    """Return the number of a prompt's tokens, without the special token at its end (sentence-transformers' rule)."""
    ids = tokenizer(prompt)["input_ids"] if prompt else []
    return len(ids) - bool(ids and ids[-1] in tokenizer.all_special_ids)


def lower_case(tokenizer: PreTrainedTokenizerBase) -> None:
    """Let a tokenizer write every text in lower case first."""
    backend = tokenizer.backend_tokenizer
    if "Lowercase" not in repr(backend.normalizer) and not getattr(backend.normalizer, "lowercase", False):
        backend.normalizer = Normalizers([step for step in (Lowercase(), backend.normalizer) if step is not None])


def _token_types(tokenizer: PreTrainedTokenizerBase) -> dict[int, int]:
    """Return the types that are not 0, by token: of XLNet's and Funnel's class token.

    Raises EncoderError for a tokenizer whose types depend on more than the token.
    """
    rows = [tokenizer(word) for word in WORDS]
    pairs = {(i, kind) for row in rows for i, kind in zip(row["input_ids"], row["token_type_ids"], strict=True)}
    if len({i for i, _ in pairs}) != len(pairs):
        raise EncoderError(f"{type(tokenizer).__name__} gives token types that depend on more than the token")
    return {i: kind for i, kind in pairs if kind}


def _has_types(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer has types other than 0, which its settings may leave out."""
    return any(any(tokenizer(word, return_token_type_ids=True)["token_type_ids"]) for word in WORDS)


def _usual_padding(part: Part, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the padding token that a tokenizer's class has by default, else the one in the model's configuration."""
    parameter = inspect.signature(type(tokenizer).__init__).parameters.get("pad_token")
    token = None if parameter is None else parameter.default
    if isinstance(token, str):
        return cast(int, tokenizer.convert_tokens_to_ids(token))
    return getattr(part.config, "pad_token_id", None)


def _limits(part: Part, tokenizer: PreTrainedTokenizerBase, asked: SentenceFolder) -> tuple[int, int]:
    """Return the usual number of tokens, and the greatest.

    The greatest is that of the position table. The usual is what a sentence-transformers folder states, else the
    tokenizer's limit, but at most the greatest.
    """
    hard = [getattr(part.config, "max_position_embeddings", None)]
    for name, module in part.model.named_modules():
        # RoBERTa's positions start after the padding position: 514 rows hold 512 tokens.
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            hard.append(module.weight.shape[0] - module.padding_idx - 1)
    soft = [tokenizer.model_max_length if asked.max_length is None else asked.max_length]
    most, usual = ([int(n) for n in numbers if n is not None and 0 < n < NO_LIMIT] for numbers in (hard, soft))
    return min([*most, *usual], default=MAX_TOKENS), min(most, default=NO_LIMIT)
