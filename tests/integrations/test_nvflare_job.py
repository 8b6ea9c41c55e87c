"""NVFlare's jobs: their JSON, the allow-list of classes, the HF Trainer, and the simulator."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from fedlora_cli import StateDict, UsageError, diagnose

pytest.importorskip("nvflare")

from nvflare.apis.fl_exception import UnsafeComponentError
from nvflare.app_common.widgets import component_path_authorizer
from nvflare.fuel.utils.class_utils import instantiate_class

from fedlora_cli.integrations.nvflare import FedLoRARecipe

SAMPLES = Path(__file__).parents[2] / "samples" / "nvflare"
MODULE = "fedlora_cli.integrations.nvflare"


def exported(folder: Path, **arguments: Any) -> dict[str, Any]:
    """The server's config of a job, as NVFlare writes it."""
    script = folder / "client.py"
    script.write_text("")
    recipe = FedLoRARecipe(
        min_clients=2, train_script=str(script), adapter=folder / "first", **arguments
    )
    recipe.export(str(folder / "jobs"))
    assert not list((folder / "jobs").glob("**/custom/fedlora_cli"))  # no copies of the package
    [path] = (folder / "jobs").glob("**/config_fed_server.*")
    return json.loads(path.read_text())


def test_the_arguments_travel_as_json(tmp_path: Path) -> None:
    config = exported(
        tmp_path,
        method="flexlora",
        momentum=0.5,
        rounds=tmp_path / "rounds",
        ranks={"site-1": 4},
        weight_key="count",
        options={"clip_norm": "auto"},
    )
    [workflow] = config["workflows"]
    [persistor] = [each for each in config["components"] if each["id"] == "persistor"]
    [filters] = config["task_data_filters"]

    assert workflow["args"]["aggregator"] == {
        "path": f"{MODULE}.FedLoRAAggregator",
        "args": {
            "method": "flexlora",
            "momentum": 0.5,
            "rounds": str(tmp_path / "rounds"),
            "weight_key": "count",
            "options": {"clip_norm": "auto"},
        },
    }
    assert persistor["path"] == f"{MODULE}.FedLoRAPersistor"
    assert persistor["args"] == {"adapter": str(tmp_path / "first")}
    assert filters["tasks"] == ["train"]
    assert filters["filters"] == [
        {"path": f"{MODULE}.FedLoRARankFilter", "args": {"ranks": {"site-1": 4}}}
    ]
    for each in (workflow["args"]["aggregator"], persistor, *filters["filters"]):
        made = instantiate_class(each["path"], dict(each["args"]))
        assert {name: getattr(made, name) for name in each["args"]} == each["args"]


def test_tensors_travel_whole_and_as_tensors(tmp_path: Path) -> None:
    (tmp_path / "client.py").write_text("")
    recipe = FedLoRARecipe(
        min_clients=2, train_script=str(tmp_path / "client.py"), adapter="first", num_rounds=7
    )

    assert recipe.server_expected_format == "pytorch"
    assert recipe.params_transfer_type == "FULL"
    assert (recipe.min_clients, recipe.num_rounds) == (2, 7)


@pytest.mark.parametrize(
    "argument", ["aggregator", "params_transfer_type", "server_expected_format", "exclude_vars",
                 "aggregation_weights"]
)  # fmt: skip
def test_arguments_that_would_have_no_effect_are_refused(tmp_path: Path, argument: str) -> None:
    with pytest.raises(UsageError, match=f"{argument} is given"):
        FedLoRARecipe(
            min_clients=2, train_script="client.py", adapter=tmp_path, **{argument: "some"}
        )


@pytest.mark.parametrize("arguments", [{"method": "flora"}, {"options": {"energy": 0.9}}])
def test_a_rank_that_changes_is_refused_with_the_model_of_nvflare(
    arguments: dict[str, Any],
) -> None:
    with pytest.raises(UsageError, match="NVFlare's persistor keeps its rank"):
        FedLoRARecipe(min_clients=2, train_script="client.py", model={}, **arguments)


def test_a_prefix_in_the_allow_list_permits_all_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job without a script of its own may only build the classes that a site lists."""
    config = exported(tmp_path, ranks={"site-1": 4})
    [workflow], [filters] = config["workflows"], config["task_data_filters"]
    [persistor] = [each for each in config["components"] if each["id"] == "persistor"]
    ours = [workflow["args"]["aggregator"], persistor, *filters["filters"]]
    default = list(component_path_authorizer.DEFAULT_CLASS_ALLOW_LIST)
    resources: dict[str, Any] = {"class_allow_list": default}
    authorizer = component_path_authorizer.ComponentPathAuthorizer()
    monkeypatch.setattr(
        component_path_authorizer.ConfigService, "get_section", lambda name: resources
    )

    for component in ours:
        with pytest.raises(UnsafeComponentError, match="is not in allow_list"):
            authorizer.authorize_component_config(component)
    resources["class_allow_list"] = [*default, f"{MODULE}."]
    for component in ours:
        authorizer.authorize_component_config(component)


def run_sample(run: Path, *arguments: str) -> str:
    """The output of the sample's job in NVFlare's simulator."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SAMPLES / "job.py"), str(run), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def losses(output: str) -> dict[int, list[float]]:
    """The losses of the global adapter at the sites, by rank, round by round."""
    found: dict[int, list[float]] = {}
    for line in output.splitlines():
        if "loss of the global adapter" in line:
            words = line.partition(": rank ")[2].split()
            found.setdefault(int(words[0].rstrip(",")), []).append(float(words[-1]))
    return found


@pytest.mark.long
@pytest.mark.parametrize("arguments", [(), ("--offload",), ("--trainer",)], ids=str)
def test_three_sites_of_other_ranks_learn_in_the_simulator(
    tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    """Two rounds, and two more by a second job on the same folder."""
    first = losses(run_sample(tmp_path / "run", *arguments))
    second = losses(run_sample(tmp_path / "run", *arguments))

    assert first.keys() == second.keys() == {4, 8, 16}
    for rank, values in first.items():
        assert len(values) == len(second[rank]) == 2
        assert values[0] > values[1] > second[rank][0] > second[rank][1]
    folders = sorted((tmp_path / "run" / "rounds").glob("*/global"))
    assert [folder.parent.name for folder in folders] == [f"round-0{n}" for n in range(1, 5)]
    assert StateDict.load(folders[-1]).rank == 16
    report = diagnose([tmp_path / "run" / "rounds"])
    assert len(report.adapters) == 4
    [result] = (tmp_path / "run" / "workspace").glob("**/app_server/global")
    written, kept = (load_file(at / "adapter_model.safetensors") for at in (result, folders[-1]))
    assert all(bool((written[name] == tensor).all()) for name, tensor in kept.items())
