"""What the configuration of the base model tells, where it is on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedlora_cli.errors import InputError
from fedlora_cli.files.documents import read_object

_CONFIG = "config.json"
_TIED = "tie_word_embeddings"

#: Where the configuration of a model of images and text has that of its language model.
_PARTS = ("text_config", "llm_config", "language_config")


def ties_embeddings(base: str | None) -> bool | None:
    """Whether the base model's head is its embeddings; None where nothing here tells.

    `base` is a folder, or a name on the hub that is in the cache. Nothing is downloaded, and no
    code of the model is run.
    """
    path = None if base is None else _config_of(base)
    try:
        fields = {} if path is None else read_object(path, finite=False)
    except InputError:  # it is named by clients, and nobody's fault here
        return None
    inner = [part for name in _PARTS if isinstance(part := fields.get(name), dict)]
    said = {one[_TIED] for one in (fields, *inner) if isinstance(one.get(_TIED), bool)}
    if said:
        return said.pop() if len(said) == 1 else None
    kinds = (one.get("model_type") for one in (*inner, fields))
    return next((_default(kind) for kind in kinds if isinstance(kind, str)), None)


def _config_of(base: str) -> Path | None:
    folder = Path(base)
    try:
        if (folder / _CONFIG).is_file():
            return folder / _CONFIG
        from huggingface_hub import try_to_load_from_cache

        found: Any = try_to_load_from_cache(base, _CONFIG)
    except (OSError, ValueError):  # no name of a file, or of a model
        return None
    return Path(found) if isinstance(found, str) else None


def _default(model_type: str) -> bool | None:
    """What the architecture does where its configuration does not say."""
    from transformers import CONFIG_MAPPING

    try:
        value: Any = getattr(CONFIG_MAPPING[model_type](), _TIED, None)
    except Exception:  # an architecture that this version does not have, or cannot make alone
        return None
    return value if isinstance(value, bool) else None
