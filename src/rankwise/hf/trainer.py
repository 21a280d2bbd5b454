"""transformers' Trainer and a mixin for TRL's: they train, save and resume adapters alone."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import torch
import transformers
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_utils import rotate_checkpoints

from rankwise.attach import Adapter, adapters
from rankwise.errors import ModelTypeError, SaveError, TrainingError
from rankwise.hf import checkpoint
from rankwise.hf.references import reference
from rankwise.hf.watch import Watch, active, first_wrong, last_good, trained
from rankwise.ranks import Constant, carry_out, scores

if TYPE_CHECKING:
    _Base = transformers.Trainer
else:
    _Base = object

# settings of transformers' arguments that the recipe's solver decides
_OF_SOLVER = ("optim", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")


def _given(args: Any, name: str) -> bool:
    """Whether an argument differs from the default of its class."""
    default = next(f.default for f in dataclasses.fields(args) if f.name == name)
    return getattr(args, name) != default


# -- before transformers sees the model -------------------------------------------------------


def _check_model(model: Any, trainer: type) -> list[Adapter]:
    """The adapters to train, on a model that can be trained and saved this way."""
    if not isinstance(model, nn.Module):
        raise ModelTypeError(
            f"A trainer of rankwise takes the model itself, with an adapter attached; found "
            f"{type(model).__name__}. Load it, then rw.attach(model, recipe)."
        )
    chosen = trained(model)
    ours = {id(p) for a in adapters(model).values() for _, p in a.named_parameters()}
    loose = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in ours]
    if loose:
        raise TrainingError(
            f"Checkpoints hold adapters alone, so the base is frozen; {len(loose)} of its "
            f"parameters would be trained and lost ({loose[0]} ...). Freeze them, or make them "
            f"part of the adapter: Sites(train={loose[0]!r})."
        )
    if any(c.__module__.split(".")[0] == "trl" for c in trainer.__mro__):
        head = getattr(model, "get_output_embeddings", lambda: None)()
        modules = dict(model.named_modules())
        for adapter in active(model):
            for placement in adapter.placements:
                if any(modules[path] is head for path, _, _ in placement.carriers):
                    raise TrainingError(
                        f"TRL multiplies by the output head's weight itself, so an adapter there "
                        f"is never trained; {placement.site.name} has one. Leave it out "
                        f"(Sites(exclude=...)), or train with rw.hf.Trainer."
                    )
    return chosen


@contextmanager
def _admitted(model: Any, chosen: list[Adapter]) -> Iterator[None]:
    """Pass the guard against quantised bases, and keep the factors as they are.

    transformers 5.23 knows no adapter but PEFT's, and TRL 1.16 rounds what is trainable on a
    quantised base to bfloat16.
    """
    before = {p: p.detach().clone() for adapter in chosen for p in adapter.parameters()}
    quantised = getattr(model, "is_quantized", False)
    if quantised:
        model._hf_peft_config_loaded = True
    try:
        yield
    finally:
        if quantised:
            model._hf_peft_config_loaded = False
        for parameter, value in before.items():
            if parameter.dtype != value.dtype:
                parameter.data = value.to(parameter.device)


# -- the trainer ------------------------------------------------------------------------------


class AdapterMixin(_Base):
    """Goes before a trainer of transformers or TRL and makes it a trainer of adapters.

    It trains the active adapters of the model, with the recipe's solver, penalties and rank plan,
    at one learning rate: ``lr``, else that of the arguments where it is not their class's default,
    else the recipe's. The rate of every group is printed. Checkpoints hold the adapter and the
    optimizer, never the base, and are whole or absent; resuming is bit-exact. Where a TRL trainer
    wants a reference policy and none is given, it is the same model with the trained adapters off.

    Args:
        model: with an attached adapter; any dtype, quantised or not.
        args: of the trainer.
        lr: the learning rate, None to leave it to the arguments or the recipe.
        **kwargs: of the trainer, by name.

    Examples:
        ``class SFT(rw.hf.AdapterMixin, trl.SFTTrainer): pass``

    Raises:
        AttachError: nothing is attached.
        TrainingError: nothing to train, a base that is not frozen, an adapter on the output head
            under TRL, or arguments that contradict the recipe.
    """

    def __init__(self, model: Any = None, args: Any = None, *, lr: float | None = None, **kwargs: Any) -> None:
        self._chosen = _check_model(model, type(self))
        self._lr = lr
        self._batch: tuple[Any, Any] | None = None
        self._elsewhere: str | None = None
        wanted = inspect.signature(super().__init__).parameters
        kept = [a.name for a in active(model) if a not in self._chosen]
        if getattr(args, "sync_ref_model", False):
            raise TrainingError(
                "The reference shares the policy's weights with the adapters off, so there is "
                "nothing to synchronise. Set sync_ref_model=False."
            )
        if "ref_model" in wanted and kwargs.get("ref_model") is None:
            kwargs["ref_model"] = reference(model, kept)
        online = "reward_funcs" in wanted
        beta = getattr(args, "beta", 0.0) if online else 0.0
        if beta:
            args.beta = 0.0  # GRPO and RLOO load a second model otherwise, and take no ref_model
        try:
            with _admitted(model, self._chosen):
                super().__init__(model=model, args=args, **kwargs)
        finally:
            if beta:
                args.beta = beta
        if beta:
            policy = self.accelerator.unwrap_model(self.model)
            self.beta: float = beta
            self.ref_model: Any = self.accelerator.prepare_model(reference(policy, kept), evaluation_mode=True)
        if self.optimizer is None:
            self._check_arguments()
        self._journal = checkpoint.Journal(self)
        for callback in (Watch(patient=online), _Plans(self._chosen), self._journal):
            self.add_callback(callback)

    # -- one learning rate --------------------------------------------------------------------

    def _check_arguments(self) -> None:
        """Refuse what would silently be ignored."""
        ignored = [name for name in _OF_SOLVER if _given(self.args, name)]
        if ignored:
            raise TrainingError(
                f"The recipe's solver decides these, so the arguments leave them alone; found "
                f"{', '.join(f'{n}={getattr(self.args, n)}' for n in ignored)}. Say it in the "
                f"recipe: recipe.with_(solver=rankwise.solvers.AdamW(weight_decay=...))."
            )
        recipes = [adapter.recipe for adapter in self._chosen]
        if any(recipe.solver != recipes[0].solver for recipe in recipes):
            raise TrainingError(
                "Adapters that are trained together share a solver; found "
                f"{', '.join(repr(r.solver) for r in recipes)}. Train them one after the other."
            )
        self._rate()

    def _rate(self) -> tuple[float, str]:
        """The one learning rate, and who chose it."""
        if self._lr is not None:
            return self._lr, "lr="
        if _given(self.args, "learning_rate"):
            return self.args.learning_rate, "the arguments"
        rates = {adapter.recipe.lr for adapter in self._chosen}
        if len(rates) > 1:
            raise TrainingError(
                f"Adapters that are trained together share a learning rate; their recipes say "
                f"{sorted(rates)}. Give lr=."
            )
        return rates.pop(), f"the recipe {self._chosen[0].recipe.name}"

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The recipe's solver over the trained adapters; prints the rate of every group."""
        if self.optimizer is None:
            lr, chooser = self._rate()
            sites = [site for adapter in self._chosen for site in adapter.sites.values()]
            self.optimizer = self._chosen[0].recipe.solver(sites, lr)
            groups = ", ".join(
                f"{group.get('name', i)} {group['lr']:.3g} ({sum(p.numel() for p in group['params']):,} parameters)"
                for i, group in enumerate(self.optimizer.param_groups)
            )
            if self.is_world_process_zero():
                print(f"rankwise: learning rate {lr:.3g} (from {chooser}): {groups}", file=sys.stderr)
        return self.optimizer

    # -- the loss -----------------------------------------------------------------------------

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The trainer's loss; while training, with the recipes' penalties."""
        adapted: Any = self.model
        training = adapted.training
        if training:
            self._batch = copy.copy(inputs), num_items_in_batch
        found = super().compute_loss(
            model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
        )
        if not training or not any(a.recipe.penalties for a in self._chosen):
            return found
        penalty = sum(a.penalty(self.state.global_step) for a in self._chosen)
        if self._scaled(num_items_in_batch):
            penalty = penalty / self.current_gradient_accumulation_steps
        if isinstance(found, tuple):
            return found[0] + penalty, *found[1:]
        return found + penalty

    def _scaled(self, num_items_in_batch: Any) -> bool:
        """Whether the loss is divided by the accumulation steps already (as in training_step)."""
        if self.loss_is_scaled_for_ga is not None:
            return self.loss_is_scaled_for_ga
        whole = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return bool(whole or self.compute_loss_func is not None)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """A step; stops where the loss is not finite, before it is applied.

        Raises:
            TrainingError: the loss is NaN or infinite; says at which step and site.
        """
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss).all():
            raise TrainingError(
                f"The loss became {loss.mean().item()} at step {self.state.global_step + 1}: "
                f"{first_wrong(self._chosen, self._again)}. This step was not applied. "
                f"{last_good(self.args)} Lower the learning rate, or look at the batch."
            )
        return loss

    def _again(self) -> Any:
        assert self._batch is not None
        inputs, items = self._batch
        model: Any = self.model_wrapped
        with self.compute_loss_context_manager():
            return super().compute_loss(model, inputs, num_items_in_batch=items)

    # -- files --------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the trained adapters and the arguments; outside of checkpoints the tokenizer too.

        Every rank calls it.

        Raises:
            TrainingError: a factor is not finite.
            SaveError: the disk is full or not writable.
        """
        folder = Path(output_dir or str(self.args.output_dir))
        checkpoint.save(self._chosen, folder)
        if self.args.should_save:
            (folder / "training_args.json").write_text(self.args.to_json_string() + "\n")
            if not _internal_call:
                collator = getattr(self.data_collator, "tokenizer", None)
                tokenizer: Any = self.processing_class or collator
                if tokenizer is not None:
                    tokenizer.save_pretrained(folder)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        self.save_model(output_dir, _internal_call=True)

    def _get_output_dir(self, trial: Any) -> str:
        return self._elsewhere or super()._get_output_dir(trial)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._elsewhere is None:  # a folder that is about to be moved is not uploaded
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        run = Path(self._get_output_dir(trial))
        final = run / f"checkpoint-{self.state.global_step}"

        def write(folder: Path) -> None:
            self._elsewhere = str(folder.parent)
            former = self.state.best_model_checkpoint
            try:
                super(AdapterMixin, self)._save_checkpoint(model, trial)
            except RuntimeError as error:  # what torch.save raises where the disk is full
                if "PytorchStreamWriter" in str(error) or "enforce fail" in str(error):
                    raise SaveError(str(error)) from error
                raise
            finally:
                self._elsewhere = None
            best = run / f"checkpoint-{self.state.best_global_step}"
            known = self.state.best_global_step and (best == final or best.exists())
            self.state.best_model_checkpoint = str(best) if known else former
            if self.args.should_save:
                self.state.save_to_json(str(folder / "trainer_state.json"))
            name = f"progress-{self.args.process_index}.json"
            (folder / name).write_text(json.dumps(checkpoint.progress(self), default=float))

        first, wait = self.args.should_save, self.accelerator.wait_for_everyone
        checkpoint.whole_folder(final, write, first, wait)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))
        if first:
            rotate_checkpoints(
                output_dir=str(run),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        checkpoint.restore(self._chosen, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        checkpoint.restore(self._chosen, str(self.state.best_model_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            file = Path(checkpoint) / f"progress-{self.args.process_index}.json"
            self._journal.resumed = json.loads(file.read_text()) if file.exists() else None

    def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Any:
        # TRL 1.16 caches by the weights' hash alone, so that a run with the adapters on (its own
        # default) and one with them off would share values
        given = getattr(self, "_precompute_model_hash", None) or ""
        if not given.endswith(":rankwise"):
            self._precompute_model_hash = given + ":rankwise"
        return super()._precompute_ref_logps(*args, **kwargs)  # type: ignore[misc]


@final
class Trainer(AdapterMixin, transformers.Trainer):
    """transformers' Trainer for adapters; see :class:`AdapterMixin`.

    Examples:
        ``rw.hf.Trainer(model, args, train_dataset=rows).train()``
    """


@final
class _Plans(TrainerCallback):
    """Carries out the recipes' rank plans after each optimizer step."""

    def __init__(self, chosen: list[Adapter]) -> None:
        self.changing = [a for a in chosen if not isinstance(a.recipe.ranks, Constant)]

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask each recipe for a plan; gradients are still there, so scores can be computed."""
        if getattr(kwargs.get("optimizer"), "step_was_skipped", False):
            return
        for adapter in self.changing:
            sites = list(adapter.sites.values())
            plan = adapter.recipe.ranks.plan(state.global_step + 1, scores(sites))
            if plan is not None:
                carry_out(sites, plan)
