"""Commands as typer calls them, with dataclasses of options among their parameters."""

from __future__ import annotations

import functools
import gc
import inspect
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Annotated, Any, NoReturn, get_args, get_origin, get_type_hints

import typer

from fedlora_cli.cli.console import say
from fedlora_cli.errors import FedloraError, InputError, OutputError
from fedlora_cli.files.interrupts import INTERRUPTED, leaving_at_once, raising
from fedlora_cli.options import Option, Spec, options_of
from fedlora_cli.remote import Location, StorageError

#: The exit code of `diagnose` when a limit is exceeded.
FINDING = 1

#: The exit code of a command that a scheduler ends with SIGTERM: 128 + 15.
TERMINATED = 143


class Only:
    """Some fields of a dataclass (all if none is named), in no panel; `helps` replaces help texts.

    `options: Annotated[AggregateOptions, Only("rank", quorum="Add a row for this quorum.")]`
    """

    def __init__(self, *names: str, **helps: str) -> None:
        self.names, self.helps = names, helps


class Given:
    """The fields of several dataclasses, panel by panel: a dictionary of those that are given."""

    def __init__(self, *kinds: type) -> None:
        self.kinds = kinds


@dataclass(frozen=True)
class _Group:
    """The options that take the place of a parameter, and the value that is made of them."""

    specs: tuple[Spec, ...]
    make: Callable[..., Any]

    def take(self, values: dict[str, Any]) -> Any:
        """The value of the parameter. Raises UsageError."""
        chosen = {}
        for name, _, _, option in self.specs:
            value = values.pop(name)
            if value is not None and value != []:
                flag = option.flags[0]
                chosen[name] = value if option.parse is None else option.parse(flag, value)
        return self.make(**chosen)


def command(function: Callable[..., None], first: Sequence[str] = ()) -> Callable[..., None]:
    """The command with a parameter for each option, those in `first` before the others; foreseen
    failures are one line on standard error and an exit code.
    """
    groups: dict[str, _Group] = {}
    parameters = []
    hints = get_type_hints(function, include_extras=True)
    for parameter in inspect.signature(function).parameters.values():
        hint = hints[parameter.name]
        group = _group(hint)
        if group is None:
            parameters.append(parameter.replace(annotation=hint))
        else:
            groups[parameter.name] = group
            parameters += map(_parameter, group.specs)
    parameters.sort(key=lambda each: first.index(each.name) if each.name in first else len(first))

    @functools.wraps(function)
    def run(**values: Any) -> None:
        with _failing_in_one_line(debug=values["debug"]):
            made = {name: group.take(values) for name, group in groups.items()}
            function(**values, **made)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in parameters}
    return run


def _group(hint: Any) -> _Group | None:
    """The options of a parameter with this annotation, None for an ordinary parameter."""
    kind, *extras = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    for extra in extras:
        if isinstance(extra, Given):
            return _Group(_optional(extra.kinds), dict)
        if isinstance(extra, Only):
            return _Group(_only(kind, extra), kind)
    specs = options_of(kind) if hasattr(kind, "__dataclass_fields__") else ()
    return _Group(specs, kind) if specs else None


def _only(kind: type, only: Only) -> tuple[Spec, ...]:
    known = {spec.name: spec for spec in options_of(kind)}
    return tuple(
        known[name]._replace(
            option=replace(
                known[name].option, panel=None, help=only.helps.get(name, known[name].option.help)
            )
        )
        for name in only.names or known
    )


def _optional(kinds: tuple[type, ...]) -> tuple[Spec, ...]:
    """The options of these dataclasses without defaults, ordered by panel."""
    specs = [
        spec._replace(type=spec.type | None, default=None)
        for kind in kinds
        for spec in options_of(kind)
    ]
    panels = list(dict.fromkeys(spec.option.panel for spec in specs))
    return tuple(sorted(specs, key=lambda spec: panels.index(spec.option.panel)))


def _parameter(spec: Spec) -> inspect.Parameter:
    option, kind, default = spec.option, spec.type, spec.default
    if option.text is not None:
        kind, default = option.text | None, None
    elif kind == Location | None:
        kind = str | None
    return inspect.Parameter(
        spec.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[kind, _typer_option(option)],
    )


def _typer_option(option: Option) -> Any:
    return typer.Option(
        *option.flags,
        help=option.help + (option.note() if option.note else ""),
        show_default=option.show_default,
        metavar=option.metavar,
        rich_help_panel=option.panel,
        autocompletion=completing(option.words) if option.words else None,
    )


def completing(words: Callable[[], Iterable[str]]) -> Callable[[str], list[str]]:
    """A function for the completion of these words."""
    return lambda incomplete: [word for word in words() if word.startswith(incomplete)]


@contextmanager
def heavy_imports() -> Iterator[None]:
    """Import torch with the garbage collector off, then freeze its objects so that later
    collections skip them: 1.6 s instead of 2.3 s (torch 2.13, median of 3).
    """
    gc.disable()
    try:
        with leaving_at_once():
            yield
    finally:
        gc.freeze()
        gc.enable()


@contextmanager
def _failing_in_one_line(*, debug: bool) -> Iterator[None]:
    try:
        with raising():
            yield
    except FedloraError as error:
        fail(error, debug=debug)
    except StorageError as error:  # while the kind of a location is looked up
        fail(InputError(error.where, f"cannot be read ({error})", error.cure), debug=debug)
    except KeyboardInterrupt:
        _say_error("interrupted; nothing is half written")
        raise typer.Exit(INTERRUPTED) from None
    except SystemExit as stop:
        if stop.code == TERMINATED:
            _say_error("ended by SIGTERM; nothing is half written")
        raise


def unwritten(error: OSError) -> NoReturn:
    """End a command that did its work but could not print the result."""
    found = f"cannot be written ({(error.strerror or str(error)).lower()})"
    failure = OutputError("standard output", found, "free some space")
    _say_error(str(failure))
    sys.exit(failure.exit_code)


def fail(error: FedloraError, *, debug: bool) -> NoReturn:
    """End a command with an error, in one line."""
    if debug:
        traceback.print_exc()
    _say_error(str(error))
    raise typer.Exit(error.exit_code) from None


def _say_error(text: str) -> None:
    say("error", text, "bold red")
