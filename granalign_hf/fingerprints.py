"""What features depend on, as text and digests: weights, settings, preprocessing."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch

from .modeling.configuration_granalign import CALIBRATED_FIELDS

# Of a config: where it was saved and by what, what only training reads, and what only turns scores into probabilities.
WITHOUT_EFFECT = {
    *("_name_or_path", "architectures", "auto_map", "custom_pipelines", "dtype", "transformers_version"),
    *("margin", "patch_dropout", "reconstruction_weight", "kl_weight", "entropy_weight", "patch_budget", "budget_weight"),
    *CALIBRATED_FIELDS,
}


def add_weights(digest: Any, model: Any) -> None:
    """Names and values of a model's weights."""
    for name, weight in sorted(model.state_dict().items()):
        digest.update(name.encode())
        values = weight.contiguous().cpu()
        digest.update(values.reshape(-1).view(torch.uint8).numpy().tobytes())


def image_settings(processor: Any) -> str:
    """How pictures become pixels, as JSON."""
    settings = json.loads(processor.image_processor.to_json_string())
    settings.pop("auto_map", None)  # where its code lies, once it was saved
    return json.dumps(settings)


def text_settings(processor: Any) -> str:
    """How captions become tokens, as JSON."""
    tokenizer = json.loads(processor.tokenizer.backend_tokenizer.to_str())
    del tokenizer["truncation"], tokenizer["padding"]  # those of the last call
    return json.dumps([tokenizer, processor.tokenizer.model_max_length])


def fingerprint(model: Any, processor: Any) -> dict[str, str]:
    """A digest each of what the features of a model depend on; saved and loaded, on any device, they are the same."""
    weights = hashlib.sha256()
    add_weights(weights, model)
    settings = {
        "config": json.dumps(_with_effect(model.config.to_dict()), sort_keys=True, default=str),
        "image preprocessing": image_settings(processor),
        "tokenizer": text_settings(processor),
    }
    digests = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in settings.items()}
    return {"weights": weights.hexdigest(), **digests}


def _with_effect(config: dict[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in config.items() if name not in WITHOUT_EFFECT}
    return {name: _with_effect(value) if isinstance(value, dict) else value for name, value in kept.items()}
