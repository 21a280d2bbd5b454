"""Adapter files: what is in them, what comes back, and which files are refused."""

from __future__ import annotations

import copy
import hashlib
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import rankwise as rw
from rankwise.errors import BaseMismatch, FileFormatError, IncompatibleAxes, SaveError
from rankwise.host import Host, Site
from rankwise.structures import Factor, Factors, LoRA
from rankwise.structures.structure import LeafStart, Structure
from tiny_models import METHODS, frozen_look, llama, plain, same_look, shake, tokens

FILE = "adapter.safetensors"


def out(model: nn.Module, x: Tensor | None = None) -> Tensor:
    """The model's output without gradient, in eval mode."""
    model.eval()
    with torch.no_grad():
        y = model(tokens() if x is None else x)
    return getattr(y, "logits", y)


def header(path: Path) -> dict[str, str]:
    with safe_open(path / FILE, framework="pt") as archive:
        return archive.metadata()


# -- what comes back --------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_outputs_are_bit_equal_after_load(method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = llama()
    adapter = rw.attach(model, rw.recipe(method, **METHODS[method]))
    shake(adapter)
    y = out(model)
    adapter.save(tmp_path)
    other = llama()
    loaded = rw.load(other, tmp_path)
    assert torch.equal(out(other), y)
    assert loaded.recipe == adapter.recipe and list(loaded) == list(adapter)
    assert not any(p.requires_grad for p in loaded.parameters(trainable=False))
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and method in said and "frozen" in said


def test_a_single_layer_as_the_whole_model(tmp_path: Path) -> None:
    layer = nn.Linear(8, 8)
    adapter = rw.attach(layer, rw.recipe("lora", rank=2))
    shake(adapter)
    x = torch.randn(3, 8)
    y = out(layer, x)
    adapter.save(tmp_path)
    adapter.detach()
    assert type(layer) is nn.Linear
    rw.load(layer, tmp_path)
    assert torch.equal(out(layer, x), y)


@pytest.mark.parametrize("key", ["a b", "über", "down/0", "conv:1", "keys"])
def test_unusual_module_names(key: str, tmp_path: Path) -> None:
    def make() -> nn.Module:
        torch.manual_seed(1)
        inner = nn.Linear(8, 8)
        model = nn.Sequential()
        model.add_module(key, inner)
        return model

    model = make()
    adapter = rw.attach(model, rw.recipe("lora", rank=2))
    shake(adapter)
    adapter.save(tmp_path)
    other = make()
    rw.load(other, tmp_path)
    x = torch.randn(3, 8)
    assert torch.equal(out(model, x), out(other, x))


def test_the_base_in_another_dtype_is_the_same_base(tmp_path: Path) -> None:
    adapter = rw.attach(llama(), rw.recipe("dora", rank=4))
    shake(adapter)
    adapter.save(tmp_path)
    model = llama().bfloat16()
    loaded = rw.load(model, tmp_path)
    assert {p.dtype for p in loaded.parameters(False)} == {torch.float32}
    assert out(model).isfinite().all()


@pytest.mark.parametrize("freeze", [True, False])
def test_batch_norms_of_a_frozen_base_keep_their_statistics(freeze: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8, affine=False))
    base(torch.randn(4, 3, 8, 8))
    model, x = copy.deepcopy(base), torch.randn(4, 3, 8, 8)
    sites = rw.Sites("all-conv", train="1")  # one norm's scale and shift are trained, and saved
    adapter = rw.attach(model, rw.recipe("lora", rank=2, sites=sites), freeze=freeze)
    optimizer = adapter.optimizer(lr=0.1)
    for _ in range(3):
        model.train()(x).square().sum().backward()
        optimizer.step()
    adapter.save(tmp_path)
    same = [torch.equal(model[i].running_mean, base[i].running_mean) for i in (1, 3)]
    assert same == [freeze, True]  # what has no parameters never trains
    if freeze:
        other = copy.deepcopy(base).eval()
        rw.load(other, tmp_path)
        assert torch.equal(other(x), model.eval()(x))
    adapter.detach()
    model.train()(x)
    assert not torch.equal(model[3].running_mean, base[3].running_mean)


def test_going_on_where_training_stopped(tmp_path: Path) -> None:
    def step(adapter: rw.Adapter, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        adapter.model.train()
        adapter.model(input_ids=tokens(), labels=tokens()).loss.backward()
        optimizer.step()

    recipe = rw.recipe("lora_plus", rank=4)
    adapter = rw.attach(llama(), recipe)
    optimizer = adapter.optimizer()
    step(adapter, optimizer)
    adapter.save(tmp_path)
    state = copy.deepcopy(optimizer.state_dict())
    step(adapter, optimizer)

    resumed = rw.load(llama(), tmp_path, trainable=True)
    again = resumed.optimizer()
    groups = [{k: v for k, v in g.items() if k != "params"} for g in again.param_groups]
    assert groups == [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    assert [g["name"] for g in again.param_groups] == ["in side", "out side"]
    again.load_state_dict(state)
    step(resumed, again)
    for (name, one), (_, two) in zip(adapter.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(one, two), name
    trained = {n for n, p in resumed.model.named_parameters() if p.requires_grad}
    assert trained and all(".adapters." in n for n in trained)


# -- what is in the file ----------------------------------------------------------------------


def test_header(tmp_path: Path) -> None:
    adapter = rw.attach(llama(), rw.recipe("dora", rank=4, dropout=0.1))
    file = adapter.save(tmp_path / "a" / "b")
    assert file == tmp_path / "a" / "b" / FILE
    assert [p.name for p in file.parent.iterdir()] == [FILE]
    found = header(file.parent)
    assert found["format"] == "rankwise" and found["version"] == rw.__version__
    recipe = json.loads(found["recipe"])
    assert recipe["type"] == "Recipe" and recipe["structure"]["inner"]["rank"] == 4
    base = json.loads(found["base"])
    assert base.keys() == set(adapter)
    held = load_file(file)
    assert held.keys() == {n for n, _ in adapter.named_parameters()}


def test_size_is_that_of_the_tensors(tmp_path: Path) -> None:
    # rank 8 on twelve blocks of width 256: 84 sites, about 2 MB
    model = llama(hidden_size=256, intermediate_size=512, num_hidden_layers=12)
    adapter = rw.attach(model, rw.recipe("lora", rank=8))
    size = adapter.save(tmp_path).stat().st_size
    tensors = sum(p.numel() * p.element_size() for p in adapter.parameters(trainable=False))
    assert tensors < size < 1.05 * tensors


def test_the_same_adapter_gives_the_same_bytes(tmp_path: Path) -> None:
    code = (
        "import sys, torch, rankwise as rw\n"
        "torch.manual_seed(0)\n"
        "m = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 4))\n"
        "rw.attach(m, rw.recipe('dora', rank=2)).save(sys.argv[1])\n"
    )
    for i in range(2):
        subprocess.run([sys.executable, "-c", code, tmp_path / str(i)], check=True)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    adapter = rw.attach(model, rw.recipe("dora", rank=2))
    for i in range(2, 5):
        adapter.save(tmp_path / str(i))
    digests = {hashlib.sha256((tmp_path / str(i) / FILE).read_bytes()).digest() for i in range(5)}
    assert len(digests) == 1


def test_a_shared_adapter_is_stored_once(tmp_path: Path) -> None:
    recipe = rw.recipe("lora", rank=4, sites=rw.Sites(targets="embedding", tied="tie"))
    model = llama(tie_word_embeddings=True)
    adapter = rw.attach(model, recipe)
    assert list(adapter) == ["model.embed_tokens"]
    shake(adapter)
    held = load_file(adapter.save(tmp_path))
    assert held.keys() == {"model.embed_tokens/a", "model.embed_tokens/b"}
    other = llama(tie_word_embeddings=True)
    rw.load(other, tmp_path)
    assert torch.equal(out(other), out(model))


# -- which values of the base count ---------------------------------------------------------


def test_a_fresh_head_and_fresh_rows_are_not_part_of_the_fingerprint(tmp_path: Path) -> None:
    sites = rw.Sites(train="lm_head", tokens={"embed_tokens": [64, 65]})

    def base(seed: int) -> Any:
        model = llama()
        torch.manual_seed(seed)
        model.resize_token_embeddings(66, mean_resizing=False)
        nn.init.normal_(model.lm_head.weight)
        return model

    model = base(1)
    adapter = rw.attach(model, rw.recipe("lora", rank=4, sites=sites))
    shake(adapter)
    held = load_file(adapter.save(tmp_path))
    assert held["model.embed_tokens/rows"].shape == (2, 32)
    other = base(2)
    assert not torch.equal(other.lm_head.weight, model.lm_head.weight)
    rw.load(other, tmp_path)
    x = torch.tensor([[1, 64, 65, 3]])
    assert torch.equal(out(other, x), out(model, x))


def test_another_base_is_refused(tmp_path: Path) -> None:
    adapter = rw.attach(plain(), rw.recipe("lora", rank=2))
    adapter.save(tmp_path)
    for other, what in (
        (plain(seed=9), "other weights"),
        (nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 16)), "24 x 16"),
        (nn.Sequential(nn.Linear(16, 24)), "does not have"),
        (nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.LayerNorm(16)), "made for"),
    ):
        look = frozen_look(other)
        with pytest.raises(BaseMismatch, match=what):
            rw.load(other, tmp_path)
        assert same_look(look, frozen_look(other))
    rw.load(plain(seed=9), tmp_path, any_base=True)


# -- files that cannot be written ----------------------------------------------------------


def test_a_disk_that_fills(tmp_path: Path) -> None:
    code = (
        "import resource, sys, torch, rankwise as rw\n"
        "m = torch.nn.Sequential(torch.nn.Linear(512, 512))\n"
        "a = rw.attach(m, rw.recipe('lora', rank=64))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))\n"
        "try:\n"
        "    a.save(sys.argv[1])\n"
        "except rw.errors.SaveError as error:\n"
        "    sys.exit('SaveError: ' + str(error))\n"
    )
    first = rw.attach(plain(), rw.recipe("lora", rank=2))
    bytes_ = first.save(tmp_path).read_bytes()
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("SaveError: A file is written whole")
    assert [p.name for p in tmp_path.iterdir()] == [FILE]
    assert (tmp_path / FILE).read_bytes() == bytes_


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_write_leaves_nothing(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = rw.attach(plain(), rw.recipe("lora", rank=2))
    bytes_ = adapter.save(tmp_path).read_bytes()
    shake(adapter)

    def fails(*_: Any) -> None:
        raise error

    monkeypatch.setattr("os.fsync", fails)
    with pytest.raises((SaveError, KeyboardInterrupt)):
        adapter.save(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [FILE]
    assert (tmp_path / FILE).read_bytes() == bytes_


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SaveError, match="choose another folder"):
        rw.attach(plain(), rw.recipe("lora", rank=2)).save(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_what_cannot_be_saved_is_refused_before_training() -> None:
    model = plain()
    look = frozen_look(model)
    structure = LoRA(rank=2, alpha=torch.tensor(2.0))
    with pytest.raises(IncompatibleAxes, match="numbers, strings"):
        rw.attach(model, rw.Recipe(structure))
    assert same_look(look, frozen_look(model))


# -- foreign, damaged and hostile files ----------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with a good adapter for ``plain()``."""
    rw.attach(plain(), rw.recipe("lora", rank=2)).save(tmp_path)
    return tmp_path


def refused(path: Path, what: str, error: type[Exception] = FileFormatError) -> None:
    """Loading raises, and leaves the model as it was."""
    model = plain()
    look = frozen_look(model)
    with pytest.raises(error, match=what):
        rw.load(model, path)
    assert same_look(look, frozen_look(model))


def rewrite(path: Path, edit: Callable[[dict[str, Tensor], dict[str, Any]], None]) -> None:
    """Change tensors and header of a saved adapter; recipe, placements and base come decoded."""
    tensors, meta = load_file(path / FILE), header(path)
    open_: dict[str, Any] = {k: json.loads(v) if k in ("recipe", "placements", "base") else v for k, v in meta.items()}
    edit(tensors, open_)
    save_file(tensors, path / FILE, {k: v if isinstance(v, str) else json.dumps(v) for k, v in open_.items()})


def test_missing_and_foreign_files(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "found none at")
    save_file({"x": torch.ones(1)}, tmp_path / FILE)
    refused(tmp_path, "says nothing")
    save_file({"x": torch.ones(1)}, tmp_path / FILE, {"rankwise_format": "99"})
    refused(tmp_path, "99")


def test_others_may_read_a_saved_adapter(saved: Path) -> None:
    assert (saved / FILE).stat().st_mode & 0o777 == 0o644
    assert [file.name for file in saved.iterdir()] == [FILE]


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_truncated(saved: Path, share: float) -> None:
    bytes_ = (saved / FILE).read_bytes()
    (saved / FILE).write_bytes(bytes_[: int(share * len(bytes_))])
    refused(saved, "truncated or damaged")


class _Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("a pickle was opened",)


def test_pickle_under_our_name(saved: Path) -> None:
    (saved / FILE).write_bytes(pickle.dumps(_Bomb()))
    refused(saved, "truncated or damaged")
    torch.save({"a": _Bomb()}, saved / FILE)
    refused(saved, "truncated or damaged")


def test_every_flipped_byte_of_the_header_is_refused_or_harmless(saved: Path) -> None:
    bytes_ = bytearray((saved / FILE).read_bytes())
    end = 8 + int.from_bytes(bytes_[:8], "little")
    for at in range(8, end, 23):
        damaged = bytearray(bytes_)
        damaged[at] ^= 0x15
        (saved / FILE).write_bytes(bytes(damaged))
        model = plain()
        try:
            rw.load(model, saved)
        except (FileFormatError, BaseMismatch):
            assert type(model[0]) is nn.Linear


def _tensor(name: str, value: Tensor) -> Callable[[dict[str, Tensor], dict[str, Any]], None]:
    return lambda t, h: t.__setitem__(name, value)


def _recipe(**fields: Any) -> Callable[[dict[str, Tensor], dict[str, Any]], None]:
    return lambda t, h: h["recipe"].update(fields)


def _site(**fields: Any) -> Callable[[dict[str, Tensor], dict[str, Any]], None]:
    return lambda t, h: h["placements"][0][0].update(fields)


def _put(key: str, value: Any) -> Callable[[dict[str, Tensor], dict[str, Any]], None]:
    return lambda t, h: h.__setitem__(key, value)


def _structure(value: Any) -> Callable[[dict[str, Tensor], dict[str, Any]], None]:
    return lambda t, h: h["placements"][0].__setitem__(1, value)


HOSTILE: dict[str, Callable[[dict[str, Tensor], dict[str, Any]], None]] = {
    "wrong shape": _tensor("0/a", torch.ones(3, 16)),
    "wrong dims": _tensor("0/a", torch.ones(2, 16, 1)),
    "integers": _tensor("0/a", torch.ones(2, 16, dtype=torch.int64)),
    "NaN": _tensor("0/b", torch.full((24, 2), float("nan"))),
    "infinite": _tensor("2/b", torch.full((16, 2), float("inf"))),
    "extra tensor": _tensor("0/c", torch.ones(1)),
    "extra site": _tensor("1/a", torch.ones(1)),
    "path traversal in a tensor": _tensor("../../evil/a", torch.ones(1)),
    "missing tensor": lambda t, h: t.__delitem__("0/a"),
    "unknown structure": _recipe(structure={"type": "Nonsense", "rank": 2}),
    "not ours to import": _recipe(structure={"type": "subprocess:Popen", "args": ["true"]}),
    "a type that is a number": _recipe(structure={"type": 3}),
    "a structure that is none": _recipe(structure={"type": "Target", "pattern": "x"}),
    "a structure that is text": _recipe(structure="LoRA"),
    "an unknown field": _recipe(structure={"type": "LoRA", "rank": 2, "evil": 1}),
    "an unknown axis": _recipe(evil=1),
    "clashing axes": _recipe(init={"type": "Principal"}),
    "a solver as init": _recipe(init={"type": "AdamW"}),
    "sites that are none": _recipe(sites=3),
    "rank as text": _structure({"type": "LoRA", "rank": "2", "alpha": 2}),
    "rank zero": _structure({"type": "LoRA", "rank": 0, "alpha": 2}),
    "rank as a list": _structure({"type": "LoRA", "rank": [2], "alpha": 2}),
    "alpha as text": _structure({"type": "LoRA", "rank": 2, "alpha": "2"}),
    "infinite alpha": _structure({"type": "LoRA", "rank": 2, "alpha": float("inf")}),
    "scale as text": _structure({"type": "LoRA", "rank": 2, "scale_rule": ["x"]}),
    "a recipe as structure": _structure({"type": "Recipe", "structure": {"type": "LoRA"}}),
    "no structure": _structure(None),
    "a huge block": _structure({"type": "OFT", "block": 10**15}),
    "a site without rows": lambda t, h: h["placements"][0][0].__delitem__("rows"),
    "rows as text": _site(rows="24"),
    "endless columns": _site(cols=10**15),
    "path traversal in a site": _site(name="../../evil"),
    "a site that is a list": _site(name=["0"]),
    "an unknown fact": _site(evil=1),
    "no carriers": lambda t, h: h["placements"][0].__setitem__(2, []),
    "carriers as text": lambda t, h: h["placements"][0].__setitem__(2, "0"),
    "a slot that is a method": lambda t, h: h["placements"][0].__setitem__(2, [["0", "forward", False]]),
    "two adapters at one place": lambda t, h: h["placements"].append(h["placements"][0]),
    "a recipe that is a list": _put("recipe", []),
    "a recipe that is a number": _put("recipe", 3),
    "a recipe that is an axis": _put("recipe", {"type": "LoRA"}),
    "endless nesting": _put("recipe", "[" * 20000 + "]" * 20000),
    "placements as a dict": _put("placements", {}),
    "placements as a number": _put("placements", 3),
    "no placements": _put("placements", []),
    "no base": lambda t, h: h.__delitem__("base"),
    "base as a number": _put("base", 3),
    "base as text": _put("base", {"0": "x"}),
    "base of nothing": _put("base", {}),
    "no version": lambda t, h: h.__delitem__("version"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile(saved: Path, case: str) -> None:
    rewrite(saved, HOSTILE[case])
    refused(saved, ".", (FileFormatError, BaseMismatch))


def test_an_outside_name_is_not_imported(saved: Path) -> None:
    module = saved / "evil_module.py"
    module.write_text("raise SystemExit('imported')\n")
    sys.path.insert(0, str(saved))
    try:
        rewrite(saved, _recipe(structure={"type": "evil_module:Class"}))
        refused(saved, "known=")
        rewrite(saved, _structure({"type": "evil_module:Class"}))
    finally:
        sys.path.remove(str(saved))
    assert "evil_module" not in sys.modules


@final
@dataclass(frozen=True)
class Shift(Structure):
    """A structure from outside: y = W x + v."""

    size: float = 1.0

    traits = frozenset()

    def factors(self, site: Site) -> dict[str, Factor]:
        return {"v": Factor({"out": site.rows})}

    def start(self, site: Site, weight: Callable[[], Tensor], leaf: LeafStart) -> dict[str, Tensor]:
        return {"v": torch.zeros(site.rows)}

    def apply(self, f: Factors, x: Tensor, host: Host) -> Tensor:
        return host(x) + self.size * f["v"]

    def weight(self, f: Factors, w: Tensor) -> Tensor:
        return w


def test_a_structure_from_outside_is_handed_over(tmp_path: Path) -> None:
    model = plain()
    adapter = rw.attach(model, rw.Recipe(Shift(2.0)))
    shake(adapter)
    adapter.save(tmp_path)
    refused(tmp_path, "test_io:Shift")
    other = plain()
    rw.load(other, tmp_path, known=[Shift])
    x = torch.randn(2, 16)
    assert torch.equal(out(other, x), out(model, x))
