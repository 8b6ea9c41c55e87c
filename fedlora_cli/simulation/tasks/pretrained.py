"""Models, tokenizers and configurations through transformers, without their code and pickles."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fedlora_cli.errors import FedloraError, InputError, UsageError
from fedlora_cli.formats.terms import owner_of
from fedlora_cli.libraries import muted
from fedlora_cli.simulation.options import Source
from fedlora_cli.text import first_line

_DTYPES = ("float32", "bfloat16", "float16")

#: Tokenizers without a limit have a huge one.
_UNBOUNDED = 10**9


def model_name(source: Source) -> str:
    """The folder or name of the base model. Raises UsageError if none is given."""
    if source.model is None:
        raise UsageError("--model", "not given", "give a folder, or a name on the hub")
    return source.model


def read_config(model: str, **changes: Any) -> Any:
    """The configuration of a model. Raises InputError."""
    from transformers import AutoConfig

    with loading(model, "configuration"):
        return AutoConfig.from_pretrained(model, trust_remote_code=False, **changes)


def read_tokenizer(model: str) -> Any:
    """The tokenizer of a model, with a token for padding. Raises InputError."""
    from transformers import AutoTokenizer

    with loading(model, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
        if tokenizer.pad_token_id is None:
            # Padding is masked, so that any token will do.
            tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        found = "its tokenizer has no token for padding or for the end of a text"
        raise InputError(model, found, "add one to it, and save it again")
    return tokenizer


def longest(tokenizer: Any, config: Any) -> int:
    """The largest number of tokens of the model."""
    positions: int | None = getattr(config, "max_position_embeddings", None)
    return min(int(tokenizer.model_max_length), positions or _UNBOUNDED)


def dtype_of(source: Source) -> torch.dtype:
    """The dtype to load the model in. Raises UsageError."""
    if source.dtype not in _DTYPES:
        raise UsageError("--dtype", f"unknown dtype {source.dtype}", f"use {', '.join(_DTYPES)}")
    dtype: torch.dtype = getattr(torch, source.dtype)
    return dtype


def load_model(source: Source, kind: str, saved: tuple[str, ...], **changes: Any) -> Any:
    """Load the model as the class `kind` of transformers, with `changes` in its configuration.

    transformers initializes layers that are missing in the files at random. Only layers in `saved`,
    which adapters replace, may be missing. Raises InputError and UsageError.
    """
    import transformers

    model = model_name(source)
    with loading(model, "model"), torch.random.fork_rng(devices=[]):
        loaded, info = getattr(transformers, kind).from_pretrained(
            model,
            dtype=dtype_of(source),
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **changes,
        )
    absent = {*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])}
    random = {name.rpartition(".")[0] for name in absent if owner_of(name, saved) is None}
    if random:
        first, more = min(random), f" and {len(random) - 1} more" if len(random) > 1 else ""
        found = f"its files have no {first}{more}, which would stay random"
        cure = "train it with --modules-to-save, or try a newer transformers"
        raise InputError(model, found, cure)
    return loaded


@contextmanager
def loading(model: str, what: str) -> Iterator[None]:
    """Raise any error of transformers in this block as an InputError, without its logs."""
    try:
        with muted():
            yield
    except FedloraError:
        raise
    except ImportError as error:
        found = f"its {what} needs a library ({first_line(error)})"
        raise InputError(model, found, "install this library") from error
    except Exception as error:  # each of its classes has its own errors
        found = f"its {what} cannot be read ({first_line(error)})"
        raise InputError(model, found, "name a model folder, or a model of the hub") from error
