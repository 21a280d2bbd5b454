"""Transform domains, sparse entries and circulant blocks: rank, places, what is never formed, what is refused."""

import json
import warnings

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import rankwise as rw
from rankwise.errors import ConversionError, FileFormatError, IncompatibleAxes, RankError
from rankwise.ops import Circulant, Fourier, Haar, Sparse
from rankwise.ops.form import Form, cheapest
from rankwise.structures import C3A, FouRA, FourierFT, SHiRA, Structure, WaveFT

EVERY = (FourierFT(40), WaveFT(40), SHiRA(1), C3A(8), FouRA(3))


def attached(structure: Structure, cols: int = 24, rows: int = 16, **axes) -> tuple[nn.Module, rw.Adapter]:
    """A float64 layer with this structure, its trained factors drawn."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(cols, rows)).double()
    adapter = rw.attach(model, rw.Recipe(structure, **axes))
    with torch.no_grad():
        for p in adapter.parameters():
            p.copy_(torch.randn_like(p))
    return model, adapter


# -- rank -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("structure", "rank"),
    [(FouRA(3), 3), (FourierFT(1), 2), (FourierFT(4, seed=17), 8), (C3A(8), 16), (SHiRA(4), 16)],
    ids=repr,
)
def test_the_rank_is_the_one_said(structure, rank):
    """Seed 17 draws waves of different frequencies on both sides; equal or opposite ones would share their span."""
    _, adapter = attached(structure)
    update = structure.weight(adapter["0"], torch.zeros(16, 24, dtype=torch.float64))
    assert torch.linalg.matrix_rank(update) == rank


@pytest.mark.parametrize(("structure", "rank"), [(FouRA(3), 3), (FourierFT(4), 8), (FourierFT(5), None)], ids=repr)
def test_an_exact_lora_of_that_rank(structure, rank):
    """5 coefficients are 10 waves, with more numbers than the 16 x 24 matrix itself."""
    _, adapter = attached(structure)
    op = structure.delta(adapter["0"])
    assert op.rank == rank
    if rank is not None:
        left, right = op.lower()
        assert left.shape == (16, rank)
        torch.testing.assert_close(left @ right, op.dense(), rtol=0, atol=1e-12)


# -- places ---------------------------------------------------------------------------------------


def test_a_mask_by_size_takes_the_largest_entries():
    model, adapter = attached(SHiRA(2, "wm"))
    f, w = adapter["0"], model[0].weight.abs()
    taken = torch.zeros_like(w, dtype=torch.bool)
    taken[f["row"].long(), f["col"].long()] = True
    assert taken.sum() == 80
    assert w[taken].min() > w[~taken].max()


def test_places_are_stored_as_whole_numbers_and_drawn_by_seed():
    one, two, other = (attached(FourierFT(40, seed=s))[1]["0"] for s in (5, 5, 6))
    assert one["row"].dtype == torch.int32 and not one["row"].requires_grad
    assert torch.equal(one["row"], two["row"]) and not torch.equal(one["row"], other["row"])
    assert one["row"].data_ptr() != two["row"].data_ptr()


@pytest.mark.parametrize("structure", [FourierFT(40), WaveFT(380), SHiRA(1), SHiRA(9)], ids=repr)
@pytest.mark.parametrize("shape", [(16, 24), (15, 26)], ids=str)
def test_no_place_is_taken_twice(structure, shape):
    _, adapter = attached(structure, *shape)
    f = adapter["0"]
    assert len(set(zip(f["row"].tolist(), f["col"].tolist(), strict=True))) == len(f["values"])


def test_only_the_entries_change():
    model, adapter = attached(SHiRA(1))
    f, before = adapter["0"], model[0].weight.clone()
    rw.merge(model)
    moved = (model[0].weight != before).nonzero().tolist()
    assert moved == [list(p) for p in zip(f["row"].tolist(), f["col"].tolist(), strict=True)]


# -- how it is applied ----------------------------------------------------------------------------


def sparse(batch: tuple[int, ...], m: int, n: int, k: int) -> Sparse:
    place = torch.stack([torch.randperm(m * n)[:k] for _ in range(batch[0] if batch else 1)]).reshape(*batch, k)
    return Sparse(torch.randn(*batch, k, dtype=torch.float64), place // n, place % n, (m, n))


MADE = {
    Sparse: lambda v, s: Sparse(v, s.row.squeeze(-2), s.col.squeeze(-2), s.shape),
    Fourier: lambda v, s: Fourier(MADE[Sparse](v, s)),
    Haar: lambda v, s: Haar(MADE[Sparse](v, s), (5, 3)),
}


@pytest.mark.parametrize("batch", [(), (2,)], ids=str)
@pytest.mark.parametrize(("kind", "count"), [*((k, 7) for k in MADE), (Fourier, 24)])
def test_derivatives_of_sparse_products(kind, count, batch):
    """First and second ones, of x and of the entries, also where half of a spectrum has more of them than places."""
    torch.manual_seed(0)
    s = sparse(batch, 6, 4, count)
    x = torch.randn(*batch, 3, 3 if kind is Haar else 4, dtype=torch.float64, requires_grad=True)
    v = s.values.squeeze(-2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, v: MADE[kind](v, s).mv(x), (x, v))
    assert torch.autograd.gradgradcheck(lambda x, v: MADE[kind](v, s).mv(x), (x, v))
    index = torch.tensor([1, 1, 4]).expand(*batch, 3)
    assert torch.autograd.gradcheck(lambda v: MADE[kind](v, s).rows(index), v)


@pytest.mark.parametrize("batch", [(), (2,)], ids=str)
def test_derivatives_of_circulant_products(batch):
    torch.manual_seed(0)
    w = torch.randn(*batch, 2, 1, 3, dtype=torch.float64, requires_grad=True)
    x = torch.randn(*batch, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: Circulant(w).mv(x), (x, w))
    assert torch.autograd.gradgradcheck(lambda x, w: Circulant(w).mv(x), (x, w))


class Largest(TorchDispatchMode):
    """The largest tensor that any operation gives, views of one aside."""

    def __init__(self, aside: torch.Tensor) -> None:
        super().__init__()
        self.aside, self.size = aside.data_ptr(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        strided = [t for t in tree_leaves(found) if isinstance(t, torch.Tensor) and t.layout is torch.strided]
        self.size = max([self.size, *(t.numel() for t in strided if t.data_ptr() != self.aside)])
        return found


@pytest.mark.parametrize("structure", [FourierFT(1000), WaveFT(2592), SHiRA(1), C3A(64), FouRA(4)], ids=repr)
def test_no_matrix_is_formed(structure):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1024, 768))
    adapter = rw.attach(model, rw.Recipe(structure))
    x = torch.randn(6, 1024, requires_grad=True)
    with Largest(model[0].weight) as seen:
        y = model(x)
        torch.autograd.grad(y.square().sum(), [x, *adapter.parameters()])
    assert 6 * 768 <= seen.size <= 1024 * 768 / 8


def test_the_cheaper_form_is_chosen():
    many, few = (Fourier(sparse((), 1024, 1024, k)) for k in (1000, 10))
    assert cheapest(many, 512, together=True) is Form.OWN
    assert cheapest(few, 512, together=True) is Form.LOW_RANK
    assert cheapest(sparse((), 64, 64, 2048), 512, together=True) is Form.WHOLE


@pytest.mark.parametrize("structure", EVERY, ids=repr)
def test_half_precision_and_autocast(structure):
    _, adapter = attached(structure, 64, 48)
    x = torch.randn(5, 64, dtype=torch.float64)
    want = adapter.sites["0"].structure.weight(adapter["0"], torch.zeros(48, 64).double()) @ x.T
    half = nn.Sequential(nn.Linear(64, 48)).bfloat16()
    again = rw.attach(half, rw.Recipe(structure))
    with torch.no_grad():
        for name, value in adapter["0"].items():
            again["0"][name].copy_(value)
        with rw.disabled(half):
            base = half(x.bfloat16())
        assert ((half(x.bfloat16()) - base).double().T - want).norm() <= 0.03 * want.norm()
        with torch.autocast("cpu", torch.bfloat16):
            inside = half(x.float())
        assert ((inside - base).double().T - want).norm() <= 0.03 * want.norm()


@pytest.mark.parametrize("structure", EVERY, ids=repr)
def test_it_compiles_whole(structure):
    model, adapter = attached(structure)
    x = torch.randn(5, 24, dtype=torch.float64)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    want, got = (torch.autograd.grad(m(x).sin().sum(), list(adapter.parameters())) for m in (model, compiled))
    torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=1e-12)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("structure", "message"),
    [
        (FourierFT(0), "between 1 trained entry and its whole size, here 384; found 0"),
        (FourierFT(385), "found 385"),
        (WaveFT(2.5), "found 2.5"),
        (SHiRA(10), "found 400"),
        (FouRA(17), "rank=17"),
        (C3A(0), "rank=0"),
        (C3A(1), "none up to 1 divides both"),
    ],
    ids=repr,
)
def test_sizes_that_do_not_fit(structure, message):
    with pytest.raises(RankError, match=message):
        attached(structure)


def test_a_block_is_a_common_divisor():
    with pytest.raises(RankError, match="divides both sides of 0"):
        attached(C3A(128), 15, 16)
    assert attached(C3A(5), 24, 16)[1]["0"]["kernel"].shape == (4, 6, 4)


def test_an_unknown_mask():
    with pytest.raises(IncompatibleAxes, match="'rand', 'wm'"):
        SHiRA(2, "snip")


@pytest.mark.parametrize("wrong", [-1, 16])
def test_a_file_with_places_outside(wrong, tmp_path):
    _, adapter = attached(SHiRA(1))
    file = adapter.save(tmp_path)
    with safe_open(file, "pt") as opened:
        header, tensors = opened.metadata(), {k: opened.get_tensor(k) for k in opened.keys()}  # noqa: SIM118
    tensors["0/row"][3] = wrong
    save_file(tensors, file, header)
    with pytest.raises(FileFormatError, match="lies from 0 to 15"):
        rw.load(nn.Sequential(nn.Linear(24, 16)).double(), tmp_path, any_base=True)


# -- PEFT -----------------------------------------------------------------------------------------

CONFIGS = {
    "fourierft_spectrum": lambda: peft.FourierFTConfig(n_frequency=40, target_modules=["0"]),
    "waveft_spectrum": lambda: peft.WaveFTConfig(n_frequency=40, target_modules=["0"]),
    "shira_weight": lambda: peft.ShiraConfig(r=1, target_modules=["0"]),
    "c3a_kernel": lambda: peft.C3AConfig(block_size=8, target_modules=["0"]),
}


def layer() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 16))


def saved(name, path):
    """A PEFT model with random factors, saved."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(layer(), CONFIGS[name]())
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.normal_()
        model.save_pretrained(path)
    return model


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # PEFT's SHiRA
@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_are_pefts(name, tmp_path):
    theirs, ours = saved(name, tmp_path), layer()
    adapter = rw.formats.peft.load(ours, tmp_path, trainable=True)
    x, g = torch.randn(5, 24), torch.randn(5, 16)
    (want,) = torch.autograd.grad(theirs(x), [p for n, p in theirs.named_parameters() if name in n], g)
    (found,) = torch.autograd.grad(ours(x), list(adapter.parameters()), g)
    want = want * 24 if name == "c3a_kernel" else want  # our kernel is PEFT's over the inputs
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))


@pytest.mark.parametrize("settings", [{"wavelet_family": "db2"}, {"use_idwt": False}], ids=str)
def test_other_wavelets_are_not_read(settings, tmp_path):
    saved("waveft_spectrum", tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    with pytest.raises(ConversionError, match="Haar wavelets"):
        rw.formats.peft.load(layer(), tmp_path)


def test_places_outside_of_the_layer_are_not_read(tmp_path):
    saved("shira_weight", tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    next(v for k, v in tensors.items() if "indices" in k)[0, 5] = 16
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(FileFormatError, match="chooses others"):
        rw.formats.peft.load(layer(), tmp_path)


@pytest.mark.parametrize("structure", [FourierFT(40), WaveFT(40)], ids=repr)
def test_places_of_no_seed_are_not_written(structure, tmp_path):
    adapter = rw.attach(layer(), rw.Recipe(structure))
    rw.export(adapter, tmp_path / "fine", to="peft")
    with torch.no_grad():
        adapter["0"]["row"].copy_(adapter["0"]["row"].flip(0))
    with pytest.raises(ConversionError, match="not of seed=777"):
        rw.export(adapter, tmp_path / "moved", to="peft")


def test_one_rank_for_all_sites(tmp_path):
    model = nn.Sequential(nn.Linear(24, 16), nn.Linear(16, 24))
    recipe = rw.Recipe(SHiRA(1), sites=rw.Sites(("0", "1"), overrides={"1": SHiRA(2)}))
    with pytest.raises(ConversionError, match="one r for all sites"):
        rw.export(rw.attach(model, recipe), tmp_path, to="peft")


@pytest.mark.parametrize("structure", [FouRA(3), FourierFT(4)], ids=repr)
def test_what_is_low_rank_is_written_as_lora_where_peft_has_no_method(structure, tmp_path):
    """FouRA anywhere; FourierFT on a convolution."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(24, 16, 1)) if isinstance(structure, FourierFT) else layer()
    x = torch.randn(2, 24, 3, 3) if isinstance(structure, FourierFT) else torch.randn(5, 24)
    adapter = rw.attach(base, rw.Recipe(structure, sites=rw.Sites(("0",))))
    with torch.no_grad():
        for p in adapter.parameters():
            p.normal_()
        y = base(x)
    assert rw.export(adapter, tmp_path, to="peft").method == "LORA"
    adapter.detach()
    theirs = peft.PeftModel.from_pretrained(base, tmp_path)
    torch.testing.assert_close(theirs(x), y, rtol=1e-5, atol=1e-5)
