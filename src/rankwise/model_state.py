"""The model around the adapters: may it be adapted, and what must step aside while it is."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from rankwise.candidates import base_modules, output_head
from rankwise.errors import AttachError, ModelTypeError
from rankwise.graft import bound_to_class
from rankwise.host import kind_of


def check_model(model: nn.Module) -> None:
    """Refuse a model in a state in which a graft would be wrong or lost.

    Raises:
        ModelTypeError: not a module, a PeftModel, or a compiled wrapper.
        AttachError: sharded, emptied by ZeRO-3, or on the meta device.
    """
    if not isinstance(model, nn.Module):
        raise ModelTypeError(f"attach takes a torch.nn.Module; found {type(model).__name__}.")
    for path, module in model.named_modules():
        here, name = path or "the model", type(module).__name__
        if any(c.__module__.split(".")[0] == "peft" for c in type(module).__mro__):
            raise ModelTypeError(
                f"attach takes the plain model; {here} is a {name} of PEFT, which wraps layers. Use model.unload() to "
                f"get the base, and rw.formats.peft to read its adapter."
            )
        if hasattr(module, "_orig_mod"):
            raise ModelTypeError(
                f"attach before torch.compile, which has traced the plain module and renamed its parameters; {here} is "
                f"compiled already. Attach to its _orig_mod, then compile."
            )
        if isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel):
            raise AttachError(
                f"attach before {name}, which has gathered its parameters already and would not synchronise new ones. "
                f"Attach to its .module, then wrap."
            )
        if name.startswith(("FSDP", "FullyShardedDataParallel")) or hasattr(module, "_get_fsdp_state"):
            raise AttachError(
                f"attach before fully_shard: {here} is sharded already, and factors added now would not be. Attach "
                f"first, then shard."
            )
        own = "forward" in module.__dict__ and not bound_to_class(module)
        if own and "_old_forward" not in module.__dict__ and kind_of(module):
            raise AttachError(
                f"{path} has a forward of its own on the instance, which would bypass the adapter. Remove it (del "
                f"module.forward), attach, and put it back."
            )
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_id"):
            raise AttachError(
                "attach before DeepSpeed ZeRO-3 partitions the model: its parameters are empty. Attach first, or use "
                "FSDP2 (torch.distributed.fsdp.fully_shard)."
            )
        if parameter.device.type == "meta":
            raise AttachError(f"attach needs real weights; {name} is on the meta device. Load the model first.")


def freeze_base(model: nn.Module) -> None:
    """Stop gradients to the base's parameters."""
    for module in base_modules(model).values():
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(False)


def untie(model: Any) -> None:
    """Give the output head a copy of its own of the embedding's weight; the config says so."""
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    head = output_head(model)
    if embedding is not None and head is not None and head.weight is embedding.weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), head.weight.requires_grad)
        model.config.tie_word_embeddings = False


@contextmanager
def untied(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Untie the head if it is wanted, and tie it again where an error is raised inside."""
    head: Any = output_head(model)
    config: Any = getattr(model, "config", None)
    former = (getattr(head, "weight", None), getattr(config, "tie_word_embeddings", None))
    if wanted:
        untie(model)
    try:
        yield
    except BaseException:
        if head is not None and head.weight is not former[0]:
            head.weight = former[0]
            config.tie_word_embeddings = former[1]
        raise


def fast_paths(model: nn.Module, closed: bool) -> None:
    """Close or open PyTorch's fused transformer layers, which read their parts' weights themselves."""
    names = {nn.TransformerEncoderLayer: "activation_relu_or_gelu", nn.TransformerEncoder: "use_nested_tensor"}
    for module in model.modules():
        name = next((n for kind, n in names.items() if isinstance(module, kind)), None)
        if name is not None and closed:
            module.__dict__.setdefault("_fast_path", getattr(module, name))
            setattr(module, name, 0)
        elif name is not None and "_fast_path" in module.__dict__:
            setattr(module, name, module.__dict__.pop("_fast_path"))


def running_statistics(model: nn.Module, held: bool) -> None:
    """Hold what norms with frozen parameters remember of earlier batches, in training mode too, or no longer.

    No adapter saves it: where it moves, a saved adapter meets another base on reload.
    """
    for module in model.modules():
        if isinstance(module, _NormBase) and module.running_mean is not None:
            for handle in [key for key, hook in module._forward_pre_hooks.items() if hook is _hold]:
                del module._forward_pre_hooks[handle]
            if held:
                module.register_forward_pre_hook(_hold)


def _hold(norm: nn.Module, args: Any) -> None:
    if norm.training and not any(p.requires_grad for p in norm.parameters(recurse=False)):
        norm.eval()


def hide_from_checkpoints(model: nn.Module) -> None:
    """Have ``save_pretrained`` write the base alone."""
    if not hasattr(type(model), "_keys_to_ignore_on_save"):
        return
    saving: Any = model
    own: Any = getattr(type(model), "_keys_to_ignore_on_save", None) or ()
    ours = {n for n, _ in model.named_parameters(remove_duplicate=False) if ".adapters." in f".{n}"}
    saving._keys_to_ignore_on_save = type(own)([*own, *ours]) if own else ours or None
