"""A client of a federation: train an adapter on local data. It needs torch, transformers and PEFT.

    python train_client.py ADAPTER DATA -o OUT [--epochs 1] [--lr 1e-3] [--batch-size 16]

ADAPTER is any PEFT adapter folder, as the server hands it out; its base model is the one that its
config names. DATA is a file of JSON Lines, or CSV with a header, whose fields are one of these:

- what the model's `forward` takes: `pixel_values`, `input_ids`, `labels` and so on;
- `text` and `label`, for a classifier;
- `text` alone, for a causal language model, which learns the text;
- `prompt` and `completion`, for a causal language model, which learns the completion.

OUT is the trained adapter, and `fedlora.json` in it tells the server how many samples there were.
"""

import argparse
import csv
import gc
import inspect
import json
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

IGNORED = -100  # a label that the loss leaves out
CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
}

Row = dict[str, Any]
Sample = dict[str, Tensor]


def fail(place: Path, what: object) -> NoReturn:
    raise SystemExit(f"error: {place}: {' '.join(str(what).split())[:400]}")


def read_rows(path: Path) -> list[Row]:
    """The rows of the file, all with the same fields."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix == ".csv":
                rows: list[Row] = list(csv.DictReader(file, strict=True))
            else:
                rows = [json.loads(line) for line in file if line.strip()]
    except OSError as error:
        fail(path, error.strerror)
    except (ValueError, csv.Error) as error:
        fail(path, f"neither JSON Lines nor CSV with a header ({error})")
    if not rows:
        fail(path, "no rows in it")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or row.keys() != rows[0].keys() or None in row.values():
            fail(path, f"row {number} is no object with the fields of the first row")
    return rows


def load(adapter: Path, num_labels: int | None) -> Any:
    """The adapter in its base model, to train."""
    gc.disable()  # which makes the imports, most of the time of a small client, a third faster
    import transformers
    from peft import PeftConfig, PeftModel

    gc.freeze()
    gc.enable()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # a head may come with the adapter
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # PEFT's call
    try:
        config = PeftConfig.from_pretrained(str(adapter))
        base, options = config.base_model_name_or_path, {"revision": config.revision}
        saved_from = transformers.AutoConfig.from_pretrained(base, **options).architectures
        name = CLASSES.get(config.task_type) or (saved_from or ["no class"])[0]
        if num_labels is not None:
            options["num_labels"] = num_labels
        model = getattr(transformers, name).from_pretrained(base, **options)
        return PeftModel.from_pretrained(model, str(adapter), is_trainable=True)
    except (AttributeError, OSError, RuntimeError, ValueError) as error:
        fail(adapter, error)


def tokenised(rows: list[Row], base: Any, limit: int) -> list[Row]:
    """Rows of words as rows of tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base.name_or_path)
    if getattr(base.config, "pad_token_id", None) is None:
        base.config.pad_token_id = tokenizer.pad_token_id
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    limit = min(limit, getattr(base.config, "max_position_embeddings", limit))

    def tokens(row: Row) -> Row:
        if "prompt" in row:
            prompt = tokenizer(str(row["prompt"])).input_ids
            answer = tokenizer(str(row["completion"]), add_special_tokens=False).input_ids + end
            labels = [IGNORED] * len(prompt) + answer
            # Of what is too long, the end is kept.
            return {"input_ids": (prompt + answer)[-limit:], "labels": labels[-limit:]}
        ids = tokenizer(str(row["text"]), truncation=True, max_length=limit).input_ids
        if "label" not in row:
            return {"input_ids": ids, "labels": ids}
        return {"input_ids": ids, "labels": base.config.label2id.get(row["label"], row["label"])}

    return [tokens(row) for row in rows]


def samples_of(rows: list[Row], data: Path, base: Any, limit: int) -> list[Sample]:
    """The rows as tensors that the model takes."""
    words = [["text"], ["prompt", "completion"]] if base.can_generate() else [["text", "label"]]
    words = [] if base.config.is_encoder_decoder else words
    if set(rows[0]) in map(set, words):
        rows = tokenised(rows, base, limit)
    takes = [name for name in inspect.signature(base.forward).parameters if name != "kwargs"]
    unknown = [name for name in rows[0] if name not in takes]
    if unknown:
        wanted = "; or ".join(map(", ".join, [*words, takes]))
        fail(data, f"{type(base).__name__} does not take {', '.join(unknown)}, but {wanted}")
    samples = []
    for number, row in enumerate(rows, 1):
        try:  # a cell of CSV may be a number or a list
            cells = {k: json.loads(v) if isinstance(v, str) else v for k, v in row.items()}
            sample = {name: torch.tensor(value) for name, value in cells.items()}
        except (RuntimeError, TypeError, ValueError):
            fail(data, f"row {number} is not made of numbers: {row}")
        if "input_ids" in sample:
            sample.setdefault("attention_mask", torch.ones_like(sample["input_ids"]))
        samples.append(sample)
    return samples


def batches(samples: list[Sample], order: Tensor, size: int, model: Any) -> Iterator[Sample]:
    """Batches in this order; lists are filled up to the longest of their batch."""
    fillers = {"labels": IGNORED, "input_ids": getattr(model.config, "pad_token_id", None) or 0}
    for part in order.split(size):
        batch = {}
        for name in samples[0]:
            values = [samples[i][name] for i in part]
            if values[0].dim() == 1:
                batch[name] = pad_sequence(values, True, fillers.get(name, 0)).to(model.device)
            else:
                batch[name] = torch.stack(values).to(model.device)
        yield batch


@torch.no_grad()
def mean_loss(model: Any, samples: list[Sample], size: int, data: Path) -> float:
    """The loss of a sample of `data`, on average."""
    model.eval()
    total = 0.0
    try:
        for batch in batches(samples, torch.arange(len(samples)), size, model):
            loss = model(**batch).loss
            if loss is None:
                fail(data, "it has no labels to learn from")
            total += loss.item() * len(next(iter(batch.values())))
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        fail(data, f"the model cannot take it ({error})")
    if not math.isfinite(total):
        fail(data, f"its loss is {total}; try a smaller --lr, or rows with more to learn")
    return total / len(samples)


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train an adapter on local data.")
    parser.add_argument("adapter", type=Path, metavar="ADAPTER")
    parser.add_argument("data", type=Path, metavar="DATA")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=512, help="in tokens")
    parser.add_argument("--num-labels", type=int, help="of a head that the base model lacks")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(given)
    if args.output.exists():
        fail(args.output, "it already exists")
    if not (args.adapter / "adapter_config.json").is_file():
        fail(args.adapter, "no adapter in it")

    rows = read_rows(args.data)
    torch.manual_seed(args.seed)
    model = load(args.adapter, args.num_labels).to(args.device)
    samples = samples_of(rows, args.data, model.get_base_model(), args.max_length)
    before = mean_loss(model, samples, args.batch_size, args.data)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.lr)
    for _ in range(args.epochs):
        model.train()
        for batch in batches(samples, torch.randperm(len(samples)), args.batch_size, model):
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
    after = mean_loss(model, samples, args.batch_size, args.data)

    # Under a hidden name first, so that the server never finds half an adapter.
    place = args.output.with_name(f".{args.output.name}")
    model.save_pretrained(str(place), save_embedding_layers=False)
    (place / "fedlora.json").write_text(json.dumps({"samples": len(samples)}) + "\n")
    place.rename(args.output)
    print(f"{args.output.name}: {len(samples)} samples, loss {before:.3f} -> {after:.3f}")


if __name__ == "__main__":
    main()
