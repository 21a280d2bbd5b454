"""Where adapters go: every kind of pattern, what it means, and how the dry run shows it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import accelerate.hooks
import bitsandbytes
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

import rankwise as rw
from rankwise.errors import RankError, TargetError, WeightFormatError
from rankwise.structures import LoRA, Magnitude
from rankwise.testing import randomise
from tiny_models import llama, plain, shake, tokens

L = "model.layers"
ATTENTION = {f"self_attn.{x}_proj" for x in "qkvo"}
MLP = {f"mlp.{x}_proj" for x in ("gate", "up", "down")}


def lora(**sites: Any) -> rw.Recipe:
    return rw.recipe("lora", rank=2, sites=rw.Sites(**sites))


def names(model: nn.Module, **sites: Any) -> set[str]:
    """The adapted sites, by the dry run and by attaching, which must agree."""
    recipe = lora(**sites)
    report = rw.targets(model, recipe)
    adapter = rw.attach(model, recipe)
    assert report.sites == len(adapter)
    assert report.parameters == sum(p.numel() for p in adapter.parameters())
    assert sum(r.parameters for r in report.rows) == report.parameters
    found = set(adapter)
    adapter.detach()
    return found


def both(parts: set[str], layers: tuple[int, ...] = (0, 1)) -> set[str]:
    return {f"{L}.{i}.{p}" for i in layers for p in parts}


CASES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "default": ({}, both(ATTENTION | MLP)),
    "suffix": ({"targets": "q_proj"}, both({"self_attn.q_proj"})),
    "suffixes": ({"targets": ["q_proj", "mlp.up_proj"]}, both({"self_attn.q_proj", "mlp.up_proj"})),
    "a suffix ends at a dot": ({"targets": ["proj", "q_proj"]}, set()),
    "glob": ({"targets": "*.1.mlp.*"}, both(MLP, (1,))),
    "regex": ({"targets": re.compile(r".*\.0\..*[qk]_proj")}, both({"self_attn.q_proj", "self_attn.k_proj"}, (0,))),
    "regex with flags": ({"targets": re.compile(r".*Q_PROJ", re.I)}, both({"self_attn.q_proj"})),
    "class": ({"targets": nn.Linear}, both(ATTENTION | MLP) | {"lm_head"}),
    "role attention": ({"targets": "attention"}, both(ATTENTION)),
    "role mlp": ({"targets": "mlp"}, both(MLP)),
    "role head": ({"targets": "head"}, {"lm_head"}),
    "role embedding": ({"targets": "embedding"}, {"model.embed_tokens"}),
    "exclude": ({"exclude": ["mlp", "k_proj"]}, both(ATTENTION - {"self_attn.k_proj"})),
    "layers": ({"layers": [1]}, both(ATTENTION | MLP, (1,))),
    "layers leave out what is outside of blocks": (
        {"targets": ["all-linear", "lm_head"], "layers": [0]},
        both(ATTENTION | MLP, (0,)),
    ),
    "optional": ({"targets": ["q_proj", rw.Target("c_attn", optional=True)]}, both({"self_attn.q_proj"})),
    "whole names": ({"targets": f"{L}.0.mlp.up_proj"}, {f"{L}.0.mlp.up_proj"}),
}


@pytest.mark.parametrize("case", CASES)
def test_patterns(case: str) -> None:
    sites, expected = CASES[case]
    if not expected:
        with pytest.raises(TargetError, match='"proj" matches nothing'):
            rw.attach(llama(), lora(**sites))
        return
    assert names(llama(), **sites) == expected


def test_the_report_reads_well() -> None:
    sites = {
        "targets": ["attention", "up_proj", rw.Target("c_attn", optional=True)],
        "train": ["norm", "lm_head"],
        "tokens": {"embed_tokens": [1, 2]},
    }
    text = str(rw.targets(llama(), lora(**sites)))
    assert text == (
        "attention               8 sites            896 parameters  "
        "model.layers.0.self_attn.q_proj, model.layers.0.self_attn.k_proj, "
        "model.layers.0.self_attn.v_proj ...\n"
        "up_proj                 2 sites            384 parameters  "
        "model.layers.0.mlp.up_proj, model.layers.1.mlp.up_proj\n"
        "c_attn (optional)       0 sites              0 parameters\n"
        "train norm               1 site             32 parameters  model.norm.weight\n"
        "train lm_head            1 site          2,048 parameters  lm_head.weight\n"
        "tokens embed_tokens      1 site             64 parameters  model.embed_tokens\n"
        "13 sites, 3,424 trainable parameters"
    ), "\n" + text


def test_train_by_class_and_by_parameter() -> None:
    norm = transformers.models.llama.modeling_llama.LlamaRMSNorm
    report = rw.targets(llama(), lora(targets="q_proj", train=norm))
    assert [(r.count, r.parameters) for r in report.rows] == [(2, 256), (5, 160)]
    model = plain()
    found = names(model, targets="0", train=re.compile(r".*bias"))
    assert found == {"0", "0.bias", "2.bias"}


def test_overrides() -> None:
    sites = rw.Sites(
        overrides={"q_proj": {"rank": 1, "alpha": 8.0}, "*.0.mlp.*": Magnitude(LoRA(3)), "mlp": {"rank": 4}}
    )
    adapter = rw.attach(llama(), rw.recipe("dora", rank=2, sites=sites))
    at = {n: s.structure for n, s in adapter.sites.items()}
    assert at[f"{L}.0.self_attn.q_proj"] == Magnitude(LoRA(1, 8.0))
    assert at[f"{L}.0.self_attn.k_proj"] == Magnitude(LoRA(2, 2))
    assert at[f"{L}.0.mlp.up_proj"] == Magnitude(LoRA(3))  # the first match wins
    assert at[f"{L}.1.mlp.up_proj"] == Magnitude(LoRA(4, 2))
    assert adapter[f"{L}.1.mlp.up_proj"]["a"].shape == (4, 32)


def test_an_odd_layer_that_is_no_target_is_no_obstacle() -> None:
    model = plain()
    model.add_module("odd", bitsandbytes.nn.Linear4bit(16, 16))  # never quantised
    model.add_module("table", nn.Embedding(8, 16, max_norm=1.0))
    with pytest.raises(WeightFormatError, match="not quantised"):
        rw.attach(model, lora())
    with pytest.raises(TargetError, match="max_norm"):
        rw.attach(model, lora(targets=["0", "table"]))
    assert names(model, exclude="odd") == {"0", "2"}


def bert(labels: int = 3, seed: int = 1) -> Any:
    torch.manual_seed(1)
    config = transformers.BertConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_labels=labels,
    )
    model = transformers.BertForSequenceClassification(config)
    torch.manual_seed(seed)
    nn.init.normal_(model.classifier.weight)
    nn.init.normal_(model.classifier.bias)
    return model.eval()


def test_a_new_classification_head(tmp_path: Path) -> None:
    model = bert()
    sites = {"targets": ["query", "value"], "train": ["classifier", "pooler"]}
    adapter = rw.attach(model, lora(**sites))
    whole = {"classifier.weight", "classifier.bias"}
    whole |= {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}
    assert {n for n in adapter if "layer" not in n} == whole
    base = {n: p.detach().clone() for n, p in model.named_parameters() if ".adapters." not in n}
    optimizer = adapter.optimizer()
    model(tokens(), labels=torch.tensor([0, 2])).loss.backward()
    assert all(adapter[n]["value"].grad is not None for n in whole)
    optimizer.step()
    now = dict(model.named_parameters())
    assert all(torch.equal(now[n], p) for n, p in base.items())  # the base keeps its own
    with torch.no_grad():
        y = model(tokens()).logits
        with rw.disabled(model):
            assert torch.equal(model(tokens()).logits, bert()(tokens()).logits)
        adapter.save(tmp_path)
        other = bert(seed=9)  # a fresh base draws its head anew
        rw.load(other, tmp_path)
        assert torch.equal(other(tokens()).logits, y)
        rw.merge(model)
        assert torch.allclose(model(tokens()).logits, y, atol=1e-5)
    assert torch.allclose(model.classifier.bias, other.classifier.adapters.default.bias.value)


def test_biases_and_norms_trained_whole(tmp_path: Path) -> None:
    model = bert()
    sites = {"targets": "query", "train": ["LayerNorm", re.compile(r".*attention.*bias")]}
    adapter = rw.attach(model, lora(**sites))
    norms = {n for n in adapter if "LayerNorm" in n}
    assert len(norms) == 10 and all(adapter[n]["value"].shape == (32,) for n in norms)
    shake(adapter)
    model(tokens()).logits.sum().backward()
    assert all(adapter[n]["value"].grad is not None for n in norms)
    with torch.no_grad():
        y = model(tokens()).logits
        adapter.save(tmp_path)
        other = bert()
        rw.load(other, tmp_path)
        assert torch.equal(other(tokens()).logits, y)
        rw.merge(model)
        assert torch.allclose(model(tokens()).logits, y, atol=1e-5)


@pytest.mark.parametrize("more", [False, True], ids=["rows alone", "rows and LoRA"])
def test_new_tokens(more: bool, tmp_path: Path) -> None:
    def base(seed: int) -> Any:
        model = llama()
        torch.manual_seed(seed)
        model.resize_token_embeddings(68, mean_resizing=False)
        model.lm_head.weight.data[64:] = 0
        return model

    model, new = base(1), range(64, 68)
    targets = ["q_proj", "embed_tokens"] if more else "q_proj"
    adapter = rw.attach(model, lora(targets=targets, tokens={"embed_tokens": new}))
    x = torch.tensor([[3, 64, 5, 67], [66, 1, 2, 65]])
    optimizer = adapter.optimizer(lr=0.1)
    model(input_ids=x, labels=x).loss.backward()
    optimizer.step()
    held = load_file(adapter.save(tmp_path))
    tables = {n: t for n, t in held.items() if "embed_tokens" in n}
    key = "model.embed_tokens/" + ("second_rows" if more else "rows")
    assert tables[key].shape == (4, 32) and (len(tables) == 1 or more)
    other = base(2)
    assert not torch.equal(other.model.embed_tokens.weight, model.model.embed_tokens.weight)
    with torch.no_grad():
        rw.load(other, tmp_path)
        y = model(x).logits
        assert torch.equal(other(x).logits, y)
        old = tokens()
        if not more:
            fresh = llama()  # the old rows do not move
            assert torch.equal(model.model.embed_tokens(old), fresh.model.embed_tokens(old))
        rw.merge(model)
        assert torch.allclose(model(x).logits, y, atol=1e-5)
    small = llama()
    with pytest.raises(rw.errors.BaseMismatch, match="resize the embedding first"):
        rw.load(small, tmp_path)


class Shout(accelerate.hooks.ModelHook):
    """Counts its calls and doubles the output."""

    def __init__(self) -> None:
        self.calls = 0

    def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
        self.calls += 1
        return 2 * output


@pytest.mark.parametrize("first", ["hook", "adapter"])
def test_accelerate_hooks(first: str) -> None:
    model, hook, x = plain(), Shout(), torch.randn(3, 16)
    layer = model[2]
    base = model(x).detach()
    if first == "hook":
        accelerate.hooks.add_hook_to_module(layer, hook)
    adapter = rw.attach(model, lora())
    if first == "adapter":
        accelerate.hooks.add_hook_to_module(layer, hook)
    shake(adapter, 0.5)
    y = model(x)
    assert hook.calls == 1
    y.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in adapter.parameters())
    with rw.disabled(model):
        assert torch.allclose(model(x), 2 * base)
    accelerate.hooks.remove_hook_from_module(layer)
    assert torch.allclose(2 * model(x), y)
    adapter.detach()
    assert type(layer) is nn.Linear and torch.equal(model(x), base)
    shake(rw.attach(model, lora()), 0.5)
    assert not torch.allclose(model(x), base)


def test_a_hook_outlives_the_adapter() -> None:
    model, x = plain(), torch.randn(3, 16)
    base = model(x).detach()
    accelerate.hooks.add_hook_to_module(model[2], Shout())
    shake(rw.attach(model, lora()))
    rw.adapters(model)["default"].detach()
    assert torch.allclose(model(x), 2 * base)
    accelerate.hooks.remove_hook_from_module(model[2])
    assert torch.equal(model(x), base)


# -- what is a linear layer -----------------------------------------------------------------------


class Doubled(nn.Linear):
    """A linear layer with a forward of its own."""

    def forward(self, input) -> Any:
        return 2 * super().forward(input), input


class Padded(nn.Conv1d):
    def forward(self, input):
        return super().forward(nn.functional.pad(input, (2, 0)))


class Positions(nn.Embedding):
    def forward(self, input):
        return super().forward(torch.arange(input.shape[1]))


class Odd(nn.Module):
    """Layers whose classes compute more than their kind, tensors of three dims that are no experts."""

    def __init__(self):
        super().__init__()
        self.at, self.plain, self.own = Positions(5, 8), nn.Linear(8, 8), Doubled(8, 8)
        self.conv, self.padded = nn.utils.parametrizations.weight_norm(nn.Conv1d(8, 8, 1)), Padded(8, 8, 3)
        self.scale, self.gate = nn.Parameter(torch.rand(8, 1, 1)), nn.Linear(8, 1)

    def forward(self, x):
        y, _ = self.own(self.plain(x + self.at(x)))
        y = self.padded(self.conv(y.mT)).mT
        return y * self.scale[:, 0, 0] * self.gate(x)


def test_a_role_means_linear_layers_that_the_rank_fits():
    torch.manual_seed(0)
    model, x = Odd(), torch.randn(2, 5, 8)
    want = model(x)
    with pytest.warns(UserWarning, match=r'1 site left out.*1 gate \(1 x 8\).*\{"gate": \{"rank": 1\}\}'):
        adapter = rw.attach(model, rw.recipe("lora", rank=2))
    assert [*adapter] == ["plain", "own"]
    torch.testing.assert_close(model(x), want)
    randomise(adapter, lambda: model(x))
    model(x).sum().backward()
    assert all(p.grad is not None for p in adapter.parameters())
    moved = model(x)
    rw.merge(model)
    torch.testing.assert_close(model(x), moved)


def test_all_conv_means_convolutions_that_the_rank_fits():
    model = nn.Sequential(nn.Conv2d(16, 32, 3), nn.Conv2d(32, 32, 3, groups=32), nn.Conv2d(32, 32, 3, groups=2))
    with pytest.raises(TargetError, match=r"Of these kinds: Conv2d \(conv\). Roles: all-linear, all-conv,"):
        rw.attach(model, rw.recipe("lora"))
    with pytest.warns(UserWarning, match=r"1 site left out.*1 1 \(32 x 9\)"):
        assert [*rw.attach(model, rw.recipe("lora", rank=16, sites=rw.Sites("all-conv")))] == ["0", "2"]
    sites = rw.Sites(["all-conv", "1"])
    with pytest.raises(RankError, match="smaller side of the layer, here 9"):
        rw.attach(model, rw.recipe("lora", rank=16, sites=sites), name="second")


def test_a_rank_of_its_own_or_a_name_is_meant():
    sites = rw.Sites(overrides={"gate": {"rank": 1}})
    assert [*rw.attach(Odd(), rw.recipe("lora", rank=2, sites=sites))] == ["plain", "own", "gate"]
    with pytest.raises(RankError, match="smaller side of the layer, here 1"):
        rw.attach(Odd(), rw.recipe("lora", rank=2, sites=rw.Sites(["all-linear", "gate"])))
    with pytest.raises(RankError, match="smaller side of the layer, here 8"):
        rw.attach(Odd(), rw.recipe("lora", rank=9))


def test_what_computes_more_than_its_kind_is_read_or_refused():
    with pytest.raises(TargetError, match="padded is a Padded, with a forward of its own"):
        rw.attach(Odd(), rw.recipe("lora", rank=2, sites=rw.Sites("padded")))
    model, x = Odd(), torch.randn(2, 5, 8)
    want = model(x)
    adapter = rw.attach(model, rw.recipe("lora", rank=2, sites=rw.Sites("at")))
    torch.testing.assert_close(model(x), want)
    randomise(adapter, lambda: model(x))
    assert not torch.allclose(model(x), want)


def _reads(self, x):
    return sum(x @ child.weight.mT for child in self.children())


@pytest.mark.parametrize(
    ("around", "layer"),
    [
        ("JambaMambaMixer", "dt_proj"),
        ("Zamba2MambaMixer", "out_proj"),
        ("BambaMixer", "out_proj"),
        ("FalconH1Mixer", "out_proj"),
        ("WavLMAttention", "q_proj"),
        ("DetrMHAttentionMap", "k_proj"),
        ("LayoutLMv3Encoder", "rel_pos_bias"),
    ],
)
def test_a_weight_that_the_code_around_reads_is_adapted_there(around, layer):
    torch.manual_seed(0)
    model, x = type(around, (nn.Module,), {"forward": _reads})(), torch.randn(3, 8)
    model.add_module(layer, nn.Linear(8, 6))
    want = model(x)
    adapter = rw.attach(model, rw.recipe("lora", rank=2))
    torch.testing.assert_close(model(x), want)
    randomise(adapter, lambda: model(x))
    model(x).sum().backward()
    assert all(p.grad is not None for p in adapter.parameters())
    moved = model(x)
    rw.merge(model)
    torch.testing.assert_close(model(x), moved)
