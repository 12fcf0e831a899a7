"""Text models of the transformers library that take more than words as input: BERT and similar models."""

from typing import Any

import torch

from cachefuse.encoders.base import EncoderSpec, Origin
from cachefuse.errors import ConfigError, EncoderError
from cachefuse.files import JsonObject
from cachefuse.registry import Options

# model_type -> configuration and model classes; each model reads embeddings with positions and segments.
KINDS = {
    "bert": ("BertConfig", "BertModel"),
    "roberta": ("RobertaConfig", "RobertaModel"),
    "xlm-roberta": ("XLMRobertaConfig", "XLMRobertaModel"),
}


def open_config(options: Options, origin: Origin | None) -> JsonObject:
    """Add ``text_model``, by default the model of the cached ids, and its ``architecture`` from its files to options.

    Raises ConfigError if the model has another type or another tokenizer than the cached ids, EncoderError if it cannot
    be opened.
    """
    if options.get("architecture") or origin is None:
        return dict(options)
    # Imported late: listing the fusions must not import transformers.
    from transformers import AutoConfig

    from cachefuse.encoders.frozen import opening
    from cachefuse.encoders.hf import UNUSED, model_folder, quiet

    text = str(options.get("text_model") or origin.source)
    spec = EncoderSpec.parse(text)
    if spec.family != "hf":
        raise ConfigError(f"text_model must be a model of transformers, such as hf:bert-base-uncased. Got {text!r}")
    offline = {"trust_remote_code": False, "local_files_only": True}
    folder = model_folder(spec)
    with opening(spec), quiet():
        config = AutoConfig.from_pretrained(folder, **offline)
        if config.model_type not in KINDS:
            raise ConfigError(f"the text model must be one of {', '.join(KINDS)}. {text} is {config.model_type}")
    check_tokenizer(spec, origin)
    settings = {key: value for key, value in config.to_dict().items() if key not in UNUSED}
    return {**options, "text_model": str(spec.absolute()), "architecture": settings}


def check_tokenizer(spec: EncoderSpec, origin: Origin) -> None:
    """Raise ConfigError if a model's tokenizer is not the one of the cached ids."""
    from cachefuse.encoders.frozen import opening, tokenizer_fingerprint
    from cachefuse.encoders.hf import model_folder, open_tokenizer, quiet

    folder = model_folder(spec)
    with opening(spec), quiet():
        tokenizer = open_tokenizer(folder)
    if tokenizer_fingerprint(tokenizer) != origin.provenance.get("tokenizer"):
        raise ConfigError(
            f"{spec} makes other tokens than {origin.source}, which made the cached ids; cache its ids by "
            f"cachefuse extract --encoder {spec} --views ids, and train with --encoder {spec}"
        )


def build(architecture: Options, vocabulary: int) -> Any:
    """Build an untrained model. Raises ConfigError for an unknown architecture, or one with too few tokens."""
    import transformers

    kind = KINDS.get(str(architecture.get("model_type")))
    if kind is None:
        raise ConfigError(f"architecture must be one of {', '.join(KINDS)}. Got {architecture.get('model_type')!r}")
    config = getattr(transformers, kind[0])(**{k: v for k, v in architecture.items() if k != "model_type"})
    if vocabulary > config.vocab_size:
        raise ConfigError(f"the cached ids have {vocabulary} tokens, the text model only {config.vocab_size}")
    config._attn_implementation = "sdpa"
    model = getattr(transformers, kind[1])(config, add_pooling_layer=False)
    # Positions and segments are always given, so their defaults are not needed. The weights do not contain them: in a
    # model built before its weights are read, they would stay without values.
    del model.embeddings.position_ids, model.embeddings.token_type_ids
    return model


def load_weights(model: Any, text: str) -> None:
    """Load pretrained weights, which must be safetensors, into a model. Raises EncoderError if they don't fit."""
    from safetensors.torch import load_file

    from cachefuse.encoders.frozen import opening
    from cachefuse.encoders.hf import model_and_weights

    spec = EncoderSpec.parse(text)
    _, weights = model_and_weights(spec)
    with opening(spec):
        stored: dict[str, torch.Tensor] = {}
        for file in weights.files:
            stored |= load_file(file)
        state = model.state_dict()
        prefix = next((p for p in ("", f"{model.base_model_prefix}.") if p + next(iter(state)) in stored), "")
        missing = [name for name, x in state.items() if stored.get(prefix + name, x[..., None]).shape != x.shape]
        if missing:
            lacks = f"its weights lack {len(missing)} of the model's, such as {missing[0]}"
            raise EncoderError(f"cannot open {spec}: {lacks}")
        model.load_state_dict({name: stored[prefix + name].float() for name in state})
