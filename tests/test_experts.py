"""Experts of transformers: the products on the factors against the weights W + dW."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers as tf
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from transformers.integrations import moe
from transformers.models.aria.modeling_aria import AriaExperts
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.muse_spark.modeling_muse_spark import MuseSparkExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

import rankwise as rw
from rankwise import structures
from rankwise.experts import is_experts
from rankwise.host import host_of
from rankwise.structures import (
    ABBA,
    BOFT,
    C3A,
    HRA,
    IA3,
    NOLA,
    OFT,
    PSOFT,
    SVFT,
    Anchored,
    Bat,
    BlockLoRA,
    BoRA,
    BSLoRA,
    CaRA,
    Chain,
    Core,
    DeLoRA,
    Delta,
    FacTTK,
    FacTTT,
    FouRA,
    FourierFT,
    Gated,
    GLoRA,
    GraLoRA,
    HardConcrete,
    HiRA,
    InputSide,
    LoHa,
    LoKr,
    LoRA,
    LoRAFA,
    LoRETTA,
    LoRTA,
    LoTR,
    LowRankWeight,
    Magnitude,
    MELoRA,
    MetaTT,
    MiSS,
    MoRA,
    PRoLoRA,
    PVeRA,
    QuanTA,
    RandLoRA,
    RaSA,
    Replace,
    Rising,
    RoAd,
    Rows,
    Selection,
    ShareLoRA,
    SHiRA,
    SineLoRA,
    SparseLowRank,
    Stack,
    Structure,
    SVDForm,
    Switched,
    ThreeFactor,
    TiedLoRA,
    TinyLoRA,
    TokenRows,
    Truncated,
    TTLoRA,
    UniLoRA,
    VBLoRA,
    VeRA,
    WaveFT,
)
from rankwise.testing import randomise
from rankwise.testing.compare import Comparison
from tiny_models import shake

IDS = torch.arange(22).reshape(2, 11) * 7 % 64
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts_per_tok": 3,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, Callable[[], Any]] = {
    "mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**SIZES, num_local_experts=5)),
    "qwen3": lambda: tf.Qwen3MoeForCausalLM(
        tf.Qwen3MoeConfig(**SIZES, num_experts=5, moe_intermediate_size=24, num_local_experts=5)
    ),
    "gpt-oss": lambda: tf.GptOssForCausalLM(tf.GptOssConfig(**SIZES, num_local_experts=5)),
}
LEAVES = (
    *(LoRA(4), SVDForm(3), LoKr(4), LoHa(2), HiRA(4), OFT(4), Replace()),
    *(HRA(4), BOFT(4), PSOFT(4), IA3(), IA3("in"), RoAd(2, 4), DeLoRA(4), MiSS(4), MiSS(3, 2), Bat(4), BlockLoRA(4)),
    *(LoRAFA(4), InputSide(3), Core(3), Gated(3), Switched(3)),
    *(HardConcrete(3), Selection(3), Rising(3)),
    *(LowRankWeight(3), SparseLowRank(3, 6.0, 0.2)),
    *(LoRAFA(4), InputSide(3), Core(3), Gated(3), Switched(3), ShareLoRA(3), TiedLoRA(3), VeRA(3, widths=(96, 96))),
    *(RaSA(3), BSLoRA(1, 2, 1), VBLoRA(2, 5, 4), RandLoRA(5), UniLoRA(2, 9), NOLA(2, bases=3)),
    *(TTLoRA(2), LoRETTA(3, 2), QuanTA(3)),
    *(FacTTT(2), FacTTK(2), LoTR(2), LoRTA(2), CaRA(2), MetaTT(2, heads=2, tasks=2)),
    *(ThreeFactor(3), TinyLoRA(2, size=5), SVFT("random", 1)),
    *(ABBA(2), MoRA(2), SineLoRA(2), MELoRA(2), BoRA(2), GraLoRA(4), GLoRA(2), PRoLoRA(4)),
    *(FourierFT(40), WaveFT(40), SHiRA(2), C3A(8), FouRA(4)),
)
WRAPPED = (
    Magnitude(LoRA(4)),
    Magnitude(OFT(4)),
    Anchored(LoRA(4)),
    Anchored(LoKr(4)),
    Magnitude(Anchored(SVDForm(4))),
    Stack(LoRA(2), LoRA(3)),
    Chain(LoRA(3), 2),
    Delta(LoRA(3)),
    Truncated(Gated(3), 2),
)
ALL = (*LEAVES, *WRAPPED, Rows(LoRA(2), (("gate", 0, 16),)))
IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])


def made(family: str, implementation: str = "eager", dtype: torch.dtype = torch.float64) -> Any:
    """A tiny model whose weights are large enough to tell things apart."""
    torch.manual_seed(1)
    model = FAMILIES[family]().to(dtype).eval()
    model.set_experts_implementation(implementation)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.15)
    return model


def recipe(structure: Structure, sites: Any = "*experts.*_proj", **axes: Any) -> rw.Recipe:
    return rw.Recipe(structure, sites=rw.Sites(sites), **axes)


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits


def put(model: Any, *structures: Structure, sites: Any = "*experts.*_proj", **axes: Any) -> list[rw.Adapter]:
    """Adapters A, B ... at random values."""
    found = []
    for i, structure in enumerate(structures):
        adapter = rw.attach(model, recipe(structure, sites, **axes), "ABC"[i])
        randomise(adapter, lambda: logits(model), i)
        found.append(adapter)
    return found


def dense(base: Any, adapters: Sequence[rw.Adapter], ids: Tensor = IDS) -> Tensor:
    """The base's logits with ``structure.weight(f, W)`` in place of W: what L1 compares with."""
    weights: dict[str, Tensor] = {}
    for adapter in adapters:
        for p in adapter.placements:
            path, slot, _ = p.carriers[0]
            host = host_of(base.get_submodule(path), slot)
            w = weights.get(p.site.name)
            w = host.weight() if w is None else host.matrix(w)
            weights[p.site.name] = host.tensor(p.structure.weight(adapter[p.site.name], w))
    return functional_call(base, weights, kwargs={"input_ids": ids, "use_cache": False}).logits


def parameters(adapters: Sequence[rw.Adapter]) -> list[nn.Parameter]:
    return [p for adapter in adapters for p in adapter.parameters()]


@pytest.fixture
def anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' own grouped product, since torch's takes no float64."""
    monkeypatch.setattr(moe, "_can_use_grouped_mm", lambda *_: False)


def test_every_structure_is_here():
    kinds = {getattr(structures, name) for name in structures.__all__}
    whole = {k for k in kinds if isinstance(k, type) and issubclass(k, Structure) and not k.__abstractmethods__}
    of_convolutions = {k for k in whole if "not_mergeable" in k.traits}
    assert whole - {TokenRows, PVeRA} - of_convolutions == {type(s) for s in ALL}


@pytest.mark.usefixtures("anywhere")
@IMPLEMENTATIONS
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("structure", ALL, ids=str)
def test_equal_to_the_dense_weights(structure, family, implementation):
    if isinstance(structure, Rows) and family == "gpt-oss":
        return  # refused: its parts are interleaved
    base = made(family, implementation)
    model = copy.deepcopy(base)
    if isinstance(structure, Replace):
        adapters = [rw.attach(model, rw.Recipe(LoRA(2), sites=rw.Sites((), train="*experts.*_proj")))]
        randomise(adapters[0], lambda: logits(model))
    else:
        adapters = put(model, structure)
    compare = Comparison(f"{structure}")
    for train in (False,) if "samples" in structure.traits else (True, False):
        got, want = logits(model.train(train)), dense(base, adapters)
        compare("meaning", got, want)
        pull = torch.randn_like(got)
        grads = [torch.autograd.grad((y * pull).sum(), parameters(adapters)) for y in (got, want)]
        for ours, theirs in zip(*grads, strict=True):
            compare("gradient", ours, theirs)


@pytest.mark.usefixtures("anywhere")
@IMPLEMENTATIONS
def test_experts_draw_their_gates_in_training(implementation):
    model = made("mixtral", implementation).train()
    (adapter,) = put(model, HardConcrete(4))
    found = logits(model)
    assert not torch.equal(found, logits(model))
    grads = torch.autograd.grad(found.sum(), parameters([adapter]))
    assert all(g.any() for g in grads)


@pytest.mark.usefixtures("anywhere")
@IMPLEMENTATIONS
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("second", [LoRA(3), Magnitude(LoRA(3)), OFT(4)], ids=str)
def test_adapters_compose(second, family, implementation):
    base = made(family, implementation)
    model = copy.deepcopy(base)
    adapters = put(model, LoRA(2), second)
    rw.set_active(model, ["A", "B"])
    Comparison("two adapters")("meaning", logits(model), dense(base, adapters))


@pytest.mark.usefixtures("anywhere")
@IMPLEMENTATIONS
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_routed(family, implementation):
    model = made(family, implementation)
    put(model, LoRA(2), Magnitude(LoRA(3)), LoRA(2))
    rows = ["C", None, "A", "B", "C"]
    ids = torch.randint(64, (5, 7), generator=torch.Generator().manual_seed(0))
    compare = Comparison("routing")
    with rw.route(model, rows):
        got = logits(model, ids)
    for i, row in enumerate(rows):
        with rw.set_active(model, row):
            compare("L3 batch", got[i : i + 1], logits(model, ids[i : i + 1]))


def test_rows_that_do_not_fit_are_refused():
    model = made("mixtral")
    put(model, LoRA(2))
    with rw.route(model, ["A", None, "A"]), pytest.raises(ValueError, match="3 names and 22 tokens"):
        logits(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_start_is_the_base_bit_for_bit(family):
    base = made(family, "grouped_mm", torch.float32)
    model = copy.deepcopy(base)
    rw.attach(model, recipe(LoRA(4)))
    with torch.no_grad():
        assert torch.equal(logits(model), logits(base))


@pytest.mark.usefixtures("anywhere")
@IMPLEMENTATIONS
def test_dropout_reaches_the_update_alone(implementation):
    base = made("mixtral", implementation)
    model = copy.deepcopy(base)
    adapters = put(model, LoRA(4), dropout=1 - 1e-12)  # nothing of the update is left, were it not for evaluation
    assert torch.equal(logits(model.train()), logits(base.train()))
    Comparison("evaluation")("meaning", logits(model.eval()), dense(base, adapters))


@IMPLEMENTATIONS
def test_a_small_update_is_not_rounded_away(implementation):
    """W of ones and minus ones is blind to a constant x; an update below W's last bit is seen all the same."""
    model = made("mixtral", implementation, torch.bfloat16)
    experts = model.model.layers[0].mlp.experts
    adapter = rw.attach(model, recipe(LoRA(1, alpha=None), "*gate_up_proj"))
    (factors,) = adapter.values()
    with torch.no_grad():
        experts._parameters["gate_up_proj"].copy_(torch.tensor([1.0, -1.0]).repeat(16))
        factors["a"].fill_(1.0)
        factors["b"].fill_(2.0**-11)
        x, index = torch.ones(4, 32, dtype=torch.bfloat16), torch.arange(4).unsqueeze(1)
        assert experts(x, index, torch.ones_like(index, dtype=x.dtype)).abs().max() > 0
        with rw.merged(model):
            assert experts(x, index, torch.ones_like(index, dtype=x.dtype)).abs().max() == 0


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (NemotronHExperts, {"mlp_hidden_act": "relu2", "moe_latent_size": None, "n_routed_experts": 3}),
        (MuseSparkExperts, {"hidden_act": "silu", "moe_hidden_size": 16, "post_norm_eps": 1e-6}),
        (AriaExperts, {"moe_num_experts": 3}),
        (GptOssExperts, {"swiglu_alpha": 1.7, "swiglu_limit": 7.0}),
        (MixtralExperts, {"hidden_act": "gelu"}),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
@IMPLEMENTATIONS
@pytest.mark.usefixtures("anywhere")
def test_every_shape_of_the_interface(kind, options, implementation):
    """No gate, a norm after the experts, stacks that lie transposed, biases; and a bias with an adapter of its own."""
    shape = {"hidden_size": 16, "intermediate_size": 24, "moe_intermediate_size": 24, "num_local_experts": 3}
    base = kind(SimpleNamespace(**shape, **options, _experts_implementation=implementation)).double()
    with torch.no_grad():
        for p in base.parameters():
            p.normal_(std=0.5)
    model, index = copy.deepcopy(base), torch.tensor([[0, 2], [2, 1], [0, 1], [2, 0]])
    x, weights = torch.randn(4, 16).double(), torch.rand(4, 2).double()
    adapter = rw.attach(model, recipe(LoRA(2), "*"))
    randomise(adapter, lambda: model(x, index, weights))
    changed = {
        p.site.name: host_of(base, p.site.name).tensor(
            p.structure.weight(adapter[p.site.name], host_of(base, p.site.name).weight())
        )
        for p in adapter.placements
    }
    assert len(changed) == 4 if hasattr(base, "down_proj_bias") else 2
    compare = Comparison(kind.__name__)
    compare("meaning", model(x, index, weights), functional_call(base, changed, (x, index, weights)))
    model._is_expert_parallel = True  # the whole stacks are adapted instead, since ids of others come by
    compare("fallback", model(x, index, weights), functional_call(base, changed, (x, index, weights)))


@IMPLEMENTATIONS
@pytest.mark.usefixtures("anywhere")
def test_experts_without_tokens(implementation):
    model = made("mixtral", implementation)
    (adapter,) = put(model, LoRA(2))
    experts, few = model.model.layers[0].mlp.experts, torch.tensor([[1], [1]])
    experts(torch.randn(2, 32).double(), few, torch.ones(2, 1).double()).square().sum().backward()
    for p in adapter.parameters():
        assert p.grad is not None
        assert p.grad.flatten(1).ne(0).any(1).tolist() == [False, True, False, False, False]
    none = experts(torch.empty(0, 32).double(), torch.empty(0, 3, dtype=torch.long), torch.empty(0, 3).double())
    assert none.shape == (0, 32)


@IMPLEMENTATIONS
@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize("structure", [LoRA(2), Magnitude(LoRA(2))], ids=str)
def test_a_base_that_trains_too(structure, implementation):
    base = made("mixtral", implementation)
    model = copy.deepcopy(base)
    adapter = rw.attach(model, recipe(structure), freeze=False)
    randomise(adapter, lambda: logits(model))
    name = "model.layers.0.mlp.experts.gate_up_proj"
    logits(model).square().sum().backward()
    dense(base, [adapter]).square().sum().backward()
    Comparison("base")("gradient", *(dict(m.named_parameters())[name].grad for m in (model, base)))  # type: ignore


class Fresh(TorchDispatchMode):
    """The size of the largest tensor whose memory is new."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        known = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and t.untyped_storage()._cdata not in known:
                self.largest = max(self.largest, t.untyped_storage().nbytes() // t.element_size())
        return out


@IMPLEMENTATIONS
@pytest.mark.parametrize("structure", [LoRA(2), SVDForm(2), Magnitude(LoRA(2)), LoKr(2), LoHa(2), HiRA(2)], ids=str)
def test_nothing_as_large_as_a_stack_is_made(structure, implementation):
    model = made("mixtral", implementation, torch.float32)
    put(model, structure)
    stack = model.model.layers[0].mlp.experts.down_proj.numel()
    with Fresh() as fresh:
        logits(model.train(), IDS[:, :4]).square().sum().backward()
    assert 0 < fresh.largest <= stack // 2


CHECKPOINTS = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])


def through(block: nn.Module, x: Tensor, reentrant: bool | None) -> Tensor:
    """Through the experts, checkpointed or not."""
    index, weights = torch.tensor([[0, 2], [2, 1], [0, 4], [3, 0]]), torch.full((4, 2), 0.5).double()
    if reentrant is None:
        return block(x, index, weights)
    return checkpoint(block, x, index, weights, use_reentrant=reentrant)  # type: ignore[return-value]


@CHECKPOINTS
@IMPLEMENTATIONS
@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize("names", ["A", ["B", "A"], None])
@pytest.mark.parametrize("structure", [LoRA(2), Magnitude(LoRA(2))], ids=str)
def test_leaving_the_context_before_backward(structure, names, implementation, reentrant):
    model = made("mixtral", implementation)
    for name in "AB":
        shake(rw.attach(model, recipe(structure), name), 0.1)
    experts, found = model.model.layers[0].mlp.experts, []
    for mode in (None, reentrant):
        x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
        model.zero_grad()
        rw.set_active(model, "B")
        with rw.set_active(model, names):
            y = through(experts, x, mode)
        y.square().sum().backward()
        found.append([x.grad, *(p.grad for p in parameters([*rw.adapters(model).values()]))])
    for one, two in zip(*found, strict=True):
        assert (one is None) == (two is None)
        assert one is None or torch.equal(one, two)


@CHECKPOINTS
def test_two_choices_alive_at_once_are_right_or_refused(reentrant):
    model = made("mixtral")
    shake(rw.attach(model, recipe(LoRA(2))), 0.1)
    experts = model.model.layers[0].mlp.experts
    x = torch.randn(4, 32).double().requires_grad_()
    one = through(experts, x, reentrant)
    with rw.disabled(model):
        two = through(experts, x, reentrant)
    with pytest.raises(rw.errors.ActivityError):
        (one + two).sum().backward()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch's own look, at a graph break
@pytest.mark.parametrize("structure", [LoRA(4), Magnitude(LoRA(4))], ids=str)
def test_compiled(structure):
    torch._dynamo.reset()
    model = made("mixtral", "grouped_mm", torch.float32)
    (adapter,) = put(model, structure)
    whole = isinstance(structure, LoRA)  # as the base does; the others look at the sizes of the groups
    compiled = torch.compile(model, fullgraph=whole, backend="aot_eager")
    got, want = logits(compiled), logits(model)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    grads = [torch.autograd.grad(y.square().mean(), list(adapter.parameters())) for y in (got, want)]
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-6)


@IMPLEMENTATIONS
@pytest.mark.parametrize("structure", [LoRA(4), OFT(4)], ids=str)
def test_autocast(structure, implementation):
    model = made("gpt-oss", implementation, torch.float32)
    (adapter,) = put(model, structure)
    want = logits(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = logits(model)
    assert 0 < float((got.float() - want).detach().norm() / want.detach().norm()) < 0.1
    got.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in adapter.parameters())


@pytest.mark.parametrize("rank", [1, 4, 8])
def test_cuda_takes_any_rank(rank):
    """CUDA's grouped product refuses rows that are no whole 16 bytes; meta tensors are held to it without a GPU."""
    config = SimpleNamespace(num_local_experts=4, hidden_size=32, intermediate_size=48, hidden_act="silu")
    config._experts_implementation = "grouped_mm"
    model = MixtralExperts(config).to(torch.bfloat16)  # type: ignore[arg-type]
    rw.attach(model, recipe(LoRA(rank), "*"))
    model.to("meta")
    x = torch.empty(6, 32, dtype=torch.bfloat16, device="meta", requires_grad=True)
    index, weights = (torch.empty(6, 2, dtype=kind, device="meta") for kind in (torch.long, torch.bfloat16))
    model(x, index, weights).square().sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters() if p.requires_grad)


def test_a_life(tmp_path):
    base = made("gpt-oss", "grouped_mm", torch.float32)
    model = copy.deepcopy(base)
    (adapter,) = put(model, Magnitude(LoRA(4)))
    adapter.save(tmp_path)
    with torch.no_grad():
        want = logits(model)
        again = pickle.loads(pickle.dumps(model))
        assert torch.equal(logits(again), want)
        other = copy.deepcopy(base)
        rw.load(other, tmp_path)
        assert torch.equal(logits(other), want)
        rw.merge(other)
        torch.testing.assert_close(logits(other), want, rtol=1e-4, atol=1e-4)
        adapter.detach()
        assert type(model.model.layers[0].mlp.experts) is GptOssExperts
        assert torch.equal(logits(model), logits(base))


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Any]:
    """A mesh of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module:UserWarning")  # it returns a view
@pytest.mark.skipif(not dist.is_gloo_available(), reason="no gloo")
@pytest.mark.parametrize("structure", [LoRA(4), Magnitude(LoRA(4))], ids=str)
@pytest.mark.parametrize("kind", ["experts", "bare parameters"])
def test_sharded(kind, structure, mesh):
    """FSDP2 reads the parameters by name: it must find the base's there."""
    if kind == "experts":
        model, run = made("mixtral", "grouped_mm", torch.float32), logits
        put(model, structure)
        blocks = [*model.model.layers]
    else:
        model = nn.Sequential(nn.TransformerEncoderLayer(32, 4, 48, 0.0, batch_first=True), nn.Linear(32, 32))
        x, blocks = torch.randn(2, 5, 32), [model[0]]
        run = lambda m: m(x)  # noqa: E731
        randomise(rw.attach(model, recipe(structure, "*in_proj_weight")), lambda: run(model))
    found = []
    for m in (copy.deepcopy(model), model):
        for part in (*blocks, model) if m is model else ():
            fully_shard(part, mesh=mesh)
        y = run(m)
        y.square().mean().backward()
        grads = [p.grad for p in m.parameters() if p.grad is not None]
        grads = [g.full_tensor() if isinstance(g, DTensor) else g for g in grads]
        with rw.disabled(m), torch.no_grad():
            found.append((y, run(m), grads))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)


def test_only_the_interface_s_own_forward_is_recognised():
    class Own(MixtralExperts):
        def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            return hidden_states @ self.gate_up_proj[0].mT

    class Same(MixtralExperts):
        pass

    found = [is_experts(kind) for kind in (MixtralExperts, Same, Own, nn.Linear, nn.MultiheadAttention, nn.Module)]
    assert found == [True, True, False, False, False, False]
    config = SimpleNamespace(num_local_experts=4, hidden_size=32, intermediate_size=48, hidden_act="silu")
    model = Own(config)  # type: ignore[arg-type]
    x, index = torch.randn(3, 32), torch.zeros(3, 1, dtype=torch.long)
    with torch.no_grad():
        model.gate_up_proj.normal_()
    adapter = rw.attach(model, recipe(LoRA(2), "gate_up_proj"))
    randomise(adapter, lambda: model(x, index, x))
    w = LoRA(2).weight(adapter["gate_up_proj"], model._parameters["gate_up_proj"])  # type: ignore[arg-type]
    torch.testing.assert_close(model(x, index, x), x @ w[0].mT)
