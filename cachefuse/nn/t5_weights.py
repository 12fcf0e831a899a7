"""Load the weights of a T5 saved by transformers, from a local folder or the hub: safetensors only."""

from contextlib import ExitStack
from dataclasses import replace

import torch
from safetensors import safe_open

from cachefuse.encoders.base import EncoderSpec
from cachefuse.encoders.building import no_larger_than
from cachefuse.encoders.frozen import opening
from cachefuse.encoders.model_files import Weights, read_json
from cachefuse.errors import ConfigError, EncoderError
from cachefuse.nn.t5 import T5, T5Settings

EMBEDDINGS = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")  # names of one tensor


def read_settings(spec: str) -> T5Settings:
    """Return the settings of ``hf:name[@revision]`` or ``hf:./folder``. Raises EncoderError if it is no T5."""
    return _find(EncoderSpec.parse(spec))[1]


def load_t5(spec: str, decoder_layers: int | None = None) -> T5:
    """Open ``hf:name[@revision]`` or ``hf:./folder`` with the first ``decoder_layers`` of its decoder, by default all.

    Weights are in float32, and from safetensors only. Raises EncoderError if it is no T5 or has fewer layers, or if a
    weight is missing or has another shape than in config.json.
    """
    parsed = EncoderSpec.parse(spec)
    stored_in, settings = _find(parsed)
    n_layers = settings.num_decoder_layers if decoder_layers is None else decoder_layers
    if not 0 <= n_layers <= settings.num_decoder_layers:
        raise EncoderError(f"cannot take {n_layers} layers of {spec}'s decoder: it has {settings.num_decoder_layers}")
    with torch.device("meta"), no_larger_than(parsed, stored_in):  # shapes only: the values come from the files
        model = T5(replace(settings, num_decoder_layers=n_layers))
    with opening(parsed), ExitStack() as stack:
        stored: dict[str, safe_open] = {}
        for path in stored_in.files:
            file = stack.enter_context(safe_open(path, "pt"))
            stored |= dict.fromkeys(file.keys(), file)
        weights = model.state_dict()
        missing = [name for name in weights if not stored.keys() & set(_keys(name))]
        if missing:
            lacks = f"its weights lack {len(missing)} of the model's, such as {_keys(missing[0])[0]}"
            raise EncoderError(f"cannot open {spec}: {lacks}")
        integers = stored_in.integers
        for name, expected in weights.items():
            key = next(key for key in _keys(name) if key in stored)
            shape = tuple(stored[key].get_slice(key).get_shape())
            if shape != tuple(expected.shape):
                raise EncoderError(f"cannot open {spec}: {key} is {shape}; config.json needs {tuple(expected.shape)}")
            if key in integers:
                raise EncoderError(
                    f"cannot open {spec}: {key} is stored as integers ({integers[key]}); expected floats"
                )
            weights[name] = stored[key].get_tensor(key).to(torch.float32, copy=True)
    model.load_state_dict(weights, assign=True)
    return model


def _find(spec: EncoderSpec) -> tuple[Weights, T5Settings]:
    from cachefuse.encoders.hf import model_and_weights  # which imports transformers

    if spec.family != "hf":
        raise EncoderError(f"a T5 needs a spec such as hf:google/t5-v1_1-base or hf:./folder. Got {spec}")
    folder, weights = model_and_weights(spec)
    with opening(spec):
        config = read_json(spec, folder / "config.json")
        try:
            return weights, T5Settings.from_config(config)
        except ConfigError as error:
            raise EncoderError(f"cannot open {spec}: {error}") from error


def _keys(name: str) -> tuple[str, ...]:
    """Return the names that transformers may give to a parameter of ``T5``; the first one in the file is used."""
    match name.split("."):
        case ["embedding", _]:
            return EMBEDDINGS
        case ["lm_head", _]:
            return name, *EMBEDDINGS  # transformers 5 ties an output layer without weights of its own
        case [stack, "norm", leaf]:
            return (f"{stack}.final_layer_norm.{leaf}",)
        case [stack, "bias", "table", leaf]:
            return (f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.{leaf}",)
        case [stack, "layers", i, sublayer, *rest]:
            sublayers = {
                "attention": "0.SelfAttention",
                "cross_attention": "1.EncDecAttention",
                "feed_forward": f"{1 if stack == 'encoder' else 2}.DenseReluDense",
            }
            number, module = sublayers[sublayer.removesuffix("_norm")].split(".")
            module = "layer_norm" if sublayer.endswith("_norm") else module
            return (".".join([stack, "block", i, "layer", number, module, *rest]),)
    raise ValueError(name)
