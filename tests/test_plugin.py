"""examples/plugin: the laws hold for it, and rankwise finds it where it is installed, and only there."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from rankwise.ops.linalg import truncated_svd
from rankwise.structures import LoRA
from rankwise.testing import SAMPLES, check_init, check_solver, check_structure

PLUGIN = Path(__file__).parents[1] / "examples" / "plugin"


@pytest.fixture
def extras(monkeypatch):
    monkeypatch.syspath_prepend(str(PLUGIN))
    import rankwise_extras  # pyright: ignore[reportMissingImports]

    return rankwise_extras


def test_the_laws_hold(extras):
    structure = extras.LoRAXS(4, 4.0)
    figures = check_structure(structure, known=[extras.LoRAXS])
    assert {"L1", "L2", "L3", "L4"} <= set(figures)
    check_init(extras.Frames(), [*SAMPLES, structure])
    check_init(extras.Minor())
    check_solver(extras.ScaledAdamW())


def test_minor_starts_at_the_last_triplets(extras):
    w = torch.nn.Linear(12, 8).double().weight.detach()
    recipe = extras.milora(rank=3)
    f = recipe.init(_site(w), LoRA(3, 6.0), lambda: w, None)
    u, s, v = (t[..., -3:] for t in truncated_svd(w, 8))
    torch.testing.assert_close(2.0 * f["b"] @ f["a"], u * s @ v.mT)


def test_a_scaled_step_does_not_depend_on_the_gauge(extras):
    """B Q, Q^-1 A is the same update; so is its preconditioned gradient's first-order change."""
    torch.manual_seed(0)
    changes = []
    q = torch.diag(torch.tensor([1.0, 10.0], dtype=torch.float64))
    a, b = torch.randn(2, 6, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    g = torch.randn(5, 6, dtype=torch.float64)
    for left, right in ((b, a), (b @ q, q.inverse() @ a)):
        f = {"a": torch.nn.Parameter(right.clone()), "b": torch.nn.Parameter(left.clone())}
        ((f["b"] @ f["a"]) * g).sum().backward()
        extras.ScaledAdamW(damping=0.0)._precondition([_Holder(f)])
        grad_a, grad_b = f["a"].grad, f["b"].grad
        assert grad_a is not None and grad_b is not None
        changes.append(f["b"].detach() @ grad_a + grad_b @ f["a"].detach())
    torch.testing.assert_close(*changes)


class _Holder:
    def __init__(self, factors):
        self._factors = factors

    def factors(self):
        return self._factors


def _site(w):
    from rankwise.host import host_of

    layer = torch.nn.Linear(w.shape[1], w.shape[0]).double()
    return host_of(layer, "layer").site("layer")


# -- through entry points, in processes of their own ------------------------------------------

INSTALLED = """
import sys, torch, rankwise as rw
from rankwise.registry import choices
torch.manual_seed(0)
assert "rankwise_extras" not in sys.modules
names = set(rw.catalogue())
assert {"lora_xs", "milora", "lora"} <= names, names
recipe = rw.recipe("lora_xs", rank=2)
assert choices("structures")["rankwise_extras:LoRAXS"] is type(recipe.structure)
assert {"rankwise_extras:Frames", "rankwise_extras:Minor"} <= set(choices("inits"))
solver = choices("solvers")["rankwise_extras:ScaledAdamW"]()
model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4))
torch.save(model.state_dict(), sys.argv[1] + "/base.pt")
x = torch.randn(3, 6)
rw.attach(model, rw.recipe("milora", rank=2, solver=solver)).detach()
adapter = rw.attach(model, recipe)
optimizer = adapter.optimizer(0.1)
model(x).square().sum().backward()
optimizer.step()
adapter.save(sys.argv[1])
torch.save((x, model(x).detach()), sys.argv[1] + "/outputs.pt")
print(sum(p.numel() for p in adapter.parameters()))
"""
LOADS = """
import sys, torch, rankwise as rw
model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4))
model.load_state_dict(torch.load(sys.argv[1] + "/base.pt"))
try:
    rw.load(model, sys.argv[1])
except rw.errors.FileFormatError as error:
    print("FileFormatError", error)
else:
    x, y = torch.load(sys.argv[1] + "/outputs.pt")
    print("equal", torch.equal(model(x), y))
"""


def installed(folder: Path) -> Path:
    """What ``pip install`` leaves for importlib.metadata, made from the example's own pyproject.toml."""
    project = tomllib.loads((PLUGIN / "pyproject.toml").read_text())["project"]
    info = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    groups = (
        f"[{group}]\n" + "\n".join(f"{name} = {where}" for name, where in points.items())
        for group, points in project["entry-points"].items()
    )
    (info / "entry_points.txt").write_text("\n\n".join(groups) + "\n")
    (folder / "rankwise_extras.py").write_text((PLUGIN / "rankwise_extras.py").read_text())
    return folder


def run(code: str, argument: Path, path: Path | None) -> str:
    source = str(PLUGIN.parents[1] / "src")
    found = subprocess.run(
        [sys.executable, "-c", code, str(argument)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(path), source] if path else [source])},
    )
    assert found.returncode == 0, found.stderr
    return found.stdout


@pytest.mark.slow
def test_found_where_it_is_installed_and_only_there(tmp_path):
    there, out = installed(tmp_path / "site"), tmp_path / "out"
    out.mkdir()
    assert run(INSTALLED, out, there) == "8\n"  # two sites of 2 x 2
    assert run(LOADS, out, there) == "equal True\n"
    refused = run(LOADS, out, None)
    assert refused.startswith("FileFormatError") and "rankwise_extras:LoRAXS" in refused
