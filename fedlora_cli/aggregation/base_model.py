"""Facts from the configuration of the base model, if it is on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedlora_cli.errors import InputError
from fedlora_cli.files.documents import read_object

_CONFIG = "config.json"
_TIED = "tie_word_embeddings"

#: The fields that hold the configuration of the language model in models of images and text.
_PARTS = ("text_config", "llm_config", "language_config")


def ties_embeddings(base: str | None) -> bool | None:
    """Whether the base model's head shares the weights of its embeddings; None if unknown.

    `base` is a folder, or a hub name whose configuration is in the cache. The function downloads
    nothing and runs no code of the model.
    """
    path = None if base is None else _config_of(base)
    try:
        fields = {} if path is None else read_object(path, finite=False)
    except InputError:  # a bad configuration of the base model is no fault of an adapter
        return None
    inner = [part for name in _PARTS if isinstance(part := fields.get(name), dict)]
    values = {part[_TIED] for part in (fields, *inner) if isinstance(part.get(_TIED), bool)}
    if values:
        return values.pop() if len(values) == 1 else None
    kinds = (part.get("model_type") for part in (*inner, fields))
    return next((_default(kind) for kind in kinds if isinstance(kind, str)), None)


def _config_of(base: str) -> Path | None:
    folder = Path(base)
    try:
        if (folder / _CONFIG).is_file():
            return folder / _CONFIG
        from huggingface_hub import try_to_load_from_cache

        cached: Any = try_to_load_from_cache(base, _CONFIG)
    except (OSError, ValueError):  # not a valid name of a file or model
        return None
    return Path(cached) if isinstance(cached, str) else None


def _default(model_type: str) -> bool | None:
    """The default of the architecture, for a configuration without the field."""
    from transformers import CONFIG_MAPPING

    try:
        value: Any = getattr(CONFIG_MAPPING[model_type](), _TIED, None)
    except Exception:  # unknown to this version of transformers, or not constructible by default
        return None
    return value if isinstance(value, bool) else None
