"""Make the sample round: a tiny base model and eight clients' LoRA adapters.

Everything comes from scikit-learn's handwritten digits, cut into a test part that nothing
trains on, a server part and the clients' part:

- `base/`: a small vision transformer, trained from scratch on the server's digits (0-4 only);
- `round-01/<client>/`: a PEFT adapter trained on that client's own, skewed share of all ten
  digits, with its sample count in `fedlora.json`.

Every client starts from one shared draw of A (rank r takes the first r rows) and B = 0, so
that rank index i means the same at every client. It runs for under a minute, seeded and
single-threaded: on one machine, with the same libraries, a second run writes the same bytes.

    python samples/make_samples.py [--output DIR]

With --data, it writes only the digits, for clients that train on their own: `<client>.jsonl` for
each of them, and `test.jsonl`, the held-out part.

    python samples/make_samples.py --data DIR
"""

import argparse
import copy
import json
import warnings
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import ViTForImageClassification
from transformers.utils import logging

from fedlora_cli.simulation.tasks.digits import base_config

# The ranks. A higher rank goes with less data (a share of about 1 / sqrt(rank)): the mismatch
# in which averaging by sample count loses what only the few high-rank clients learned.
RANKS = dict(zip((f"clinic-{c}" for c in "abcdefgh"), (4, 16, 2, 8, 2, 16, 8, 4), strict=True))
TARGETS = ["fc1", "fc2", "q_proj", "v_proj"]
SCALE = 2  # lora_alpha / r
SKEW = 0.5  # Dirichlet alpha: the smaller, the more uneven each client's mix of digits
SEED = 822  # a draw in which every client has tens of images or more

Digits = tuple[Tensor, Tensor]  # images in [-1, 1], labels


def split_digits() -> tuple[Digits, Digits, Digits]:
    """The server's part (digits 0-4), the clients' part (all ten) and the held-out test part."""
    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    labels = torch.tensor(bunch.target)

    def cut(index: np.ndarray, size: float) -> list[np.ndarray]:
        return train_test_split(index, test_size=size, stratify=labels[index], random_state=SEED)

    train, test = cut(np.arange(len(labels)), 0.2)
    low, high = train[bunch.target[train] < 5], train[bunch.target[train] >= 5]
    server, rest = cut(low, 0.5)
    parts = server, np.concatenate([rest, high]), test
    first, second, third = ((images[index], labels[index]) for index in parts)
    return first, second, third


def split_clients(pool: Digits) -> dict[str, Digits]:
    """Deal each digit's images out to the clients in Dirichlet-drawn proportions."""
    images, labels = pool
    rng = np.random.default_rng(SEED)
    share = np.array(list(RANKS.values())) ** -0.5
    alpha = SKEW * share / share.mean()
    held: list[list[np.ndarray]] = [[] for _ in RANKS]
    for digit in range(10):
        index = rng.permutation(np.flatnonzero(labels == digit))
        cuts = (rng.dirichlet(alpha).cumsum()[:-1] * len(index)).round().astype(int)
        for mine, part in zip(held, np.split(index, cuts), strict=True):
            mine.append(part)
    joined = [np.concatenate(mine) for mine in held]
    return {name: (images[i], labels[i]) for name, i in zip(RANKS, joined, strict=True)}


def train(model: torch.nn.Module, digits: Digits, epochs: int, rate: float) -> tuple[float, float]:
    """AdamW on the trainable parameters; the mean loss before and after."""
    images, labels = digits
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    before = cross_entropy(model(images).logits, labels).item()
    for _ in range(epochs):
        for batch in torch.randperm(len(labels)).split(16):
            optimizer.zero_grad()
            cross_entropy(model(images[batch]).logits, labels[batch]).backward()
            optimizer.step()
    return before, cross_entropy(model(images).logits, labels).item()


def add_adapter(base: ViTForImageClassification, rank: int) -> PeftModel:
    """A copy of the base with B = 0 and the first rows of the shared A."""
    config = LoraConfig(
        r=rank, lora_alpha=SCALE * rank, target_modules=TARGETS, modules_to_save=["classifier"]
    )
    model = get_peft_model(copy.deepcopy(base), config)
    generator = torch.Generator().manual_seed(SEED)
    for name, weight in model.named_parameters():
        if "lora_A" in name:
            shared = torch.rand(max(RANKS.values()), weight.shape[1], generator=generator)
            weight.data = (2 * shared[:rank] - 1) / weight.shape[1] ** 0.5
    return model


def save_adapter(model: PeftModel, samples: int, folder: Path) -> None:
    model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink()  # the empty model card
    (folder / "adapter_model.safetensors").chmod(0o644)  # not 0600
    config = json.loads((folder / "adapter_config.json").read_text())
    config["target_modules"].sort()  # PEFT holds a set, and writes it in no fixed order
    for name, content in ("adapter_config", config), ("fedlora", {"samples": samples}):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")


def write_data(folder: Path) -> None:
    """Every client's digits, and those held out, as JSON Lines of what the base model takes."""
    folder.mkdir(parents=True, exist_ok=True)
    _, pool, test = split_digits()
    for name, (images, labels) in {**split_clients(pool), "test": test}.items():
        rows = zip(images.tolist(), labels.tolist(), strict=True)
        lines = [json.dumps({"pixel_values": image, "labels": label}) for image, label in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the sample base model and adapters.")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, metavar="DIR")
    parser.add_argument("--data", type=Path, metavar="DIR", help="write the digits here instead")
    given = parser.parse_args()
    if given.data is not None:
        write_data(given.data)
        return
    output: Path = given.output

    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # PEFT's call
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    server, pool, _ = split_digits()

    base = ViTForImageClassification(base_config())
    train(base, server, epochs=20, rate=1e-3)
    base.save_pretrained(output / "base")
    (output / "base/model.safetensors").chmod(0o644)  # not 0600
    base.name_or_path = "samples/base"  # for the adapters: relative to the repository root

    for name, digits in split_clients(pool).items():
        model, count = add_adapter(base, RANKS[name]), len(digits[1])
        before, after = train(model, digits, epochs=20, rate=2e-3)
        save_adapter(model, count, output / "round-01" / name)
        print(f"{name}: rank {RANKS[name]:2}, {count:3} samples, loss {before:.2f} -> {after:.2f}")


if __name__ == "__main__":
    main()
