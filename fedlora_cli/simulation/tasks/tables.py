"""Tables from files, folders and the hub, through the `datasets` library."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedlora_cli.errors import FedloraError, InputError, innermost
from fedlora_cli.libraries import muted
from fedlora_cli.simulation.options import Source
from fedlora_cli.text import first_line

#: The reader of the library for each file suffix.
_ENDINGS = {
    ".csv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
    ".txt": "text",
}

#: Readers of the library that neither run nor unpickle files.
_READERS = frozenset({*_ENDINGS.values(), "arrow", "imagefolder"})

#: Words in file names that mark a split, as in `datasets`; other files are for training.
_SPLITS = {
    "test": {"test", "testing", "eval", "evaluation"},
    "validation": {"validation", "valid", "dev", "val"},
}


def where(source: Source) -> str:
    """The name of the data in errors."""
    more = len(source.data) - 1
    return source.data[0] + (f" and {more} more" if more else "")


def title(source: Source) -> str:
    """The name of the data in the name of a task."""
    return Path(source.data[0]).stem


def read_tables(source: Source) -> tuple[Any, Any | None]:
    """The table for training, and the table for the test or None. Raises InputError.

    Both are `datasets.Dataset`, memory-mapped from the library's cache.
    """
    with reading(source):
        datasets = _library()
        builder = _builder(datasets, source)
        # The module of the builder is a reader of the library: datasets with code are refused.
        reader = type(builder).__module__.rpartition(".")[2]
        if reader not in _READERS:
            found = f"its files need the reader {reader}, which is not allowed"
            raise InputError(where(source), found, "save them as parquet, JSON lines or CSV")
        builder.download_and_prepare()
        splits = builder.as_dataset()
    name = source.test_split
    if name is None and "test" in splits and source.train_split != "test":
        name = "test"
    train = _split(source, splits, source.train_split)
    return train, None if name is None else _split(source, splits, name)


@contextmanager
def reading(source: Source) -> Iterator[None]:
    """Raise any error of the library in this block as an InputError, without its logs."""
    datasets = _library()
    verbosity, bars = datasets.logging.get_verbosity(), datasets.are_progress_bars_disabled()
    # Errors that it logs are raised as well.
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        with muted():
            yield
    except FedloraError:
        raise
    except Exception as error:  # each of its readers has its own errors
        found = f"cannot be read ({first_line(innermost(error))})"
        raise InputError(where(source), found, "check the data") from error
    finally:
        datasets.logging.set_verbosity(verbosity)
        if not bars:
            datasets.enable_progress_bars()


def _library() -> Any:
    try:
        import datasets
    except ImportError as error:
        found = f"the library datasets cannot be used ({first_line(innermost(error))})"
        raise InputError("simulate", found, "pip install 'fedlora[simulate]'") from error
    return datasets


def _builder(datasets: Any, source: Source) -> Any:
    """The builder of the library, which has not read the data yet."""
    paths = [Path(given) for given in source.data]
    if len(paths) == 1 and paths[0].is_dir():
        return datasets.load_dataset_builder(str(paths[0].resolve()), source.config)
    if len(paths) == 1 and not paths[0].exists():
        name = source.data[0]
        # A name without an owner may be a reader, which would read the current folder.
        if paths[0].suffix in _ENDINGS or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
            found = "no such file or folder"
            raise InputError(name, found, "check the path; on the hub it is owner/name")
        try:
            return datasets.load_dataset_builder(name, source.config)
        except (OSError, datasets.exceptions.DatasetsError) as error:
            reason = first_line(innermost(error))
            found = f"no such path, and the hub does not give it ({reason})"
            raise InputError(name, found, "check the name, and the network") from error
    kinds = {_ENDINGS.get(path.suffix.lower()) for path in paths}
    for path in paths:
        if not path.is_file():
            raise InputError(path, "no such file", "give a single folder, or files")
    (kind,) = kinds if len(kinds) == 1 else (None,)
    if kind is None:
        found = f"files of {'different kinds' if len(kinds) > 1 else 'an unknown kind'}"
        raise InputError(where(source), found, f"give files of one kind: {', '.join(_ENDINGS)}")
    # "NA" and "null" are ordinary texts, and may be names of classes.
    options = {"keep_default_na": False} if kind == "csv" else {}
    return datasets.load_dataset_builder(kind, data_files=_by_split(source, paths), **options)


def _by_split(source: Source, paths: Sequence[Path]) -> Mapping[str, list[str]]:
    """The files of each split. A single file is for training, whatever its name."""
    result: dict[str, list[str]] = {}
    for path in paths:
        words = set(re.split(r"[^a-z]+", path.stem.lower()))
        named = next((split for split, known in _SPLITS.items() if words & known), None)
        split = source.train_split if named is None or len(paths) == 1 else named
        result.setdefault(split, []).append(str(path.resolve()))
    return result


def _split(source: Source, splits: Mapping[str, Any], name: str) -> Any:
    if name not in splits:
        found = f"no split {name}"
        raise InputError(where(source), found, f"its splits are {', '.join(splits)}")
    return splits[name]
