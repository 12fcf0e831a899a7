"""Mid fusion, from "Where to fuse", section 2.2: each modality's tokens join a T5 encoder at a layer of their own.

Layers before that see only the tokens that have joined, which is what later fusion saves. Where two modalities meet,
T5's bias by distance has no meaning: an image's tokens are neither before nor after a text's, and places in the joined
sequence would depend on how much padding lies between, so on the other rows of a batch. Between tokens of one modality
the bias is T5's, by their own positions; between two it is learnt for each head and ordered pair, from 0 on.
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
from cachefuse.nn.t5 import T5, T5Decoder, T5Encoder, T5Settings, distances, shut_padding
from cachefuse.nn.t5_weights import load_t5, read_settings
from cachefuse.registry import Options

TEXT = "text"
CLASSES = "classes"
FusionSpec = str | Mapping[Any, str | Sequence[str]]  # "0:text,6:image", or {0: ["text"], 6: ["image"]}


class MidFusion(Fusion):
    """tokens_m -> map to the width -> pooling -> T5 encoder, from layer l_m on -> mean or decoder -> head -> logits.

    ``fusion_spec`` says which modalities join before which layer; at ``depth`` they join after the last. By default,
    text joins at 0 and all others halfway; where there is no text, all join at 0. One that it does not name is not
    read. At the same layer they join in alphabetical order. ``pool`` says how a modality is pooled, and to how many
    tokens. The head gets the mean of the encoder's output, or with ``decoder_layers`` what a decoder of so many makes
    of it; with ``answers`` "text" there is none, and the decoder writes the classes' names: see ``AnswerWriter``. Their
    ``answer_tokens`` are the T5's, or where there is none, words. ``t5`` is the spec of a pretrained T5, whose sizes
    stand for ``width``, ``depth`` and ``heads``; the ``text_view`` is then "ids", which must be of its tokenizer, and
    else "tokens", those of a frozen encoder. ``architecture`` is found in its files. A mask's real tokens must lie side
    by side. Raises ConfigError for options that contradict one another or what is at hand.
    """

    name = "midfusion"
    mixed_precision = True
    defaults: ClassVar = {"dropout": 0.2, "lr": 3e-4, "weight_decay": 1e-4, "epochs": 15, "batch_size": 64}

    @classmethod
    def views(cls, modality: str, options: Options) -> tuple[str, ...]:
        spec = options.get("fusion_spec")
        if spec and modality not in read_fusion_spec(spec):
            return ()
        return (_view(modality, options),)

    @classmethod
    def resolve_options(cls, options: Options, origins: Mapping[str, Origin], classes: Sequence[str]) -> Options:
        found = dict(options)
        spec = EncoderSpec.parse(options["t5"]) if options.get("t5") else None
        if spec and not options.get("architecture"):
            if TEXT in origins:
                check_tokenizer(spec, origins[TEXT])
            found |= {"t5": str(spec.absolute()), "architecture": asdict(read_settings(str(spec)))}
        if cls.is_generative(options) and not options.get("answer_tokens"):
            found["answer_tokens"] = pieces_of(classes, spec) if spec else words_of(classes)
        return found

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
        fusion_spec: Annotated[FusionSpec, "the layer that each modality joins before: 0:text,6:image"] = "",
        pool: Annotated[PoolSpec, "how a modality's tokens are pooled: image=mean:16"] = "",
        width: Annotated[int, "of the tokens in the encoder"] = 256,
        depth: Annotated[int, "layers of the encoder"] = 4,
        heads: Annotated[int, "of each layer's attention"] = 4,
        decoder_layers: Annotated[int, "layers of a decoder that reads the encoder's output; 0: its mean"] = 0,
        answers: Annotated[str, "classes, which a head scores, or text, which the decoder writes"] = CLASSES,
        dropout: Annotated[float, "in the layers"] = 0.1,
        text_view: Annotated[str, "ids or tokens; ids where t5 is given"] = "",
        t5: Annotated[str, "the spec of a pretrained T5, whose sizes it then has"] = "",
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
        # From one modality's tokens to another's, by their order of joining; the diagonal is not used. Those that join
        # after the last layer take no part in any attention.
        n = sum(len(group) for layer, group in joins.items() if layer < settings.num_layers)
        self.between = nn.Parameter(torch.zeros(n, n, settings.num_heads)) if n > 1 else None
        self.decoder: FirstStep | AnswerWriter | None = None
        self.head: nn.Module | None = None
        if self.is_generative({"answers": answers}):
            if not decoder_layers:
                raise ConfigError("answers=text are written by a decoder; add decoder_layers=2 to --fusion-options")
            if len(answer_tokens or ()) != classes:
                raise ConfigError(f"answer_tokens must be those of {classes} classes. Got {len(answer_tokens or ())}")
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
        parts: list[tuple[Tensor, Tensor]] = []
        lengths: list[int] = []
        for start, end in pairwise((*self.joins, self.settings.num_layers)):
            for modality in self.joins[start]:
                tokens, real = self.tokens(modality, features, present)
                parts.append((self.encoder.dropout(tokens), real))
                lengths.append(tokens.shape[1])
            x, mask = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))  # (B, T, W), (B, T)
            if start < end:
                bias = shut_padding(self.bias(lengths), mask)  # (B, H, T, T)
            for layer in self.encoder.layers[start:end]:
                x = layer(x, bias)
            parts = [(x, mask)]
        # Norms have steep gradients at 0, where a sample without tokens is: layer by layer they would grow to infinity.
        return zero_absent(self.encoder.dropout(self.encoder.norm(x)), mask), mask

    def tokens(
        self, modality: str, features: Mapping[str, Tensor], present: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return the tokens (B, T, W) with which a modality joins, 0 where its mask (B, T) says that they are none."""
        name, enter = self.names[modality], self.enter[modality]
        x, mask = features[name], present[name]
        pool = dict(self.pool.items()).get(modality)
        if isinstance(pool, MeanPool) and isinstance(enter, nn.Linear):
            x, mask = pool(x, mask)  # a mean and a linear map may change places, and then few tokens are mapped
            pool = None
        x = enter(x.masked_fill(~mask, 0) if isinstance(enter, nn.Embedding) else zero_absent(x, mask))
        if pool is not None:
            x, mask = pool(x, mask)
        return zero_absent(x, mask), mask  # a map's bias, and the embedding of no token, are nothing that is there

    def bias(self, lengths: Sequence[int]) -> Tensor:
        """Return the bias (1, H, T, T) among so many tokens of each modality that has joined."""
        device = self.encoder.norm.weight.device
        position = torch.cat([torch.arange(n, device=device) for n in lengths])  # (T,)
        within = self.encoder.bias(distances(position))
        if self.between is None or len(lengths) == 1:
            return within
        of = torch.cat([torch.full((n,), i, device=device) for i, n in enumerate(lengths)])  # (T,)
        across = self.between[of.unsqueeze(-1), of].permute(2, 0, 1)  # (H, T, T)
        return torch.where(of == of.unsqueeze(-1), within, across)

    @torch.no_grad()
    def load_t5(self, t5: T5) -> None:
        """Take the weights of a pretrained T5: encoder, token embedding, and the first layers of its decoder.

        Raises ConfigError if it is not the one that this fusion was made for, by ``t5``.
        """
        n, dropout = self.settings.num_decoder_layers, self.settings.dropout_rate
        theirs = replace(t5.settings, num_decoder_layers=n, dropout_rate=dropout)
        if theirs != self.settings or n > t5.settings.num_decoder_layers:
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
        known = self.settings.vocab_size
        if spec.view == IDS:
            if known and spec.vocabulary > known:
                raise ConfigError(f"{spec.name} are of {spec.vocabulary} tokens, and the pretrained T5 knows {known}")
            return nn.Embedding(known or spec.vocabulary, self.settings.d_model)  # starts at N(0, 1), as T5's
        linear = nn.Linear(spec.width, self.settings.d_model)
        # Standardised features come out at the scale of T5's embedding.
        nn.init.normal_(linear.weight, std=spec.width**-0.5)
        nn.init.zeros_(linear.bias)
        return linear


class FirstStep(nn.Module):
    """A T5 decoder's first step: it reads the encoder's output (B, T, W), with a mask (B, T), into one vector (B, W).

    The start token attends to itself alone, with a weight of 1 whatever its query, its key and the bias are: those are
    left out, and so is the dropout of that weight.
    """

    def __init__(self, settings: T5Settings):
        super().__init__()
        self.start = nn.Parameter(torch.randn(settings.d_model))
        self.steps: Any = T5Decoder(settings)
        del self.steps.bias
        for layer in self.steps.layers:
            del layer.attention.q, layer.attention.k

    def forward(self, memory: Tensor, mask: Tensor) -> Tensor:
        remembered, shut = self.steps.remember(memory, mask)
        x = self.steps.dropout(self.start.expand(len(mask), 1, -1))  # (B, 1, W)
        for layer, keys_values in zip(self.steps.layers, remembered, strict=True):
            x = x + layer.dropout(layer.attention.o(layer.attention.v(layer.attention_norm(x))))
            x = layer.read(x, keys_values, shut)
        return self.steps.dropout(self.steps.norm(x)).squeeze(1)


def read_fusion_spec(spec: FusionSpec) -> dict[str, int]:
    """Return the layer at which each modality joins. Raises ConfigError for text or a mapping of another form."""
    if isinstance(spec, str):
        pairs: list[tuple[Any, str]] = [part.partition(":")[::2] for part in spec.split(",")]
    else:
        pairs = [(at, m) for at, group in spec.items() for m in ([group] if isinstance(group, str) else group)]
    layers: dict[str, int] = {}
    for at, modality in pairs:
        layer, modality = str(at).strip(), modality.strip()
        if not layer.isdecimal() or not modality:
            raise ConfigError(f"fusion_spec must look like 0:text,6:image. Got {spec!r} instead")
        if modality in layers:
            raise ConfigError(f"fusion_spec names {modality} twice")
        layers[modality] = int(layer)
    return layers


def _view(modality: str, options: Options) -> str:
    """Return the view that is read of a modality. Raises ConfigError if there is none such."""
    if modality != TEXT:
        return TOKENS
    view = options.get("text_view") or (IDS if options.get("t5") else TOKENS)
    if view not in (IDS, TOKENS):
        raise ConfigError(f"text_view must be {IDS} or {TOKENS}. Got {view!r} instead")
    return view


def _joins(spec: FusionSpec, at_hand: Sequence[str], depth: int) -> dict[int, tuple[str, ...]]:
    """Return the modalities that join at each layer, in the order of layers."""
    later = depth // 2 if TEXT in at_hand else 0
    layers = read_fusion_spec(spec) if spec else {m: 0 if m == TEXT else later for m in at_hand}
    for modality, layer in layers.items():
        if modality not in at_hand:
            raise ConfigError(f"fusion_spec names {modality!r}, which is not among {', '.join(at_hand) or 'nothing'}")
        if layer > depth:
            raise ConfigError(f"{modality} can't join at layer {layer}: it may be at 0 to {depth}, the depth")
    if layers and 0 not in layers.values():
        raise ConfigError(f"some modality must join at layer 0, which has nothing to see else. Got {spec!r} instead")
    return {at: tuple(sorted(m for m in layers if layers[m] == at)) for at in sorted(set(layers.values()))}


def _pretrained(t5: Options, decoder_layers: int) -> T5Settings:
    try:
        settings = T5Settings(**t5)
    except TypeError as error:
        raise ConfigError(f"t5 must be the settings of a T5: {error}") from error
    if decoder_layers > settings.num_decoder_layers:
        raise ConfigError(
            f"decoder_layers must be at most {settings.num_decoder_layers}, as the T5 has. Got {decoder_layers} instead"
        )
    return settings
