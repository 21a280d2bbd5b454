"""What a fine-tuning run is about: which model, which examples, which batches, which measure.

A task from outside (images, sound, graphs) is one final class with these methods, handed to
``finetune(run, task=...)``; its settings are its fields.
"""

from __future__ import annotations

import math
import random
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, final

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rankwise.candidates import HEADS
from rankwise.errors import DataError
from rankwise.hf import data
from rankwise.hf.data.examples import IGNORE
from rankwise.hf.deferred import deferred_logits
from rankwise.hf.models import load_model, pad_id, tokenizer_of
from rankwise.placement import resolve
from rankwise.sites import Sites, Target
from rankwise.structures import Replace

Batch = Mapping[str, Any]


class Task(ABC):
    """What a run is about. Subclasses are final and frozen.

    Attributes:
        name: for reports.
    """

    name: ClassVar[str]

    @abstractmethod
    def processor(self, model: str) -> Any:
        """What turns raw input into numbers: a tokenizer, an image processor, or None."""

    @abstractmethod
    def examples(self, path: str | Path, processor: Any) -> Any:
        """Read a file: a sequence of examples."""

    @abstractmethod
    def model(self, model: str, examples: Any, processor: Any, **options: Any) -> nn.Module:
        """Load the base; its forward takes a batch and returns an object with ``loss``."""

    @abstractmethod
    def collator(self, processor: Any) -> Callable[[Sequence[Any]], dict[str, Any]]:
        """What joins examples to a batch."""

    @abstractmethod
    def score(self, model: nn.Module, batches: Iterable[Batch], processor: Any) -> dict[str, float]:
        """Measure a model over batches on its device; one of the measures is "loss"."""

    def split(self, examples: Any, share: float, seed: int) -> tuple[Any, Any]:
        """Set a share of the examples aside."""
        count = len(examples)
        aside = set(random.Random(seed).sample(range(count), max(1, round(share * count))))
        return [examples[i] for i in range(count) if i not in aside], [examples[i] for i in sorted(aside)]

    def settled(self, examples: Any) -> Task:
        """The task with what only the training data tells, such as the names of classes."""
        return self

    def rows(self, examples: Any) -> Any:
        """What the trainer iterates over: the examples, or rows packed of them."""
        return examples

    def sites(self, sites: Sites, model: nn.Module) -> Sites:
        """The sites of the recipe, with what the task itself must train."""
        return sites


class TextTask(Task):
    """A task whose input is text, read by :mod:`rankwise.hf.data`."""

    def processor(self, model: str) -> Any:
        return tokenizer_of(model)

    def split(self, examples: Any, share: float, seed: int) -> tuple[Any, Any]:
        items = examples.items
        if examples.schema == "text" and len({e.row.where for e in items}) == 1 < len(items):
            aside = min(max(1, round(share * len(items))), len(items) - 1)
            return examples[:-aside], examples[-aside:]  # the end of the one document
        return data.split(examples, share, seed)


@final
@dataclass(frozen=True)
class CausalLM(TextTask):
    """Predict the next token of texts, completions or conversations.

    Attributes:
        max_length: longest example, in tokens.
        pack: lay documents side by side into full rows.
        whole: train what the method leaves out as it is: a model that starts at random has nothing to keep.
    """

    max_length: int = 1024
    pack: bool = False
    whole: bool = False
    name = "causal-lm"

    def examples(self, path: str | Path, processor: Any) -> Any:
        found = data.load(path, processor, max_length=self.max_length)
        if found.schema == "label":
            raise DataError(f"{path} has text and label; pass --task classification, or drop the column label.")
        return found

    def model(self, model: str, examples: Any, processor: Any, **options: Any) -> Any:
        loaded = load_model(AutoModelForCausalLM, model, **options)
        data.check_model(processor, loaded, examples)
        if self.pack:
            data.check_packing(loaded)
        return loaded

    def sites(self, sites: Sites, model: nn.Module) -> Sites:
        if not (self.whole and sites.targets):
            return sites
        placed = resolve(model, Replace(), replace(sites, overrides=()))
        taken = {f"{path}.weight" for placement in placed for path, _, _ in placement.carriers}
        left: dict[int, list[str]] = {}  # a tensor that is shared has several names
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if name not in taken:
                left.setdefault(id(parameter), []).append(name)
        alike = (Target("|".join(map(re.escape, n)), "regex") if n[1:] else Target(n[0], "glob") for n in left.values())
        return replace(sites, train=(*sites.train, *alike))

    def rows(self, examples: Any) -> Any:
        return data.pack(examples, self.max_length) if self.pack else examples

    def collator(self, processor: Any) -> Any:
        return data.Collator(processor, packed=self.pack)

    def score(self, model: nn.Module, batches: Iterable[Batch], processor: Any) -> dict[str, float]:
        nats, tokens, size = 0.0, 0, 0
        for batch in batches:
            labels = batch["labels"][:, 1:]
            inputs = {name: value for name, value in batch.items() if name != "labels"}
            learned = labels != IGNORE
            targets = nn.functional.pad(labels, (0, 1), value=IGNORE).flatten()
            with deferred_logits(model):
                logits = model(**inputs).logits.float()
                nats += float(nn.functional.cross_entropy(logits.flatten(0, 1), targets, reduction="sum"))
            tokens += int(learned.sum())
            for row, mask in zip(labels, learned, strict=True):
                size += len(processor.decode(row[mask].tolist(), skip_special_tokens=True).encode())
        return {"bits_per_byte": nats / math.log(2) / max(size, 1), "loss": nats / max(tokens, 1)}


@final
@dataclass(frozen=True)
class SequenceClassification(TextTask):
    """Choose a class for a whole text; the new head is trained whole, as part of the adapter.

    Attributes:
        max_length: longest example, in tokens.
        labels: names of the classes by number; None for those of the training data.
    """

    max_length: int = 1024
    labels: tuple[str | int, ...] | None = None
    name = "classification"

    def examples(self, path: str | Path, processor: Any) -> Any:
        return data.load(path, processor, max_length=self.max_length, schema="label", label_names=self.labels)

    def settled(self, examples: Any) -> SequenceClassification:
        return replace(self, labels=tuple(examples.label_names))

    def model(self, model: str, examples: Any, processor: Any, **options: Any) -> Any:
        names = [str(n) for n in (self.labels or examples.label_names)]
        if len(names) < 2:
            raise DataError(f"A classifier tells two classes or more apart; found {names}.")
        maps = {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}
        with torch.random.fork_rng():
            torch.manual_seed(0)  # the new head starts alike everywhere
            loaded = load_model(AutoModelForSequenceClassification, model, **maps, **options)
        data.check_model(processor, loaded, examples)
        loaded.config.pad_token_id = pad_id(processor)  # as the collator does
        return loaded

    def sites(self, sites: Sites, model: nn.Module) -> Sites:
        heads = [name for name, _ in model.named_children() if name in HEADS]
        inside = tuple(Target(f"{name}.*", "glob", optional=True) for name in heads)
        train = (*sites.train, *(Target(name, "regex") for name in heads))  # not what is called so further inside
        return replace(sites, train=train, exclude=(*sites.exclude, *inside))

    def collator(self, processor: Any) -> Any:
        return data.Collator(processor)

    def score(self, model: nn.Module, batches: Iterable[Batch], processor: Any) -> dict[str, float]:
        nats, right, count = 0.0, 0, 0
        for batch in batches:
            output = model(**batch)
            count += len(batch["labels"])
            nats += float(output.loss) * len(batch["labels"])
            right += int((output.logits.argmax(-1) == batch["labels"]).sum())
        return {"accuracy": right / count, "loss": nats / count}


PRETRAINING = "pretraining"
TASKS = {**{task.name: task for task in (CausalLM, SequenceClassification)}, PRETRAINING: CausalLM}
