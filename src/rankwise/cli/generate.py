"""``rankwise generate``."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from rankwise.cli import common


def generate(
    model: common.ModelArg,
    prompt: Annotated[
        str, typer.Option("--prompt", "-p", help='The text to go on from; "-" reads stdin.')
    ],  # fmt: skip
    adapter: Annotated[str | None, typer.Option(help="Folder or file of an adapter.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="As a user's turn of a chat.")] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Stop after so many tokens.")] = 100,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
    base: Annotated[str | None, typer.Option(help="Quantise the weights: nf4 or int8.")] = None,
    as_json: common.JsonFlag = False,
) -> None:
    """Let a model go on from a prompt."""
    common.must_exist(adapter)
    common.quiet()
    import torch
    from transformers import AutoModelForCausalLM

    from rankwise.errors import DataError
    from rankwise.hf.models import load_model, tokenizer_of

    tokenizer = tokenizer_of(model)
    text = sys.stdin.read() if prompt == "-" else prompt
    if chat:
        if not tokenizer.chat_template:
            raise DataError(f"--chat needs a tokenizer with a chat template; that of {model} has none.")
        turns = [{"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)
    else:
        ids = tokenizer(text)
    start = ids["input_ids"]
    if start and start[-1] == tokenizer.eos_token_id:
        start = start[:-1]
    if not start:
        raise DataError("A prompt has at least one token; found none.")
    told = common.run_of(adapter)
    loaded: Any = load_model(AutoModelForCausalLM, model, base=base or told.get("base"))
    if adapter is not None:
        common.load_adapter(loaded, adapter)
    torch.manual_seed(seed)
    how = {"do_sample": True, "temperature": temperature} if temperature > 0 else {}
    inputs = torch.tensor([start], device=loaded.device)
    out = loaded.generate(
        input_ids=inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=max_new_tokens,
        pad_token_id=next(p for p in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
                          if p is not None),
        **(how or {"do_sample": False}),
    )  # fmt: skip
    answer = tokenizer.decode(out[0, len(start) :], skip_special_tokens=True)
    if as_json:
        common.print_json({"prompt": text, "text": answer})
    else:
        print(answer if chat else text + answer)
