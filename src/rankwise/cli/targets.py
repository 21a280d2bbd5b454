"""``rankwise targets``."""

from dataclasses import asdict
from typing import Any

from rankwise.cli import common


@common.settings("method", "structure", "rank", "options", "target")
def targets(model: common.ModelArg, as_json: common.Json = False, **given: Any) -> None:
    """Show what patterns match on a model, without loading its weights."""
    import torch
    from transformers import AutoModelForCausalLM

    import rankwise as rw
    from rankwise.hf.method import recipe_of
    from rankwise.hf.models import config_of

    recipe = recipe_of(common.run_of(None, model=model, **given))
    with torch.device("meta"):
        report = rw.targets(AutoModelForCausalLM.from_config(config_of(model)), recipe)
    common.show(as_json, asdict(report), str(report))
