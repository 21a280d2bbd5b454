"""Data that one can see: files to rows, rows to tokens with a mask, examples to batches, a report.

train, held_out = split(load("train.jsonl", tokenizer, max_length=1024))
check_model(tokenizer, model, train)
render(report(train, tokenizer, held_out))
Trainer(model, args, train_dataset=pack(train), data_collator=Collator(tokenizer, packed=True))
"""

from rankwise.hf.data.examples import Examples, check_model, load, split
from rankwise.hf.data.pack import Collator, check_packing, pack
from rankwise.hf.data.read import read
from rankwise.hf.data.report import render, report

__all__ = ["Collator", "Examples", "check_model", "check_packing", "load", "pack", "read", "render", "report", "split"]
