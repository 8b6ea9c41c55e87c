"""Checks that a model has all requested modules and parameters.

PEFT ignores the names that it does not find, as long as it finds one name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fedlora_cli.errors import UsageError
from fedlora_cli.formats.peft.layers import OTHERS, Adapted, parameters_of
from fedlora_cli.formats.peft.names import target_of
from fedlora_cli.text import first_line, shortened

_MODULES, _PARAMETERS = "--target-modules", "--target-parameters"


@dataclass(frozen=True, eq=False)
class RequestedTargets:
    """The requested targets of a model, as in PEFT's config.

    `names` are the names of all modules of the unwrapped model, `plain` of its linear layers and
    embeddings, `parameters` of parameters that may contain several experts.
    """

    targets: Sequence[str] | str | None
    target_parameters: Sequence[str]
    model: Any
    names: tuple[str, ...]
    plain: tuple[str, ...]
    parameters: tuple[str, ...]

    def check_heads(self, modules_to_save: Sequence[str]) -> None:
        """Raise UsageError unless the model has every module to train in full."""
        for wanted in modules_to_save:
            if not any(name.endswith(wanted) for name in self.names):
                found = f"no module is named {wanted}"
                outermost = shortened([name for name in self.names if name and "." not in name], 5)
                raise UsageError("--modules-to-save", found, f"the outermost are {outermost}")

    def check_targets(self, config: Any, modules: Mapping[str, Adapted]) -> None:
        """Raise UsageError for a name that adapts nothing; `config` is rewritten by PEFT.

        PEFT removes the name of a module from the config if it turns it into a parameter.
        """
        left = config.target_modules if isinstance(config.target_modules, set | list) else ()
        for wanted in self._without_module():
            if any(_matches(wanted, name) for name in left):
                raise self._no_module(wanted)
        # The names of PEFT's "all-linear" need not exist in the model.
        rewritten = () if isinstance(self.targets, str) else config.target_parameters or ()
        adapted = parameters_of(modules)
        for flag, names in ((_PARAMETERS, self.target_parameters), (_MODULES, rewritten)):
            for wanted in names:
                if not any(_matches(name, wanted) for name in adapted):
                    cure = "leave it out; no parameter of this model contains several experts"
                    if self.parameters:
                        cure = f"name some of {shortened(_last(self.parameters), 12)}"
                    raise UsageError(flag, f"no parameter is named {wanted}", cure)

    def passed_over(self, modules: Mapping[str, Adapted]) -> tuple[str, ...]:
        """The requested linear layers that PEFT does not adapt.

        PEFT applies the names of experts to their parameters, and then to no layer of that name.
        """
        adapted = {target_of(module.layout.pair) for module in modules.values()}
        targets = self._listed() if parameters_of(modules) else ()
        requested = (name for name in self.plain if any(_matches(name, end) for end in targets))
        return tuple(name for name in requested if name not in adapted)

    def refused(self, config: Any, error: Exception) -> UsageError:
        """The error if PEFT adapts nothing or fails."""
        matched = [] if isinstance(error, re.error) else list(self._matched(config))
        for name in matched:
            # PEFT adapts all plain layers; if it rejects one, the cause lies elsewhere.
            if name not in self.plain:
                found = f"{name} cannot be adapted ({first_line(error)})"
                return UsageError(_MODULES, found, OTHERS)
        for wanted in () if matched else self._without_module():
            return self._no_module(wanted)
        if self.targets is None:
            found = f"PEFT has no default for {type(self.model).__name__}"
            return UsageError(_MODULES, found, f"{self._known()}, or give all-linear")
        return UsageError(_MODULES, first_line(error), self._known())

    def _matched(self, config: Any) -> Iterator[str]:
        """The modules that match the config and are not wrapped by PEFT."""
        from peft.tuners.lora.layer import LoraLayer
        from peft.tuners.tuners_utils import check_target_module_exists

        for name in self.names if config.target_modules else ():
            layer = self.model.get_submodule(name)
            if check_target_module_exists(config, name) and not isinstance(layer, LoraLayer):
                yield name

    def _without_module(self) -> list[str]:
        return [
            end for end in self._listed() if not any(_matches(name, end) for name in self.names)
        ]

    def _listed(self) -> Sequence[str]:
        return () if self.targets is None or isinstance(self.targets, str) else self.targets

    def _no_module(self, wanted: str) -> UsageError:
        return UsageError(_MODULES, f"no module is named {wanted}", self._known())

    def _known(self) -> str:
        """A cure that lists the names of modules."""
        return f"name some of {shortened(_last(self.plain), 12)}"


def requested_targets(
    model: Any, targets: Sequence[str] | str | None, parameters: Sequence[str]
) -> RequestedTargets:
    """The requested targets of a model that PEFT has not wrapped yet."""
    modules = dict(model.named_modules())
    # Weights of convolutions may have three dimensions, too.
    deep = (name for name, parameter in model.named_parameters() if parameter.dim() == 3)
    stacked = tuple(name for name in deep if not name.endswith(".weight"))
    plain = tuple(name for name, module in modules.items() if _is_plain(module))
    return RequestedTargets(targets, parameters, model, tuple(modules), plain, stacked)


def _is_plain(module: Any) -> bool:
    """Whether it is a linear layer or an embedding, GPT-2's kind of linear layer included."""
    kinds = (torch.nn.Linear, torch.nn.Embedding)
    return isinstance(module, kinds) or type(module).__name__ == "Conv1D"


def _matches(name: str, wanted: str) -> bool:
    """Whether the name is `wanted`, or ends in it after a dot: PEFT's rule."""
    return f".{name}".endswith(f".{wanted}")


def _last(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(name.rpartition(".")[2] for name in names))
