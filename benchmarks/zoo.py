"""Every architecture of transformers, made tiny, under adapters: ``python -m benchmarks.zoo lora dora``.

A config's sizes are set small wherever it has them. Where that gives a model that runs on random inputs, each method is
attached at its default targets (convolutions where there is no linear layer) and must start as the base, change the
output once its factors move, have the same gradients in a first step under activation checkpointing as in a second one
without, reload to the same function, and merge into it. A language model's loss, its logits in chunks where its code
lets them be, must be the model's own, with its gradients.
"""

import argparse
import copy
import signal
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto import modeling_auto

import rankwise as rw
from benchmarks.memory import silent
from rankwise import losses
from rankwise.errors import RankwiseError
from rankwise.hf.deferred import deferred_logits

SIZES = {
    32: "hidden_size d_model n_embd dim embed_dim embedding_size moe_intermediate_size projection_dim image_size "
    "shared_expert_intermediate_size",
    64: "intermediate_size encoder_ffn_dim decoder_ffn_dim ffn_dim d_ff n_inner ffn_hidden_size hidden_dim "
    "max_position_embeddings n_positions",
    2: "num_hidden_layers num_layers n_layer n_layers encoder_layers decoder_layers num_key_value_heads "
    "num_experts_per_tok eos_token_id",
    4: "num_attention_heads num_heads n_head n_heads encoder_attention_heads decoder_attention_heads num_experts "
    "num_local_experts n_routed_experts",
    8: "head_dim d_kv patch_size qk_rope_head_dim qk_nope_head_dim v_head_dim",
    16: "q_lora_rank kv_lora_rank",
    128: "vocab_size",
    0: "pad_token_id",
    1: "bos_token_id decoder_start_token_id",
}
LARGEST = 60_000_000  # parameters: where sizes have other names
SECONDS = 120  # for one model under one method
LANGUAGE = {
    "CAUSAL_LM": transformers.AutoModelForCausalLM,
    "MASKED_LM": transformers.AutoModelForMaskedLM,
    "SEQ_TO_SEQ_CAUSAL_LM": transformers.AutoModelForSeq2SeqLM,
}


class Unbuilt(Exception):
    """The architecture gave no tiny model that runs; says why."""


def small(config: Any) -> Any:
    """The config with small sizes, those of its parts too."""
    for size, names in SIZES.items():
        for name in names.split():
            if type(getattr(config, name, "")) in (int, type(None)):
                with suppress(AttributeError):  # a property of others
                    setattr(config, name, size)
    for name, value in (("initializer_range", 0.02), ("layer_scale_init_value", 1.0)):
        if getattr(config, name, 1.0) < 1e-3:  # nothing inside would show at the output
            setattr(config, name, value)
    if isinstance(kinds := getattr(config, "layer_types", None), list):
        with suppress(AttributeError):
            config.layer_types = kinds[:2]
    for part in vars(config).values():
        if isinstance(part, transformers.PreTrainedConfig):
            small(part)
    return config


def inputs(model: Any) -> dict[str, Tensor]:
    """One random sample."""
    name, config = model.main_input_name, model.config
    side = getattr(config, "image_size", None) or 32
    side = side[0] if isinstance(side, list | tuple) else side
    if name == "pixel_values":
        return {name: torch.randn(2, getattr(config, "num_channels", None) or 3, side, side)}
    if name == "input_values":
        return {name: torch.randn(2, 4000)}
    if name == "input_features":
        frames = 2 * getattr(config, "max_source_positions", 50)
        return {name: torch.randn(2, getattr(config, "num_mel_bins", 80), frames)}
    found = {"input_ids": torch.randint(3, 100, (2, 8))}
    return found | ({"decoder_input_ids": torch.randint(3, 100, (2, 6))} if config.is_encoder_decoder else {})


@contextmanager
def limited() -> Iterator[None]:
    """Raise TimeoutError after a while."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"more than {SECONDS} s")

    former = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, former)


def built(name: str, auto: Any = transformers.AutoModel) -> tuple[Any, dict[str, Tensor]]:
    """A tiny model of an architecture and inputs on which it runs.

    Raises:
        Unbuilt: there is none.
    """
    try:
        with limited(), silent():
            config = small(transformers.CONFIG_MAPPING[name]())
            with torch.device("meta"):
                size = sum(p.numel() for p in auto.from_config(config).parameters())
            if size > LARGEST:
                raise Unbuilt(f"{size:,} parameters")
            transformers.set_seed(0)
            model = auto.from_config(config).float().eval()
            given = inputs(model)
            same = torch.equal(output(model, given), output(model, given))
    except Exception as error:  # transformers' code alone, on sizes that it was not written for
        raise Unbuilt(f"{type(error).__name__}: {error}") from error
    if not same:
        raise Unbuilt("draws in evaluation mode")
    return model, given


def returned(model: Any, given: Mapping[str, Tensor]) -> list[Tensor]:
    """The floating tensors that the model returns, with the same draws at each call."""
    transformers.set_seed(0)
    return [v for v in model(**given).values() if isinstance(v, Tensor) and v.is_floating_point()]


def forward(model: Any, given: Mapping[str, Tensor]) -> Tensor:
    """All that the model returns, in a row."""
    return torch.cat([v.flatten() for v in returned(model, given)])


@torch.no_grad()
def output(model: Any, given: Mapping[str, Tensor]) -> Tensor:
    """In evaluation mode.

    Raises:
        Unbuilt: it is not finite, or vanishes.
    """
    found = forward(model.eval(), given)
    if not found.isfinite().all() or found.abs().max() < 1e-6:
        raise Unbuilt("no finite output above zero")
    return found


def gradients(model: nn.Module, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    """Those of one loss."""
    model.zero_grad()
    loss().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def apart(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """The largest difference over the largest entry."""
    if found.keys() != wanted.keys():
        return float("inf")
    most = max((g.abs().max().item() for g in wanted.values()), default=0.0)
    return max(((found[n] - g).abs().max().item() for n, g in wanted.items()), default=0.0) / max(most, 1e-30)


def attached(model: nn.Module, method: str, **axes: Any) -> Any:
    """The method at its default targets, convolutions where there is no linear layer."""
    try:
        recipe = rw.recipe(method, rank=4, **axes)
    except rw.errors.IncompatibleAxes:  # it has no rank
        recipe = rw.recipe(method, **axes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # layers too narrow for the rank
        try:
            return rw.attach(model, recipe)
        except rw.errors.TargetError:
            return rw.attach(model, recipe.with_(sites=rw.Sites("all-conv")))


@torch.no_grad()
def moved(adapter: Any) -> None:
    """Another value for every trained factor."""
    draw = torch.Generator().manual_seed(1)
    for p in adapter.parameters():
        p += torch.randn(p.shape, generator=draw) / 10


def problems(base: Any, given: Mapping[str, Tensor], method: str, cast: bool = False) -> list[str]:
    """What does not hold for a method on a model; ``cast``: trained under autocast to bfloat16."""
    found, model, before = [], copy.deepcopy(base), output(base, given)
    adapter = attached(model, method)
    started = output(model, given)
    moved(adapter)
    after = output(model, given)
    effect = (after - before).abs().max()
    if effect < 1e-3 * before.abs().max():
        found.append("has next to no effect")

    def far(one: Tensor, other: Tensor) -> bool:
        return bool((one - other).abs().max() > 0.02 * effect)

    if far(started, before):
        found.append("does not start as the base")

    def loss() -> Tensor:  # the squares of a normalised output would sum to a constant
        y = forward(model.train(), given)
        return y @ torch.randn(y.shape, generator=torch.Generator().manual_seed(2))

    kept = None
    with torch.autocast("cpu", torch.bfloat16, enabled=cast):
        if base.supports_gradient_checkpointing:  # at first, as in a run: what layers learn at a call comes later
            model.gradient_checkpointing_enable({"use_reentrant": False})
            kept = gradients(model, loss)
            model.gradient_checkpointing_disable()
        plain = gradients(model, loss)
    if not plain:
        found.append("has no gradient")
    if kept is not None and (off := apart(kept, plain)) > (0.1 if cast else 1e-3):
        found.append(f"gradients differ by {off:.0e} under checkpointing")
    with TemporaryDirectory() as folder, silent():
        adapter.save(folder)
        other = copy.deepcopy(base)
        rw.load(other, folder)
    if far(output(other, given), after):
        found.append("reloads to another function")
    rw.merge(model)
    if far(output(model, given), after):
        found.append("merges to another function")
    return found


def routing_problems(base: Any, given: Mapping[str, Tensor], method: str) -> list[str]:
    """Whether a row under an adapter beside one without any is another than alone."""
    model = copy.deepcopy(base)
    before = by_row(model, given)
    adapter = attached(model, method)
    moved(adapter)
    after = by_row(model, given)
    with rw.route(model, [adapter.name, None]):
        routed = by_row(model, given)
    wanted, far = [torch.stack([one[0], none[1]]) for one, none in zip(after, before, strict=True)], 0.0
    for got, want, none in zip(routed, wanted, before, strict=True):
        far = max(far, ((got - want).abs().max() / (want - none).abs().max().clamp_min(1e-6)).item())
    if not routed:
        raise Unbuilt("no output has rows")
    return [f"a routed row differs by {far:.0e} of the effect"] if far > 0.02 else []


@torch.no_grad()
def by_row(model: Any, given: Mapping[str, Tensor]) -> list[Tensor]:
    """What the model returns in evaluation mode, where it has an entry a row of the batch."""
    return [v.clone() for v in returned(model.eval(), given) if len(v) == 2]


def language_problems(model: Any, given: Mapping[str, Tensor]) -> list[str]:
    """Whether a language model's loss in chunks is another than its own."""
    given = {**given, "labels": [*given.values()][-1].clone()}
    moved(attached(model, "lora", sites=rw.Sites("all-linear", tied="untie")))
    values: list[Tensor] = []

    def loss() -> Tensor:
        values.append(forward_loss(model, given))
        return values[-1]

    plain = gradients(model, loss)
    before, losses.CHUNK_BYTES = losses.CHUNK_BYTES, 2048  # four tokens
    try:
        with deferred_logits(model, lambda _: None):
            chunked = gradients(model, loss)
    finally:
        losses.CHUNK_BYTES = before
    off = abs(values[1].item() / values[0].item() - 1), apart(chunked, plain)
    return [f"loss or gradients differ by {max(off):.0e} in chunks"] if max(off) > 1e-4 else []


def forward_loss(model: Any, given: Mapping[str, Tensor]) -> Tensor:
    """The model's own loss."""
    transformers.set_seed(0)
    return model(**given).loss


def names_of(kind: str) -> list[str]:
    """Architectures that have a head of this kind."""
    return sorted(getattr(modeling_auto, f"MODEL_FOR_{kind}_MAPPING_NAMES"))


def tried(what: str, check: Callable[[], list[str]], counts: Counter[str]) -> None:
    """Count and print the outcome of one check."""
    try:
        with limited():
            found = check()
    except RankwiseError as error:
        counts["refused"] += 1
        return print(f"{what}: refused, {str(error)[:200]}", flush=True)
    except Exception as error:  # one model must not end the survey: printed, counted apart, never as held
        counts["failed"] += 1
        return print(f"{what}: {type(error).__name__}, {str(error)[:200]}", flush=True)
    counts["held" if not found else "PROBLEM"] += 1
    if found:
        print(f"{what}: PROBLEM, {'; '.join(found)}", flush=True)
    return None


def main() -> None:
    """Print what does not hold, and the counts."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zoo", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("methods", nargs="*", default=["lora", "dora"])
    parser.add_argument("--only", nargs="*", help="architectures, by transformers' model_type")
    one = parser.add_mutually_exclusive_group()
    one.add_argument("--language", action="store_true", help="losses of language models instead")
    one.add_argument("--route", action="store_true", help="a batch with the adapter on one of its two rows instead")
    one.add_argument("--autocast", action="store_true", help="train in bfloat16's autocast")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    counts: Counter[str] = Counter()
    for kind, auto in LANGUAGE.items() if given.language else [("", transformers.AutoModel)]:
        every = names_of(kind) if kind else sorted(transformers.CONFIG_MAPPING)
        for name in [n for n in every if not given.only or n in given.only]:
            try:
                model, sample = built(name, auto)
            except Unbuilt as error:
                counts["no tiny model"] += 1
                if given.only:
                    print(f"{name}: {str(error)[:200]}")
                continue
            counts["models"] += 1
            if given.language:
                tried(f"{name} {kind}", partial(language_problems, model, sample), counts)
                continue
            for method in given.methods:
                check = partial(problems, model, sample, method, given.autocast)
                if given.route:
                    check = partial(routing_problems, model, sample, method)
                tried(f"{name} {method}", check, counts)
    print(", ".join(f"{what}: {n}" for what, n in counts.items()))


if __name__ == "__main__":
    main()
