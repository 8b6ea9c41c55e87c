"""Round 0: one start for all ranks, from the configuration of a base model alone."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from support.adapters import CONFIG, PREFIX, WEIGHTS, Spec, config, make
from support.models import bert, gpt2, llama, save, vit
from support.starts import QV, Base, factors, heads, loaded, run, save_base
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from fedlora_cli import InitOptions, aggregate, initialize, read
from fedlora_cli.libraries import muted

SAMPLES = Path(__file__).parents[2] / "samples"


@pytest.fixture
def base(tmp_path: Path) -> Base:
    return partial(save_base, tmp_path / "base")


# What is written.


def test_every_rank_has_the_beginning_of_one_start(tmp_path: Path, base: Base) -> None:
    """Rank index i is the same direction for all; uniform in ±1/sqrt(in), and B is zero."""
    options = replace(QV, ranks=(2, 5, 9))

    report = initialize(base(llama), tmp_path / "out", options=options)

    assert [row.name for row in report.adapters] == ["rank-2", "rank-5", "rank-9"]
    widest = factors(tmp_path / "out/rank-9")
    assert len(widest) == 2 * 8
    rows = [tensor for key, tensor in widest.items() if "lora_A" in key]
    assert len({tensor[0, 0].item() for tensor in rows}) == len(rows)
    for rank in (2, 5, 9):
        for key, tensor in factors(tmp_path / f"out/rank-{rank}").items():
            if "lora_B" in key:
                assert tensor.shape[1] == rank
                assert not tensor.any()
            else:
                assert torch.equal(tensor, widest[key][:rank])
                bound = tensor.shape[1] ** -0.5
                assert 0.5 * bound < tensor.abs().max() <= bound
        written = config(tmp_path / f"out/rank-{rank}")
        assert (written["r"], written["lora_alpha"]) == (rank, 2 * rank)
        assert written["base_model_name_or_path"] == str(tmp_path / "base")


@pytest.mark.parametrize("width", [8, 14])
def test_embeddings_start_as_peft_has_them_and_share_their_beginning_too(
    tmp_path: Path, base: Base, width: int
) -> None:
    """A is zero and B normal there: and torch draws the end of a whole normal matrix anew."""
    sizes = {"hidden_size": width, "intermediate_size": 16, "num_attention_heads": 1}
    tiny = LlamaConfig(vocab_size=29, num_hidden_layers=1, **sizes)
    options = InitOptions(ranks=(1, 3, 7), target_modules=("embed_tokens",))

    initialize(base(lambda: LlamaForCausalLM(tiny)), tmp_path / "out", options=options)

    B, A = (
        f"{PREFIX}model.embed_tokens.lora_embedding_B",
        f"{PREFIX}model.embed_tokens.lora_embedding_A",
    )
    widest = factors(tmp_path / "out/rank-7")[B]
    assert widest.shape == (width, 7)
    assert 0.6 < widest.std() < 1.4
    for rank in (1, 3, 7):
        tensors = factors(tmp_path / f"out/rank-{rank}")
        assert torch.equal(tensors[B], widest[:, :rank])
        assert tensors[A].shape == (rank, 29)
        assert not tensors[A].any()


def test_a_seed_makes_the_bytes_and_another_makes_others(tmp_path: Path, base: Base) -> None:
    home = base(vit)
    options = replace(QV, ranks=(2, 4), modules_to_save=("classifier",), num_labels=3)
    for name, one in (
        ("a", options),
        ("b", replace(options, jobs=1)),
        ("c", replace(options, seed=1)),
    ):
        initialize(home, tmp_path / name, options=one)

    for rank in ("rank-2", "rank-4"):
        a, b, c = (tmp_path / name / rank for name in "abc")
        assert (a / WEIGHTS).read_bytes() == (b / WEIGHTS).read_bytes()
        assert (a / CONFIG).read_bytes() == (b / CONFIG).read_bytes()
        assert heads(a).keys() == heads(c).keys() == {"classifier.weight", "classifier.bias"}
        assert not torch.equal(heads(a)["classifier.weight"], heads(c)["classifier.weight"])
        for key, tensor in factors(a).items():
            assert torch.equal(tensor, factors(c)[key]) == ("lora_B" in key)


@pytest.mark.parametrize(
    ("options", "alpha", "dropout", "dtype"),
    [
        ({}, 6, 0, torch.float32),
        ({"alpha": 7.5}, 7.5, 0, torch.float32),
        ({"scaling": 0.5, "dropout": 0.1}, 1.5, 0.1, torch.float32),
        ({"dtype": "bfloat16"}, 6, 0, torch.bfloat16),
    ],
)
def test_the_choices_of_training_are_written_down(
    tmp_path: Path, base: Base, options, alpha: float, dropout: float, dtype: torch.dtype
) -> None:
    chosen = replace(QV, task="CAUSAL_LM", revision="v2", **options)
    report = initialize(base(llama), tmp_path / "out", options=chosen)

    written = config(tmp_path / "out/rank-3")
    assert (written["lora_alpha"], written["lora_dropout"]) == (alpha, dropout)
    assert (written["task_type"], written["revision"]) == ("CAUSAL_LM", "v2")
    assert {tensor.dtype for tensor in factors(tmp_path / "out/rank-3").values()} == {dtype}
    assert (report.adapters[0].alpha, report.adapters[0].scaling) == (alpha, alpha / 3)
    assert report.adapters[0].bytes == (tmp_path / "out/rank-3" / WEIGHTS).stat().st_size


def test_like_clients_everyone_starts_at_its_own_ranks_and_alphas(
    tmp_path: Path, base: Base
) -> None:
    """Whatever they call the base model: rsLoRA, patterns, other modules, other dtypes."""
    q, v = (f"model.layers.1.self_attn.{one}" for one in ("q_proj", "v_proj"))
    shapes = {q: (32, 32), v: (16, 32)}
    specs = [
        Spec("ann", rank=2, alpha=9, shapes=shapes, ranks={v: 5}, alphas={q: 3}),
        Spec("bob", rank=6, rslora=True, shapes={q: shapes[q]}, dtype=torch.float16),
    ]
    clients = []
    for spec in specs:
        other = {"base_model_name_or_path": f"the base of {spec.name}", "lora_dropout": 0.2}
        clients.append(make(tmp_path / "clients", replace(spec, config=other)).folder)
    home = base(llama)

    report = initialize(home, tmp_path / "out", tmp_path / "clients")
    initialize(
        home, tmp_path / "scaled", clients, InitOptions(scaling=3, dropout=0, dtype="float32")
    )

    assert [row.name for row in report.adapters] == ["ann", "bob"]
    assert [(row.target, row.names) for row in report.targets] == [
        ("q_proj", (q,)),
        ("v_proj", (v,)),
    ]
    start = {**factors(tmp_path / "out/ann"), **factors(tmp_path / "scaled/bob")}
    for folder in clients:
        theirs, given = read(folder), read(tmp_path / "out" / folder.name)
        scaled = read(tmp_path / "scaled" / folder.name)
        assert given.modules.keys() == theirs.modules.keys()
        for name, module in theirs.modules.items():
            assert (given.modules[name].rank, given.modules[name].alpha) == (
                module.rank,
                module.alpha,
            )
            assert given.modules[name].dtype == module.dtype
            assert given.modules[name].scale == module.scale
            assert scaled.modules[name].scale == pytest.approx(3)
            assert scaled.modules[name].dtype == "float32"
        assert (given.metadata.base_model, given.metadata.dropout) == (str(home), 0.2)
        assert scaled.metadata.dropout == 0
        for key, tensor in factors(folder).items():
            mine = factors(tmp_path / "scaled" / folder.name)[key]
            assert mine.shape == tensor.shape
            if "lora_A" in key:
                shared = min(len(mine), len(start[key]))
                assert torch.equal(mine[:shared], start[key][:shared])


# What is adapted.


@pytest.mark.parametrize(
    ("build", "options", "targets"),
    [
        (llama, {}, {("q_proj", (32, 32), 4), ("v_proj", (16, 32), 4)}),
        (gpt2, {}, {("c_attn", (72, 24), 2)}),
        (bert, {}, {("query", (32, 32), 2), ("value", (32, 32), 2)}),
        (
            gpt2,
            {"target_modules": "all-linear"},
            {
                ("c_attn", (72, 24), 2),
                ("c_proj", (24, 24), 2),
                ("c_fc", (96, 24), 2),
                ("c_proj", (24, 96), 2),
            },
        ),
        (
            vit,
            {"target_modules": "all-linear", "modules_to_save": ("classifier",)},
            {
                ("q_proj", (32, 32), 2),
                ("k_proj", (32, 32), 2),
                ("v_proj", (32, 32), 2),
                ("o_proj", (32, 32), 2),
                ("fc1", (40, 32), 2),
                ("fc2", (32, 40), 2),
            },
        ),
        (llama, {"target_modules": r".*\.[02]\..*down_proj"}, {("down_proj", (32, 56), 2)}),
    ],
)
def test_what_is_adapted_is_what_peft_adapts(
    tmp_path: Path, base: Base, build: Callable[[], PreTrainedModel], options, targets
) -> None:
    """By default what PEFT knows for the architecture."""
    report = initialize(base(build), tmp_path / "out", options=InitOptions((2,), **options))

    assert {(one.target, one.shape, len(one.names)) for one in report.targets} == targets
    names = {name for one in report.targets for name in one.names}
    assert set(read(tmp_path / "out/rank-2").modules) == names
    assert config(tmp_path / "out/rank-2")["fan_in_fan_out"] == (build is gpt2)


@pytest.mark.parametrize("build", [llama, gpt2, bert, vit])
def test_the_model_says_the_same_as_before_and_every_direction_can_be_trained(
    tmp_path: Path, base: Base, build: Callable[[], PreTrainedModel]
) -> None:
    home = base(build)
    targets = {vit: ("q_proj", "fc2"), llama: ("embed_tokens", "q_proj")}.get(build)
    saved = ("classifier",) if build in (vit, bert) else ()
    options = InitOptions((5,), target_modules=targets, modules_to_save=saved)
    initialize(home, tmp_path / "out", options=options)
    with muted():
        model = type(build()).from_pretrained(home).eval()

    adapted = loaded(model, tmp_path / "out/rank-5")

    ids = {"input_ids": torch.arange(12).reshape(2, 6)}
    given = {"pixel_values": torch.randn(2, 3, 8, 8)} if build is vit else ids
    assert torch.equal(adapted.eval()(**given).logits, model(**given).logits)
    adapted.train()(**given).logits.square().sum().backward()
    tensors = {k: p for k, p in adapted.named_parameters() if "lora_" in k}
    assert len(tensors) == len(factors(tmp_path / "out/rank-5"))
    for name, parameter in tensors.items():
        # B is what moves first, and in an embedding, where B is not zero, A.
        if "lora_B" in name:
            assert parameter.grad.abs().amax(dim=0).min() > 0
        elif "embedding_A" in name:
            assert parameter.grad.abs().amax(dim=1).min() > 0


def test_a_first_round_of_training_goes_through(tmp_path: Path, base: Base) -> None:
    """Init, train with PEFT, save, aggregate: the ranks share one basis from the start."""
    options = replace(QV, ranks=(2, 6), modules_to_save=("classifier",))
    home = base(vit)
    initialize(home, tmp_path / "start", options=options)
    torch.manual_seed(2)
    for folder in sorted((tmp_path / "start").iterdir()):
        with muted():
            model = loaded(type(vit()).from_pretrained(home), folder)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for _ in range(2):
            optimizer.zero_grad()
            images, labels = torch.randn(8, 3, 8, 8), torch.arange(8) % 5
            model(pixel_values=images, labels=labels).loss.backward()
            optimizer.step()
        save(model, tmp_path / "trained" / folder.name)

    report = aggregate([tmp_path / "trained"], tmp_path / "global")

    assert [row.rank for row in report.clients] == [2, 6]
    assert report.energy_ratio is not None
    assert 0 < report.energy_ratio < 1


# The command.


def test_the_command_shows_what_is_adapted_and_written(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["--target-modules", "q_proj,fc1", "--modules-to-save", "classifier"]
    result = run(SAMPLES / "base", "-o", "start", "--ranks", "2,8", "--ranks", "4", *arguments)

    assert result.exit_code == 0, result.output
    assert [path.name for path in sorted((tmp_path / "start").iterdir())] == [
        "rank-2", "rank-4", "rank-8",
    ]  # fmt: skip
    headline = " ".join(result.stdout.split())  # broken where the path of the samples is long
    assert "ViTForImageClassification, 6 modules, seed 0" in headline
    for row in ("q_proj        3  48 x 48", "fc1           3  96 x 48", "from the base model"):
        assert row in result.stdout
    table = result.stdout.split("target", 1)[1]
    assert all(len(line) <= 80 for line in table.splitlines())
    assert result.stderr == (
        "wrote: start\nnext: train from these; then fedlora aggregate CLIENTS -o global\n"
    )
    for line in run(
        SAMPLES / "base", "-o", "all", "--ranks", "2", "--target-modules", "all-linear", "-v"
    ).stdout.splitlines():
        assert "and 1 more" not in line


def test_the_start_like_the_sample_round(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(SAMPLES.parent)
    result = run("samples/base", "-o", tmp_path / "start", "--like", "samples/round-01")

    assert result.exit_code == 0, result.output
    for folder in (SAMPLES / "round-01").iterdir():
        given = read(tmp_path / "start" / folder.name)
        assert given.rank == read(folder).rank
        assert given.tensors.keys() == read(folder).tensors.keys()


def test_quiet_says_nothing_and_json_is_one_document(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    command = (SAMPLES / "base", "--ranks", "2", "--target-modules", "q_proj")
    assert run(*command, "-o", "quiet", "-q").output == ""
    result = run(*command, "-o", "start", "--json")

    document = json.loads(result.stdout, parse_constant=pytest.fail)
    assert document["schema"] == "fedlora.init/1"
    assert (document["output"], document["seed"]) == ("start", 0)
    assert [row["path"] for row in document["adapters"]] == ["start/rank-2"]
    assert document["targets"][0]["shape"] == [48, 48]


@pytest.mark.long
def test_the_libraries_that_are_used_say_nothing_and_are_as_before(
    tmp_path: Path, base: Base
) -> None:
    home = base(gpt2)
    program = (
        "import fedlora_cli, warnings\n"
        "from transformers.utils import logging\n"
        "before = logging.get_verbosity(), logging.is_progress_bar_enabled()\n"
        "options = fedlora_cli.InitOptions(ranks=(2,), task='SEQ_CLS')\n"
        f"fedlora_cli.initialize({str(home)!r}, {str(tmp_path / 'out')!r}, options=options)\n"
        "assert before == (logging.get_verbosity(), logging.is_progress_bar_enabled())\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_rank_index_i_has_one_meaning_for_a_mean_of_different_ranks(
    tmp_path: Path, base: Base
) -> None:
    """What raFLoRA needs: zero-padded, the A of all ranks have one mean of full length."""
    initialize(base(llama), tmp_path / "out", options=replace(QV, ranks=(2, 4)))

    low, high = (factors(tmp_path / f"out/rank-{rank}") for rank in (2, 4))
    for key in (key for key in high if "lora_A" in key):
        cosine = np.vdot(low[key].numpy(), high[key][:2].numpy()) / low[key].square().sum().item()
        assert math.isclose(cosine, 1, abs_tol=1e-6)
