"""The examples on other kinds of data, in a small setting: they learn, and what they save is what they trained."""

import contextlib
import importlib.util
import io
import sys
from pathlib import Path

import pytest
import torch

import rankwise as rw

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"


def example(name):
    """A script of examples/ as a module."""
    path = ROOT / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"example_{path.stem}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def needs(*names):
    paths = [DATA / name for name in names]
    missing = [name for name, path in zip(names, paths, strict=True) if not path.exists()]
    if missing:
        pytest.skip(f"data beside the repository is absent: {', '.join(missing)}")
    return [str(path) for path in paths]


def check_life(task, base, data, out, measure, wanted):
    """Saved equals loaded, merged equals unmerged, and the base is the file's."""
    rows = task.examples(data, None)
    _, held = task.split(rows, 0.1, 0)
    batch = task.collator(None)(held[:16])
    batches = [task.collator(None)(held[i : i + 50]) for i in range(0, len(held), 50)]
    model, untouched = (task.model(base, rows, None) for _ in range(2))
    with contextlib.redirect_stderr(io.StringIO()):
        rw.load(model, out)
    with torch.no_grad():
        assert task.score(model, batches, None)[measure] == pytest.approx(wanted[measure], rel=1e-4)
        adapted = outputs(model, batch)
        with rw.disabled(model):
            assert torch.equal(outputs(model, batch), outputs(untouched, batch))
        with rw.merged(model):
            torch.testing.assert_close(outputs(model, batch), adapted, rtol=1e-4, atol=1e-4)
        assert torch.equal(outputs(model, batch), adapted)
        rw.merge(model)
        torch.testing.assert_close(outputs(model, batch), adapted, rtol=1e-4, atol=1e-4)


def outputs(model, batch):
    found = model(**batch)
    return found["logits"] if "logits" in found else found["forecast"]


@pytest.mark.slow
def test_vision(tmp_path):
    vision = example("vision/adapt")
    weights, images, labels = needs(
        "weights_resnet20_cifar10/resnet20-12fca82f.th",
        "vision_mnist10k/t10k-images-idx3-ubyte.gz",
        "vision_mnist10k/t10k-labels-idx1-ubyte.gz",
    )
    task = vision.Digits(labels, train=800, test=200)
    result = vision.adapt(weights, images, task, str(tmp_path / "out"), epochs=1, batch=16)
    assert result.before["accuracy"] < 0.25  # ten new classes
    assert result.after["accuracy"] > result.before["accuracy"] + 0.25
    check_life(task, weights, images, result.out, "accuracy", result.after)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_timeseries(method, tmp_path):
    series = example("timeseries/forecast")
    (data,) = needs("ts_etth1/ETTh1.csv")
    base, task = str(tmp_path / "base.pt"), series.Forecast(stride=12)
    torch.save(series.pretrain(data, steps=100).state_dict(), base)
    result = series.adapt(base, data, task, str(tmp_path / "out"), method=method, steps=60)
    assert result.after["mse"] < 0.95 * result.before["mse"]
    assert result.after["mse"] < 0.95 * result.after["last_value"]
    check_life(task, base, data, result.out, "mse", result.after)
