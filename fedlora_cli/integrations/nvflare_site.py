"""The sites of a federation in NVFlare: what they send, and what they load."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fedlora_cli.errors import InputError
from fedlora_cli.integrations.federation import at_terms
from fedlora_cli.rounds.in_memory import distribute_state_dict
from fedlora_cli.rounds.state_dict import StateDict

#: The key of an adapter's config in the metadata of a model, in both directions.
LORA = "lora"

#: The key that says whether the first rank indices of the adapter matter most.
ORDERED = "lora_ordered"

#: The key of a site's sample count in the metadata of its result.
NUM_EXAMPLES = "num_examples"


def lora_meta(model: Any, samples: float, weight_key: str = NUM_EXAMPLES) -> dict[str, Any]:
    """The metadata of a site's result: its sample count, and the config of its adapter.

    For `FLModel(meta=...)`, and for `model.__fl_meta__` of NVFlare's patch of the HF Trainer.
    """
    return {weight_key: samples, LORA: dict(StateDict.of(model).config)}


def load_adapter(model: Any, received: Any, adapter_name: str = "default") -> None:
    """Load the global adapter into a PEFT model, at the model's rank and scaling.

    Raises InputError for an adapter that does not fit.
    """
    from peft import set_peft_model_state_dict

    own = StateDict.of(model, adapter_name=adapter_name)
    tensors = received.params
    if LORA in received.meta:
        state = StateDict(tensors, received.meta[LORA])
        if (state.rank, state.scaling) != (own.rank, own.scaling):
            ordered = received.meta.get(ORDERED) is not False
            state = at_terms(state, own.rank, own.scaling, ordered=ordered)
        if shapes_of(state.tensors) != shapes_of(own.tensors):  # ranks by module
            state = distribute_state_dict(state, like={"site": own})["site"]
        tensors = state.tensors
    elif shapes_of(tensors) != shapes_of(own.tensors):
        tensors = untrained(tensors, own.rank)
    set_peft_model_state_dict(model, dict(tensors), adapter_name)


def shapes_of(tensors: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def untrained(tensors: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """The first `rank` rows of every A and columns of every B, if all B are zero.

    Without a config, the scaling is unknown, so only zero updates can be cut. Raises InputError.
    """
    if any(bool(tensor.any()) for name, tensor in tensors.items() if "lora_B" in name):
        found = "it is trained, and its alpha is unknown"
        raise InputError("the first global adapter", found, "start from `adapter`, with a config")
    rows = {name: tensor[:rank] for name, tensor in tensors.items() if "lora_A" in name}
    columns = {
        # NVFlare sends contiguous tensors only, and tries others for ever.
        name: tensor[:, :rank].contiguous()
        for name, tensor in tensors.items()
        if "lora_B" in name
    }
    return {**tensors, **rows, **columns}
