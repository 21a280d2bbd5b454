"""An adapter's life on a model: several at once, copies, dtypes, checkpoints, leaving no trace."""

import copy
import inspect
import io
import pickle

import pytest
import torch
from torch import nn

import rankwise as rw
from rankwise.structures import OFT, HiRA, LoRA, Magnitude
from rankwise.testing import LAYERS, randomise

STRUCTURES = (LoRA(4), Magnitude(LoRA(4)), OFT(4), HiRA(4))
BY_NAME = {layer.name: layer for layer in LAYERS}


def made(layer, structure=STRUCTURES[0], names=("default",)):
    """Base, adapted copy and inputs."""
    torch.manual_seed(0)
    base = layer.make().double().eval()
    model, x = copy.deepcopy(base), layer.inputs(3)
    for i, name in enumerate(names):
        randomise(rw.attach(model, rw.Recipe(structure, sites=layer.sites), name), lambda: model(x), i)
    return base, model, x


@pytest.mark.parametrize("layer", LAYERS, ids=lambda v: v.name)
def test_names_and_classes_stay(layer):
    base, model, _ = made(layer)
    ours = [n for n, _ in model.named_parameters() if "adapters." not in n]
    assert ours == [n for n, _ in base.named_parameters()]
    adapted = dict(model.named_modules())
    for path, module in base.named_modules():
        cls, now = type(module), type(adapted[path])
        assert isinstance(adapted[path], cls)
        for name in ("__name__", "__qualname__", "__module__", "__doc__"):
            assert getattr(now, name) == getattr(cls, name)
        assert list(inspect.signature(now).parameters) == list(inspect.signature(cls).parameters)


@pytest.mark.parametrize("name", ["experts", "MultiheadAttention"])
def test_an_adapted_parameter_is_one_by_its_name(name):
    """As transformers asks while it saves."""
    _, model, _ = made(BY_NAME[name])
    for path, _ in model.named_parameters():
        assert model.get_parameter(path).shape == model.state_dict()[path].shape


@pytest.mark.parametrize("layer", LAYERS, ids=lambda v: v.name)
def test_detach_leaves_no_trace(layer):
    base, model, x = made(layer, names=("one", "two"))
    rw.adapters(model)["one"].detach()
    with rw.disabled(model):
        assert torch.equal(model(x), base(x))
    rw.adapters(model)["two"].detach()
    assert torch.equal(model(x), base(x))
    assert model.state_dict().keys() == base.state_dict().keys()
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in base.state_dict().items())
    for one, two in zip(base.modules(), model.modules(), strict=True):
        assert type(one) is type(two)
        assert one.__dict__.keys() == two.__dict__.keys()
    assert rw.adapters(model) == {}


@pytest.mark.parametrize("layer", LAYERS, ids=lambda v: v.name)
@pytest.mark.parametrize("structure", STRUCTURES, ids=repr)
def test_copies(layer, structure):
    _, model, x = made(layer, structure)
    y = model(x)
    dumped = pickle.loads(pickle.dumps(model))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(model), dumped, torch.load(buffer, weights_only=False)):
        assert torch.equal(twin(x), y)
        adapter = rw.adapters(twin)["default"]
        assert adapter.model is twin
        with torch.no_grad():
            for p in adapter.parameters():
                p.add_(0.1)
        assert not torch.equal(twin(x), y)
        rw.set_active(twin, None)
        assert torch.equal(model(x), y)


@pytest.mark.parametrize("layer", LAYERS, ids=lambda v: v.name)
def test_state_dict(layer):
    base, model, x = made(layer)
    state = model.state_dict()
    assert base.state_dict().keys() < state.keys()
    other = copy.deepcopy(base)
    rw.attach(other, rw.Recipe(LoRA(4), sites=layer.sites))
    other.load_state_dict(state)
    assert torch.equal(other(x), model(x))
    missing = model.load_state_dict(base.state_dict(), strict=False)
    assert not missing.unexpected_keys


@pytest.mark.parametrize("layer", LAYERS, ids=lambda v: v.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("structure", STRUCTURES, ids=repr)
def test_dtypes(layer, dtype, structure):
    base, model, x = made(layer, structure)
    cast = x.to(dtype) if x.is_floating_point() else x
    want, y = model(x), model.to(dtype)(cast)
    assert y.dtype == dtype
    assert all(p.dtype == dtype for p in model.parameters())
    bound = 64 * torch.finfo(dtype).eps
    assert float((y.double() - want).detach().norm() / want.detach().norm()) < bound
    again = base.to(dtype)
    adapter = rw.attach(again, rw.Recipe(structure, sites=layer.sites))
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    assert again(cast).dtype == dtype


def test_several_nest_in_order():
    _, model, x = made(BY_NAME["Linear"], names=("one", "two"))
    rw.attach(model, rw.Recipe(OFT(4)), "turn")
    randomise(rw.adapters(model)["turn"], lambda: model(x))

    def dense(*names):
        layer = nn.Linear(12, 16).double()
        w = model[0]._parameters["weight"]
        for name in names:
            module = rw.adapters(model)[name].sites["0"]
            w = module.structure.weight(module.factors(), w)
        layer.weight.data, layer.bias.data = w.data, model[0].bias.data
        return layer(x)

    orders = [("one",), ("one", "two"), ("turn", "one"), ("one", "turn"), ("two", "one", "turn")]
    for order in orders:
        with rw.set_active(model, order):
            torch.testing.assert_close(model(x), dense(*order), rtol=0, atol=1e-9)
    with rw.set_active(model, ("one", "turn")):
        one_turn = model(x)
    with rw.set_active(model, ("turn", "one")):
        assert not torch.allclose(model(x), one_turn, atol=1e-6)
    rw.set_active(model, ("one", "turn"))
    rw.merge(model)
    torch.testing.assert_close(model(x), one_turn, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["Conv2d", "ConvTranspose1d", "Embedding", "tied head", "Linear"])
def test_three_deep_on_every_kind(name):
    layer = BY_NAME[name]
    _, model, x = made(layer, names=("one", "two"))
    randomise(rw.attach(model, rw.Recipe(OFT(4), sites=layer.sites), "turn"), lambda: model(x))
    rw.set_active(model, ("one", "two", "turn"))
    y = model(x)
    rw.merge(model)
    torch.testing.assert_close(model(x), y, rtol=0, atol=1e-9)


def test_active_is_setter_and_context():
    base, model, x = made(BY_NAME["Linear"], names=("one", "two"))
    two = model(x)
    rw.set_active(model, "one")
    one = model(x)
    with rw.set_active(model, "two"):
        assert torch.equal(model(x), two)
        with rw.disabled(model):
            assert torch.equal(model(x), base(x))
        assert torch.equal(model(x), two)
    assert torch.equal(model(x), one)
    rw.set_active(model, None)
    assert torch.equal(model(x), base(x))


@pytest.mark.parametrize("structure", STRUCTURES[:2] + STRUCTURES[3:], ids=repr)
def test_small_updates_survive_a_bfloat16_base(structure):
    """W = [V, -V] and x = [v, v] cancel exactly, so what is left is the update alone."""
    torch.manual_seed(0)
    half = torch.randn(16, 8)
    model = nn.Sequential(nn.Linear(16, 16, bias=False))
    model[0].weight.data = torch.cat([half, -half], dim=1)
    model = model.bfloat16()
    x = torch.randn(4, 8).bfloat16()
    x = torch.cat([x, x], dim=1)
    assert not model(x).any()
    adapter = rw.attach(model, rw.Recipe(structure))
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(1e-3 * torch.randn_like(parameter))
    w = model[0].weight.detach().double()
    module = adapter.sites["0"]
    exact = module.structure.weight({k: v.double() for k, v in adapter["0"].items()}, w)
    want = (x.double() @ exact.mT).detach()
    delta = float((exact - w).detach().norm() / w.norm())
    assert delta < 2**-8  # below bfloat16's resolution of W
    assert float((model(x).detach().double() - want).norm() / want.norm()) < 0.05


@pytest.mark.parametrize("name", ["registry", "record", "put", "choice", "forward", "a b", ""])
def test_names_that_would_collide(name):
    model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(rw.errors.AttachError, match="identifier"):
        rw.attach(model, rw.Recipe(LoRA(2)), name)
    assert type(model[0]) is nn.Linear


def test_a_class_within_a_class_keeps_its_qualified_name():
    class Inner(nn.Linear):
        pass

    model = nn.Sequential(Inner(8, 8))
    rw.attach(model, rw.Recipe(LoRA(2)))
    assert type(model[0]).__qualname__ == Inner.__qualname__ != Inner.__name__
    assert isinstance(model[0], Inner)


def test_the_fast_path_of_transformer_layers_comes_back():
    layer = nn.TransformerEncoderLayer(12, 2, 16, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).double().eval()
    before = [m.__dict__.copy() for m in model.modules()]
    adapter, x = rw.attach(model, rw.Recipe(LoRA(2))), torch.randn(2, 5, 12).double()
    randomise(adapter, lambda: model(x))
    with torch.no_grad():
        y = model(x)
        torch.testing.assert_close(y, model.train()(x), rtol=0, atol=1e-9)
        with rw.merged(model):
            torch.testing.assert_close(y, model.eval()(x), rtol=0, atol=1e-9)
    adapter.detach()
    keys = ("activation_relu_or_gelu", "use_nested_tensor", "enable_nested_tensor")
    for module, state in zip(model.modules(), before, strict=True):
        assert module.__dict__.keys() == state.keys()
        assert all(module.__dict__[k] == state[k] for k in keys if k in state)


# -- a bias that the layer has not ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Linear(6, 4, bias=False), torch.randn(3, 6)),
        (nn.Conv2d(4, 6, 3, groups=2, bias=False), torch.randn(2, 4, 5, 5)),
        (nn.ConvTranspose1d(4, 6, 3, groups=2, bias=False), torch.randn(2, 4, 5)),
    ],
    ids=lambda v: type(v).__name__,
)
@pytest.mark.parametrize("targets", ["0", ()], ids=["beside an adapter", "alone"])
def test_a_bias_of_its_own(layer, x, targets, tmp_path):
    base = nn.Sequential(copy.deepcopy(layer))
    model, other = copy.deepcopy(base), copy.deepcopy(base)
    adapter = rw.attach(model, rw.recipe("lora", rank=2, sites=rw.Sites(targets, train=["0.bias"])))
    assert torch.equal(model(x), base(x))
    assert [n for n in model.state_dict() if "adapters." not in n] == ["0.weight"]
    model(x).square().sum().backward()
    adapter.optimizer(lr=0.1).step()
    bias, y = adapter["0.bias"]["value"], model(x)
    assert bias.all() and not torch.equal(y, base(x))
    adapter.save(tmp_path)
    loaded = rw.load(other, tmp_path)
    assert torch.equal(other(x), y)
    with rw.merged(model):
        assert model[0]._parameters["bias"].equal(bias)
        torch.testing.assert_close(model(x), y)
    assert model[0]._parameters["bias"] is None
    assert torch.equal(model(x), y)
    adapter.detach()
    assert model[0].bias is None and torch.equal(model(x), base(x))
    rw.merge(other)
    torch.testing.assert_close(other(x), y)
    assert list(other.state_dict()) == ["0.weight", "0.bias"]
    assert other[0].bias.data_ptr() != loaded["0.bias"]["value"].data_ptr()


def test_several_biases_merge_each_to_its_own():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    adapter = rw.attach(model, rw.recipe("lora", rank=2, sites=rw.Sites((), train=["0.bias", "1.bias"])))
    with torch.no_grad():
        adapter["0.bias"]["value"].fill_(1.0)
        adapter["1.bias"]["value"].fill_(2.0)
    assert len(rw.merge(model).sites) == 2
    assert model[0].bias.tolist() == [1.0] * 4 and model[1].bias.tolist() == [2.0] * 4


@pytest.mark.parametrize("pattern", ["bias", "*bias", "*.bias", "0", nn.Linear])
def test_no_pattern_invents_a_bias(pattern):
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4))
    train = rw.Target.of(pattern)
    found = rw.attach(model, rw.recipe("lora", rank=2, sites=rw.Sites((), train=[train])))
    assert "0.bias" not in found
