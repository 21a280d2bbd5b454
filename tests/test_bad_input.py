"""One clear error for each mistake, before any work is lost, and the model as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import rankwise as rw
from rankwise.errors import (
    AttachError,
    IncompatibleAxes,
    ModelTypeError,
    NotMergeable,
    RankError,
    TargetError,
    TiedWeights,
    UnknownName,
)
from rankwise.host import Site
from rankwise.inits import Init, Principal
from rankwise.structures import Added, HiRA, LoRA, Magnitude, Rows
from tiny_models import frozen_look, llama, plain, same_look, shake, tokens


def fails(error: type[Exception], words: str, model: Any, recipe: rw.Recipe, name: str = "default") -> str:
    """Attaching raises this error with these words; nothing has changed. Returns the message."""
    look = frozen_look(model) if isinstance(model, nn.Module) else None
    with pytest.raises(error) as caught:
        rw.attach(model, recipe, name)
    for word in words.split("|"):
        assert word in str(caught.value), str(caught.value)
    if look is not None:
        assert same_look(look, frozen_look(model))
    return str(caught.value)


def lora(**axes: Any) -> rw.Recipe:
    return rw.recipe("lora", **{"rank": 2, **axes})


# -- ranks and axes ---------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "dora", "pissa", "loha", "lokr", "hira", "svd"])
@pytest.mark.parametrize("rank", [0, -1, 2.5, "4", True])
def test_ranks_that_are_none(method: str, rank: Any) -> None:
    fails(RankError, "whole number between 1 and", plain(), rw.recipe(method, rank=rank))


@pytest.mark.parametrize("method", ["lora", "dora", "pissa", "loha", "hira"])
def test_a_rank_above_the_layer(method: str) -> None:
    text = fails(RankError, "here 16|rank=17|0 (24 x 16)", plain(), rw.recipe(method, rank=17))
    assert "overrides" in text


@pytest.mark.parametrize("block", [0, -8, 2.0])
def test_a_block_that_is_none(block: Any) -> None:
    fails(RankError, "whole number between 1 and", plain(), rw.recipe("oft", block=block))


# what a type checker would refuse is given on purpose: not everybody runs one
AXES: dict[str, tuple[Callable[[], Any], str]] = {
    "an init for another structure": (lambda: rw.Recipe(LoRA(4), init=Principal()), "trait 'anchored'|Anchored(...)"),
    "a solver of two sides": (lambda: rw.recipe("oft", solver=rw.recipe("lora_plus").solver), "two_sided|LoRA"),
    "dropout without a branch": (lambda: rw.recipe("oft", dropout=0.1), "dropout=0.0"),
    "dropout of one": (lambda: lora(dropout=1.0), "[0, 1)|1.0"),
    "an unknown base": (lambda: lora(base="q2"), "nf4|q2"),
    "two magnitudes": (lambda: Magnitude(Magnitude(LoRA(2))), "Keep one"),
    "an unknown option": (lambda: rw.recipe("lora", ranks_=3), "rank, alpha|ranks_"),
    "an unknown scale": (lambda: LoRA(2, 2, "alpha"), "alpha/sqrt(r)"),
    "a structure by name": (lambda: rw.Recipe("lora"), 'Structure|rw.recipe("lora")'),  # type: ignore[arg-type]
    "an init by name": (lambda: lora(init="pissa"), "Init|'pissa'"),
    "sites as a list": (lambda: lora(sites=["q_proj"]), "Sites(targets="),
    "an unknown tie": (lambda: rw.Sites(tied="yes"), "untie|yes"),  # type: ignore[arg-type]
    "nowhere": (lambda: rw.Sites(targets=()), "somewhere to go"),
    "one layer": (lambda: rw.Sites(layers=3), "layers=(3,)"),  # type: ignore[arg-type]
    "an unknown match": (lambda: rw.Target("x", "prefix"), "suffix|prefix"),  # type: ignore[arg-type]
    "an unknown role": (lambda: rw.Target("attn", "role"), "attention|attn"),
    "a broken regex": (lambda: rw.Target("(", "regex"), "regular expression"),
    "a target that is a number": (lambda: rw.Sites(targets=3), "pattern|3"),
}


@pytest.mark.parametrize("case", AXES)
def test_axes_that_clash_are_refused_when_written(case: str) -> None:
    make, words = AXES[case]
    with pytest.raises(IncompatibleAxes) as caught:
        make()
    for word in words.split("|"):
        assert word in str(caught.value), str(caught.value)


def test_an_unknown_method_names_its_neighbours() -> None:
    with pytest.raises(UnknownName, match="dora"):
        rw.recipe("dorra")


# -- targets ----------------------------------------------------------------------------------


def test_patterns_that_match_nothing_name_their_neighbours() -> None:
    model = llama()
    text = fails(TargetError, "q_prj|q_proj", model, lora(sites=rw.Sites("q_prj")))
    assert "rw.targets(model" in text and "optional=True" in text
    fails(TargetError, "bogus", model, lora(sites=rw.Sites(exclude="bogus")))
    fails(TargetError, "bogus", model, lora(sites=rw.Sites(overrides={"bogus": {"rank": 1}})))
    fails(TargetError, "scor", model, lora(sites=rw.Sites(train="scor")))
    fails(TargetError, "wte|embed", model, lora(sites=rw.Sites(tokens={"wte": [3]})))
    fails(TargetError, "no block [7]|[0, 1]", model, lora(sites=rw.Sites(layers=[0, 7])))
    fails(TargetError, "[-1]", model, lora(sites=rw.Sites(layers=[-1])))
    fails(TargetError, "leave nothing", model, lora(sites=rw.Sites("q_proj", exclude="*")))


def test_overrides_that_do_not_fit() -> None:
    model = llama()
    fails(IncompatibleAxes, "rnk|rank", model, lora(sites=rw.Sites(overrides={"q_proj": {"rnk": 1}})))
    fails(RankError, "rank=99|q_proj", model, lora(sites=rw.Sites(overrides={"q_proj": {"rank": 99}})))


def test_tokens_that_are_not_there() -> None:
    model = llama()
    for ids in ([64], [-1], []):
        fails(TargetError, "64 rows", model, lora(sites=rw.Sites(tokens={"embed_tokens": ids})))


def test_a_target_that_is_also_trained_whole() -> None:
    sites = rw.Sites("lm_head", train="lm_head")
    fails(TargetError, "exclude it from one", llama(), lora(sites=sites))


def test_integer_weights_cannot_be_trained_whole() -> None:
    model = plain()
    model[2].weight = nn.Parameter(torch.ones(16, 24, dtype=torch.int8), requires_grad=False)
    fails(TargetError, "int8", model, lora(sites=rw.Sites("0", train="2")))


def test_a_rank_for_a_rows_structure() -> None:
    fails(TargetError, "24 rows|30", plain(), rw.Recipe(Rows(LoRA(2), (("q", 0, 30),)), sites=rw.Sites("0")))


# -- the model's state --------------------------------------------------------------------


def test_twice_under_one_name() -> None:
    model = plain()
    rw.attach(model, lora())
    fails(AttachError, '"default" is attached already|another name', model, rw.recipe("dora", rank=2))
    rw.attach(model, lora(), "second")
    assert list(rw.adapters(model)) == ["default", "second"]


@pytest.mark.parametrize("name", ["", "a b", "a.b", "../x", "forward", "active", "record", "1"])
def test_names_that_are_none(name: str) -> None:
    fails(AttachError, "plain identifier", plain(), lora(), name)


def test_not_a_model() -> None:
    for thing in (None, "model", lora()):
        fails(ModelTypeError, "torch.nn.Module", thing, lora())


def test_not_a_recipe() -> None:
    for thing in ("lora", None, {"rank": 8}):
        fails(AttachError, 'rw.recipe("lora", rank=16)', plain(), thing)


def test_meta_weights() -> None:
    with torch.device("meta"):
        model = plain()
    with pytest.raises(AttachError, match="0.weight is on the meta device"):
        rw.attach(model, lora())
    assert type(model[0]) is nn.Linear


def test_a_compiled_model() -> None:
    model = plain()
    fails(ModelTypeError, "_orig_mod", torch.compile(model), lora())
    parts = nn.Sequential(torch.compile(nn.Linear(8, 8)), nn.Linear(8, 8))  # type: ignore[arg-type]
    fails(ModelTypeError, "0 is compiled|_orig_mod", parts, lora())


class _FSDPModule:
    def _get_fsdp_state(self) -> None: ...


def test_a_sharded_model() -> None:
    model = nn.Sequential(plain())
    inner: Any = model[0]
    inner.__class__ = type("FSDPSequential", (_FSDPModule, nn.Sequential), {})
    fails(AttachError, "before fully_shard: 0 is sharded", model, lora())


def test_zero_3() -> None:
    model = plain()
    model[0].weight.ds_id = 0  # type: ignore[attr-defined]
    fails(AttachError, "ZeRO-3", model, lora())


def test_data_parallel() -> None:
    fails(AttachError, "before DataParallel|.module", nn.DataParallel(plain()), lora())


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_peft_model() -> None:
    peft = pytest.importorskip("peft")
    inner = llama()
    model = peft.get_peft_model(inner, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    fails(ModelTypeError, "PEFT|unload()", model, lora())
    fails(ModelTypeError, "of PEFT", inner, lora())


def test_a_forward_on_the_instance() -> None:
    model = plain()
    layer = model[0]
    layer.forward = lambda x: nn.functional.linear(x, layer.weight, layer.bias)  # type: ignore[method-assign]
    fails(AttachError, "0 has a forward of its own|del module.forward", model, lora())
    del layer.forward
    rw.attach(model, lora())


def test_a_forward_that_is_the_class_own_is_no_obstacle() -> None:
    # accelerate leaves the bound forward on the instance when its hook is taken off
    model = plain()
    model[0].forward = model[0].forward  # type: ignore[method-assign]
    adapter = rw.attach(model, lora())
    x = torch.randn(3, 16)
    before = model(x)
    shake(adapter)
    assert not torch.equal(model(x), before)


@dataclass(frozen=True)
class _Breaks(Init):
    """An init that fails at the second site, and may ask for data first."""

    asks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "needs", frozenset(self.asks))

    def __call__(self, site: Site, *_: Any) -> dict[str, Tensor]:
        if site.name == "2":
            raise RuntimeError("half-way")
        return {"a": torch.zeros(2, site.cols), "b": torch.zeros(site.rows, 2)}


def test_statistics_that_were_not_collected() -> None:
    fails(AttachError, "_Breaks reads statistics (inputs)|stats=", plain(), lora(init=_Breaks(("inputs",))))


def test_an_init_that_fails_half_way() -> None:
    fails(RuntimeError, "half-way", plain(), lora(init=_Breaks()))


def test_names_that_are_not_attached() -> None:
    model = plain()
    with pytest.raises(AttachError, match="No adapter is attached"):
        rw.set_active(model, "default")
    with pytest.raises(AttachError, match="No adapter is attached"):
        rw.merge(model)
    rw.attach(model, lora())
    for call in (rw.set_active, rw.merge):
        with pytest.raises(UnknownName, match="'other'.*attached: \\['default'\\]"):
            call(model, "other")
    with pytest.raises(UnknownName, match="'other'"):
        rw.route(model, ["other", None])
    assert list(rw.adapters(model)) == ["default"]


def test_merging_nan_is_refused() -> None:
    model = plain()
    adapter = rw.attach(model, lora())
    with torch.no_grad():
        adapter["2"]["b"][0, 0] = float("nan")
    look = frozen_look(model)
    for merge in (rw.merge, lambda m: rw.merged(m).__enter__()):
        with pytest.raises(NotMergeable, match="NaN or infinity at 2"):
            merge(model)
    after = frozen_look(model)
    for one in (look, after):
        one["values"].pop("2.adapters.default.layer.b")
    assert same_look(look, after)


def test_an_adapter_outlives_its_detachment() -> None:
    model = plain()
    look = frozen_look(model)
    adapter = rw.attach(model, lora(), freeze=False)
    adapter.detach()
    assert same_look(look, frozen_look(model)) and not rw.adapters(model)
    adapter.detach()  # a second time is harmless
    rw.attach(model, lora())


# -- tied embeddings --------------------------------------------------------------------------

EMBEDDING = rw.Sites(["embed_tokens", "lm_head"])


def tied() -> Any:
    return llama(tie_word_embeddings=True)


@pytest.mark.parametrize("where", ["embed_tokens", "lm_head", "embedding", "head"])
def test_tied_embeddings_ask_for_a_choice(where: str) -> None:
    fails(TiedWeights, '"tie"|"untie"', tied(), lora(sites=rw.Sites(where)))


def test_tying_trains_one_adapter_at_both_ends() -> None:
    model = tied()
    adapter = rw.attach(model, lora(sites=rw.Sites("embed_tokens", tied="tie")))
    shake(adapter)
    dense = copy.deepcopy(tied())
    with torch.no_grad():
        structure = adapter.sites["model.embed_tokens"].structure
        assert isinstance(structure, Added)
        delta = structure.delta(adapter["model.embed_tokens"])
        dense.model.embed_tokens.weight += delta.dense().mT
        assert dense.lm_head.weight is dense.model.embed_tokens.weight
        assert torch.allclose(model(tokens()).logits, dense(tokens()).logits, atol=1e-5)
        rw.merge(model)
        assert torch.allclose(model(tokens()).logits, dense(tokens()).logits, atol=1e-5)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_untying_gives_the_head_its_own_weight(tmp_path: Path) -> None:
    model = tied()
    adapter = rw.attach(model, lora(sites=rw.Sites(["embed_tokens", "lm_head"], tied="untie")))
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings is False
    assert set(adapter) == {"model.embed_tokens", "lm_head"}
    shake(adapter)
    adapter.save(tmp_path / "adapter")
    with torch.no_grad():
        y = model(tokens()).logits
        other = tied()
        rw.load(other, tmp_path / "adapter")
        assert torch.equal(other(tokens()).logits, y)
        rw.merge(model)
        model.save_pretrained(tmp_path / "model")
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
        assert torch.allclose(again(tokens()).logits, y, atol=1e-5)
        assert again.lm_head.weight is not again.model.embed_tokens.weight


def test_untying_is_undone_where_attaching_fails(tmp_path: Path) -> None:
    model = tied()
    bad = lora(sites=rw.Sites(["embed_tokens", "bogus"], tied="untie"))
    fails(TargetError, "bogus", model, bad)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings is True


@pytest.mark.parametrize("tie", [False, True])
def test_the_base_saves_itself_without_adapter_keys(tie: bool, tmp_path: Path) -> None:
    model = llama(tie_word_embeddings=tie)
    with torch.no_grad():
        y = model(tokens()).logits
    sites = rw.Sites(["all-linear", "embed_tokens"], tied="tie")
    adapter = rw.attach(model, lora(sites=sites))
    shake(adapter)
    model.save_pretrained(tmp_path)
    found: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    again, info = found
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        assert torch.equal(again.eval()(tokens()).logits, y)


def test_hira_on_an_embedding_trains() -> None:
    model = llama()
    adapter = rw.attach(model, rw.Recipe(HiRA(2), sites=rw.Sites("embed_tokens")))
    shake(adapter)
    model(tokens()).logits.sum().backward()
    assert all(p.grad is not None for p in adapter.parameters())
