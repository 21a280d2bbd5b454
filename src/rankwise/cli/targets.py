"""``rankwise targets``."""

from dataclasses import asdict

from rankwise.cli import common


def targets(
    model: common.ModelArg,
    method: common.Method = None,
    structure: common.Structure = None,
    rank: common.Rank = None,
    option: common.Options = None,
    target: common.Target = None,
    as_json: common.Json = False,
) -> None:
    """Show what patterns match on a model, without loading its weights."""
    import torch
    from transformers import AutoModelForCausalLM

    import rankwise as rw
    from rankwise.hf.method import compose
    from rankwise.hf.models import config_of

    recipe = compose(method, {"structure": structure}, rank=rank, options=common.pairs(option), targets=target or ())
    with torch.device("meta"):
        report = rw.targets(AutoModelForCausalLM.from_config(config_of(model)), recipe)
    common.show(as_json, asdict(report), str(report))
