"""Mid fusion, from "Where to fuse", section 2.2: each modality's tokens join a T5 encoder at a chosen layer.

Earlier layers process only the tokens that have joined: later fusion is cheaper. Within one modality, attention has
T5's bias by distance. Between two modalities a distance has no meaning: image tokens are neither before nor after text
tokens, and places in the joined sequence depend on the padding, so on the other rows of the batch. Between modalities
the bias is one learnt number for each head and ordered pair; it starts at 0.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import pairwise
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from cachefuse.encoders.base import EncoderSpec, Origin
from cachefuse.errors import ConfigError
from cachefuse.feature_spec import IDS, TOKENS, FeatureSpec, feature_name, modalities_of
from cachefuse.fusion.base import Fusion, HeadBuilder
from cachefuse.nn.answer_decoder import Answers, AnswerWriter, pieces_of, words_of
from cachefuse.nn.bert import check_tokenizer
from cachefuse.nn.losses import Loss
from cachefuse.nn.masking import masked_mean, zero_absent
from cachefuse.nn.named import NamedModules
from cachefuse.nn.pooling import MeanPool, PoolSpec, build_pools
from cachefuse.nn.t5 import T5, T5Decoder, T5Encoder, T5Settings, distances, mask_padding
from cachefuse.nn.t5_weights import load_t5, read_settings
from cachefuse.printable import listed
from cachefuse.registry import Options

TEXT = "text"
CLASSES = "classes"
FusionSpec = str | Mapping[Any, str | Sequence[str]]  # "0:text,6:image", or {0: ["text"], 6: ["image"]}


class MidFusion(Fusion):
    """tokens_m -> map to the width -> pooling -> T5 encoder, from layer l_m on -> mean or decoder -> head -> logits.

    ``fusion_spec`` gives the layer before which each modality joins; ``depth`` means after the last layer. By default
    text joins at 0 and all others at half the depth; without text, all join at 0. Modalities that it does not name are
    not read. Modalities join the same layer in alphabetical order. ``pool`` gives a modality's pooling and number of
    tokens. The head gets the mean of the encoder's output, or the output of a decoder with ``decoder_layers`` layers.

    With ``answers`` "text" there is no head, and the decoder writes the class names: see ``AnswerWriter``. Their
    ``answer_tokens`` come from the T5's tokenizer; without a T5 they are words. ``t5`` is the spec of a pretrained T5,
    whose sizes replace ``width``, ``depth`` and ``heads``. ``text_view`` is then "ids", of the T5's tokenizer; else it
    is "tokens", of a frozen encoder. ``architecture`` is read from the T5's files. The real tokens of a mask must be
    contiguous. Raises ConfigError for options that contradict each other or the available features.
    """

    name = "midfusion"
    mixed_precision = True
    no_weight_decay = ("between",)
    defaults: ClassVar = {"dropout": 0.2, "lr": 3e-4, "weight_decay": 1e-4, "epochs": 15, "batch_size": 64}

    @classmethod
    def views(cls, modality: str, options: Options) -> tuple[str, ...]:
        spec = options.get("fusion_spec")
        if spec and modality not in read_fusion_spec(spec):
            return ()
        return (_view(modality, options),)

    @classmethod
    def resolve_options(cls, options: Options, origins: Mapping[str, Origin], classes: Sequence[str]) -> Options:
        resolved = dict(options)
        spec = EncoderSpec.parse(options["t5"]) if options.get("t5") else None
        if spec and not options.get("architecture"):
            if TEXT in origins:
                check_tokenizer(spec, origins[TEXT])
            resolved |= {"t5": str(spec.absolute()), "architecture": asdict(read_settings(str(spec)))}
        if cls.is_generative(options) and not options.get("answer_tokens"):
            resolved["answer_tokens"] = pieces_of(classes, spec) if spec else words_of(classes)
        return resolved

    @classmethod
    def is_generative(cls, options: Options) -> bool:
        answers = options.get("answers") or CLASSES
        if answers not in (CLASSES, TEXT):
            raise ConfigError(f"answers must be {CLASSES} or {TEXT}. Got {answers!r} instead")
        return bool(answers == TEXT)

    def initialize(self) -> None:
        if self.t5:
            self.load_t5(load_t5(self.t5, self.settings.num_decoder_layers))

    def __init__(
        self,
        specs: Mapping[str, FeatureSpec],
        classes: int,
        head: HeadBuilder,
        *,
        fusion_spec: Annotated[FusionSpec, "the layer before which each modality joins: 0:text,6:image"] = "",
        pool: Annotated[PoolSpec, "how to pool a modality's tokens: image=mean:16"] = "",
        width: Annotated[int, "width of the tokens in the encoder"] = 256,
        depth: Annotated[int, "layers of the encoder"] = 4,
        heads: Annotated[int, "attention heads of each layer"] = 4,
        decoder_layers: Annotated[int, "layers of the decoder that reads the encoder's output; 0: take the mean"] = 0,
        answers: Annotated[str, "classes: a head scores them; text: the decoder writes them"] = CLASSES,
        dropout: Annotated[float, "dropout in the layers"] = 0.1,
        text_view: Annotated[str, "ids or tokens; default ids with t5, else tokens"] = "",
        t5: Annotated[str, "the spec of a pretrained T5, which also gives the sizes"] = "",
        architecture: Options | None = None,
        answer_tokens: Answers | None = None,
    ):
        if t5 and architecture is None:
            raise ConfigError(f"the sizes of {t5} are not known; train by train-head, which reads them from its files")
        pretrained = None if architecture is None else _pretrained(architecture, decoder_layers)
        settings = pretrained or T5Settings.from_scratch(width, depth, heads)
        joins = _joins(fusion_spec, modalities_of(specs.values()), settings.num_layers)
        super().__init__(specs, classes, head, {"fusion_spec": fusion_spec, "text_view": text_view, "t5": t5})
        self.t5 = t5
        self.settings = replace(settings, num_decoder_layers=decoder_layers, dropout_rate=dropout)
        self.joins = joins  # layer -> modalities, in the order of joining
        self.names = {m: feature_name(m, _view(m, {"text_view": text_view, "t5": t5})) for m in sum(joins.values(), ())}
        self.enter = NamedModules({m: self._entrance(self.specs[name]) for m, name in self.names.items()})
        entered = {m: replace(self.specs[name], width=settings.d_model) for m, name in self.names.items()}
        self.pool = build_pools(pool, entered)
        self.encoder: Any = T5Encoder(self.settings)
        # From one modality's tokens to another's, in the order of joining; the diagonal is not used. Modalities that
        # join after the last layer are in no attention.
        n = sum(len(group) for layer, group in joins.items() if layer < settings.num_layers)
        self.between = nn.Parameter(torch.zeros(n, n, settings.num_heads)) if n > 1 else None
        self.decoder: FirstStep | AnswerWriter | None = None
        self.head: nn.Module | None = None
        if self.is_generative({"answers": answers}):
            if not decoder_layers:
                raise ConfigError("answers=text needs a decoder; add decoder_layers=2 to --fusion-options")
            if len(answer_tokens or ()) != classes:
                raise ConfigError(f"answer_tokens must cover {classes} classes. Got {len(answer_tokens or ())} answers")
            self.decoder = AnswerWriter(self.settings, answer_tokens or ())
        else:
            self.decoder = FirstStep(self.settings) if decoder_layers else None
            self.head = head(settings.d_model, classes)

    def forward(self, features: dict[str, Tensor], present: dict[str, Tensor]) -> Tensor:
        x, mask = self.encode(features, present)
        x = masked_mean(x, mask) if self.decoder is None else self.decoder(x, mask)
        return x if self.head is None else self.head(x)

    def objective(self, features: dict[str, Tensor], present: dict[str, Tensor], targets: Tensor, loss: Loss) -> Tensor:
        if isinstance(self.decoder, AnswerWriter):
            return self.decoder.learn(*self.encode(features, present), targets)
        return super().objective(features, present, targets, loss)

    def encode(self, features: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the encoder's output (B, T, W) and the mask (B, T) of the real tokens, in the order of joining."""
        joined: list[tuple[Tensor, Tensor]] = []
        lengths: list[int] = []
        for start, end in pairwise((*self.joins, self.settings.num_layers)):
            for modality in self.joins[start]:
                tokens, real = self.tokens(modality, features, present)
                joined.append((self.encoder.dropout(tokens), real))
                lengths.append(tokens.shape[1])
            x, mask = (torch.cat(tensors, dim=1) for tensors in zip(*joined, strict=True))  # (B, T, W), (B, T)
            if start < end:
                bias = mask_padding(self.bias(lengths), mask)  # (B, H, T, T)
            for layer in self.encoder.layers[start:end]:
                x = layer(x, bias)
            joined = [(x, mask)]
        # A sample without tokens is 0, where norms have steep gradients: over the layers they would grow to infinity.
        return zero_absent(self.encoder.dropout(self.encoder.norm(x)), mask), mask

    def tokens(
        self, modality: str, features: Mapping[str, Tensor], present: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return the tokens (B, T, W) with which a modality joins, and their mask (B, T); masked tokens are 0."""
        name, enter = self.names[modality], self.enter[modality]
        x, mask = features[name], present[name]
        pool = dict(self.pool.items()).get(modality)
        if isinstance(pool, MeanPool) and isinstance(enter, nn.Linear):
            x, mask = pool(x, mask)  # a mean and a linear map commute: map the few pooled tokens
            pool = None
        x = enter(x.masked_fill(~mask, 0) if isinstance(enter, nn.Embedding) else zero_absent(x, mask))
        if pool is not None:
            x, mask = pool(x, mask)
        return zero_absent(x, mask), mask  # masked tokens hold the map's bias or the embedding of padding

    def bias(self, lengths: Sequence[int]) -> Tensor:
        """Return the attention bias (1, H, T, T), given the number of tokens of each modality that has joined."""
        device = self.encoder.norm.weight.device
        position = torch.cat([torch.arange(n, device=device) for n in lengths])  # (T,)
        within = self.encoder.bias(distances(position))
        if self.between is None or len(lengths) == 1:
            return within
        modality = torch.cat([torch.full((n,), i, device=device) for i, n in enumerate(lengths)])  # (T,)
        across = self.between[modality.unsqueeze(-1), modality].permute(2, 0, 1)  # (H, T, T)
        return torch.where(modality == modality.unsqueeze(-1), within, across)

    @torch.no_grad()
    def load_t5(self, t5: T5) -> None:
        """Copy the weights of a pretrained T5: encoder, token embedding, and the first layers of its decoder.

        Raises ConfigError if its settings are not those of the T5 that this fusion was built for.
        """
        n, dropout = self.settings.num_decoder_layers, self.settings.dropout_rate
        pretrained = replace(t5.settings, num_decoder_layers=n, dropout_rate=dropout)
        if pretrained != self.settings or n > t5.settings.num_decoder_layers:
            raise ConfigError(f"expected the weights of a T5 with {self.settings}. Got {t5.settings}")
        self.encoder.load_state_dict(t5.encoder.state_dict())
        for enter in self.enter.values():
            if isinstance(enter, nn.Embedding):
                enter.load_state_dict(t5.embedding.state_dict())
        if isinstance(self.decoder, AnswerWriter):
            self.decoder.load(t5)
        elif self.decoder is not None:
            self.decoder.start.copy_(t5.embedding.weight[self.settings.decoder_start_token_id])
            weights = t5.decoder.state_dict()
            self.decoder.steps.load_state_dict({name: weights[name] for name in self.decoder.steps.state_dict()})

    def _entrance(self, spec: FeatureSpec) -> nn.Module:
        vocabulary = self.settings.vocab_size
        if spec.view == IDS:
            if vocabulary and spec.vocabulary > vocabulary:
                raise ConfigError(f"{spec.name} have {spec.vocabulary} tokens, the pretrained T5 only {vocabulary}")
            return nn.Embedding(vocabulary or spec.vocabulary, self.settings.d_model)  # starts at N(0, 1), as T5's
        linear = nn.Linear(spec.width, self.settings.d_model)
        # Standardised features are mapped to the scale of T5's embedding.
        nn.init.normal_(linear.weight, std=spec.width**-0.5)
        nn.init.zeros_(linear.bias)
        return linear


class FirstStep(nn.Module):
    """The first step of a T5 decoder: it maps the encoder's output (B, T, W), with a mask (B, T), to one vector (B, W).

    The start token attends only to itself, always with weight 1. So its query, its key, the bias and the dropout of
    that weight are left out.
    """

    def __init__(self, settings: T5Settings):
        super().__init__()
        self.start = nn.Parameter(torch.randn(settings.d_model))
        self.steps: Any = T5Decoder(settings)
        del self.steps.bias
        for layer in self.steps.layers:
            del layer.attention.q, layer.attention.k

    def forward(self, memory: Tensor, mask: Tensor) -> Tensor:
        keys_values, padding = self.steps.prepare_memory(memory, mask)
        x = self.steps.dropout(self.start.expand(len(mask), 1, -1))  # (B, 1, W)
        for layer, layer_keys_values in zip(self.steps.layers, keys_values, strict=True):
            x = x + layer.dropout(layer.attention.o(layer.attention.v(layer.attention_norm(x))))
            x = layer.read(x, layer_keys_values, padding)
        return self.steps.dropout(self.steps.norm(x)).squeeze(1)


def read_fusion_spec(spec: FusionSpec) -> dict[str, int]:
    """Return the layer at which each modality joins. Raises ConfigError if ``spec`` has another form."""
    if isinstance(spec, str):
        pairs: list[tuple[Any, str]] = [pair.partition(":")[::2] for pair in spec.split(",")]
    else:
        pairs = [(layer, m) for layer, group in spec.items() for m in ([group] if isinstance(group, str) else group)]
    layers: dict[str, int] = {}
    for given_layer, modality in pairs:
        layer, modality = str(given_layer).strip(), modality.strip()
        if not layer.isdecimal() or not modality:
            raise ConfigError(f"fusion_spec must look like 0:text,6:image. Got {spec!r} instead")
        if modality in layers:
            raise ConfigError(f"fusion_spec names {modality} twice")
        layers[modality] = int(layer)
    return layers


def _view(modality: str, options: Options) -> str:
    """Return the view of a modality that is read. Raises ConfigError for an unknown view."""
    if modality != TEXT:
        return TOKENS
    view = options.get("text_view") or (IDS if options.get("t5") else TOKENS)
    if view not in (IDS, TOKENS):
        raise ConfigError(f"text_view must be {IDS} or {TOKENS}. Got {view!r} instead")
    return view


def _joins(spec: FusionSpec, available: Sequence[str], depth: int) -> dict[int, tuple[str, ...]]:
    """Return the modalities that join at each layer, in the order of layers."""
    later = depth // 2 if TEXT in available else 0
    layers = read_fusion_spec(spec) if spec else {m: 0 if m == TEXT else later for m in available}
    for modality, layer in layers.items():
        if modality not in available:
            raise ConfigError(f"fusion_spec names {modality!r}; the features have: {listed(available) or 'none'}")
        if layer > depth:
            raise ConfigError(f"{modality} cannot join at layer {layer}; layers are 0 to {depth}, the depth")
    if layers and 0 not in layers.values():
        raise ConfigError(f"a modality must join at layer 0, which has no tokens otherwise. Got {spec!r} instead")
    return {layer: tuple(sorted(m for m in layers if layers[m] == layer)) for layer in sorted(set(layers.values()))}


def _pretrained(t5: Options, decoder_layers: int) -> T5Settings:
    try:
        settings = T5Settings(**t5)
    except TypeError as error:
        raise ConfigError(f"t5 must be the settings of a T5: {error}") from error
    if decoder_layers > settings.num_decoder_layers:
        raise ConfigError(
            f"decoder_layers must be at most {settings.num_decoder_layers}, the T5's own. Got {decoder_layers} instead"
        )
    return settings
