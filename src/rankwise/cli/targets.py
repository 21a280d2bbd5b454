"""``rankwise targets``."""

from __future__ import annotations

from dataclasses import asdict

from rankwise.cli import common


def targets(
    model: common.ModelArg,
    method: common.Method = None,
    structure: common.Structure = None,
    rank: common.Rank = None,
    option: common.Options = None,
    target: common.Targets = None,
    as_json: common.JsonFlag = False,
) -> None:
    """Show what patterns match on a model, without loading its weights."""
    common.quiet()
    import torch
    from transformers import AutoModelForCausalLM

    from rankwise.attach import targets as matched
    from rankwise.hf.method import compose
    from rankwise.hf.models import config_of

    recipe = compose(
        method, {"structure": structure}, rank=rank, options=common.pairs(option or []), targets=target or ()
    )
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config_of(model))
    report = matched(empty, recipe)
    if as_json:
        common.print_json(asdict(report))
        return
    rows = [(r.pattern, f"{r.count:,}", f"{r.parameters:,}", ", ".join(r.examples)) for r in report.rows]
    console = common.console()
    console.print(common.table(("pattern", "sites", "parameters", "such as"), rows))
    console.print(
        f"{recipe.name}: {report.sites} sites, {report.parameters:,} trainable parameters, "
        f"{common.size(4 * report.parameters)} on disk in float32",
        soft_wrap=True,
    )
