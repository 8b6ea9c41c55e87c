"""Whether a model has all the modules and parameters that a person asked to train.

PEFT passes over names that it does not find, as long as it finds one of them.
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
class Request:
    """The targets that a person named for a model, as PEFT takes them.

    `names` are those of all modules before PEFT wraps any, `plain` those of linear layers and
    embeddings, `parameters` those of parameters that may hold several experts.
    """

    targets: Sequence[str] | str | None
    target_parameters: Sequence[str]
    model: Any
    names: tuple[str, ...]
    plain: tuple[str, ...]
    parameters: tuple[str, ...]

    def check_heads(self, modules_to_save: Sequence[str]) -> None:
        """Whether the model has every module that is to be trained in full. Raises UsageError."""
        for wanted in modules_to_save:
            if not any(name.endswith(wanted) for name in self.names):
                found = f"no module is named {wanted}"
                outermost = shortened([name for name in self.names if name and "." not in name], 5)
                raise UsageError("--modules-to-save", found, f"the outermost are {outermost}")

    def check_targets(self, config: Any, modules: Mapping[str, Adapted]) -> None:
        """Whether PEFT adapts something for every name, given the config that it has rewritten.

        A name that no module has is gone from the config where PEFT has made a parameter of it.
        Raises UsageError.
        """
        left = config.target_modules if isinstance(config.target_modules, set | list) else ()
        for wanted in self._without_module():
            if any(_fits(wanted, name) for name in left):
                raise self._no_module(wanted)
        # PEFT's "all-linear" is a guess at what the model may have.
        rewritten = () if isinstance(self.targets, str) else config.target_parameters or ()
        adapted = parameters_of(modules)
        for flag, names in ((_PARAMETERS, self.target_parameters), (_MODULES, rewritten)):
            for wanted in names:
                if not any(_fits(name, wanted) for name in adapted):
                    cure = "leave it out; no parameter of this model holds several experts"
                    if self.parameters:
                        cure = f"name some of {shortened(_last(self.parameters), 12)}"
                    raise UsageError(flag, f"no parameter is named {wanted}", cure)

    def passed_over(self, modules: Mapping[str, Adapted]) -> tuple[str, ...]:
        """The linear layers that are named and not adapted: PEFT gives the names of experts to the
        parameters that hold them, and then takes no layer by these names.
        """
        adapted = {target_of(one.layout.pair) for one in modules.values()}
        if self.targets is None or isinstance(self.targets, str) or not parameters_of(modules):
            return ()
        named = (name for name in self.plain if any(_fits(name, one) for one in self.targets))
        return tuple(name for name in named if name not in adapted)

    def refused(self, config: Any, error: Exception) -> UsageError:
        """What to tell where PEFT adapts nothing, or stopped in the middle."""
        matched = [] if isinstance(error, re.error) else list(self._matched(config))
        for name in matched:
            # PEFT adapts all plain layers; where it refuses them, the reason is another.
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
        """The modules that the config matches and PEFT has put no layer around."""
        from peft.tuners.lora.layer import LoraLayer
        from peft.tuners.tuners_utils import check_target_module_exists

        for name in self.names if config.target_modules else ():
            layer = self.model.get_submodule(name)
            if check_target_module_exists(config, name) and not isinstance(layer, LoraLayer):
                yield name

    def _without_module(self) -> list[str]:
        """The names that no module has."""
        if self.targets is None or isinstance(self.targets, str):
            return []
        return [one for one in self.targets if not any(_fits(name, one) for name in self.names)]

    def _no_module(self, wanted: str) -> UsageError:
        return UsageError(_MODULES, f"no module is named {wanted}", self._known())

    def _known(self) -> str:
        """The names of modules that can be given."""
        return f"name some of {shortened(_last(self.plain), 12)}"


def request(model: Any, targets: Sequence[str] | str | None, parameters: Sequence[str]) -> Request:
    """What is asked of this model, which PEFT has not wrapped yet."""
    modules = dict(model.named_modules())
    # The weights of some convolutions have three sides, too.
    stacked = (
        name
        for name, one in model.named_parameters()
        if one.dim() == 3 and not name.endswith(".weight")
    )
    plain = (name for name, module in modules.items() if _is_plain(module))
    return Request(targets, parameters, model, tuple(modules), tuple(plain), tuple(stacked))


def _is_plain(module: Any) -> bool:
    """Whether it is a linear layer or an embedding, GPT-2's kind of linear layer included."""
    kinds = (torch.nn.Linear, torch.nn.Embedding)
    return isinstance(module, kinds) or type(module).__name__ == "Conv1D"


def _fits(name: str, wanted: str) -> bool:
    """Whether the name is the one that is wanted, or ends in it after a dot, as PEFT matches."""
    return f".{name}".endswith(f".{wanted}")


def _last(names: Iterable[str]) -> list[str]:
    """The last part of each name, once."""
    return list(dict.fromkeys(name.rpartition(".")[2] for name in names))
