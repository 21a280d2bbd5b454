"""``rankwise generate``."""

import sys
from typing import Annotated, Any

from typer import Option

from rankwise.cli import common
from rankwise.errors import DataError


@common.settings("base")
def generate(
    model: common.ModelArg,
    prompt: Annotated[str, Option("--prompt", "-p", help='The text to go on from; "-" reads stdin.')],
    adapter: common.Adapter = None,
    chat: Annotated[bool, Option("--chat", help="As a user's turn of a chat.")] = False,
    max_new_tokens: Annotated[int, Option(help="Stop after so many tokens.")] = 100,
    temperature: Annotated[float, Option(help="0 takes the likeliest token.")] = 0.0,
    seed: Annotated[int, Option(help="Of sampling.")] = 0,
    as_json: common.Json = False,
    **given: Any,
) -> None:
    """Let a model go on from a prompt."""
    import torch
    from transformers import AutoModelForCausalLM

    import rankwise as rw
    from rankwise.hf.models import load_model, pad_id, tokenizer_of

    run = common.run_of(adapter, model=model, **given)
    tokenizer = tokenizer_of(model)
    text = sys.stdin.read() if prompt == "-" else prompt
    if chat and not tokenizer.chat_template:
        raise DataError(f"--chat needs a tokenizer with a chat template; that of {model} has none.")
    turns = [{"role": "user", "content": text}]
    start = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) if chat else text
    ids = tokenizer(start, add_special_tokens=not chat, return_tensors="pt")["input_ids"]
    if ids[0, -1:].eq(tokenizer.eos_token_id or -1).any():
        ids = ids[:, :-1]
    if not ids.numel():
        raise DataError("A prompt has at least one token; found none.")
    loaded: Any = load_model(AutoModelForCausalLM, model, base=run.base)
    if adapter is not None:
        rw.load(loaded, adapter)
    torch.manual_seed(seed)
    how = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    how |= {"max_new_tokens": max_new_tokens, "pad_token_id": pad_id(tokenizer)}
    ids = ids.to(loaded.device)
    out = loaded.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **how)
    answer = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    common.show(as_json, {"prompt": text, "text": answer}, answer if chat else text + answer)
