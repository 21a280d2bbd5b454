"""Two processes on a CPU: sharded and replicated training equal one process's."""

from __future__ import annotations

import os
import socket
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

import rankwise as rw
from rankwise import losses
from rankwise.errors import AttachError
from rankwise.hf.deferred import deferred_logits
from tiny_models import llama, shake, tokens

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="no gloo")
METHODS = ("lora", "dora", "scaled_adamw", "altlora", "share_lora", "tt_lora", "metatt", "vblora", "unilora")
OPTIONS = {"vblora": {"vectors": 8, "length": 8}, "unilora": {"size": 100}}


def adapted(method: str, **axes: Any) -> tuple[Any, rw.Adapter]:
    torch.manual_seed(4)
    model = llama()
    adapter = rw.attach(model, rw.recipe(method, rank=4, **OPTIONS.get(method, {}), **axes))
    shake(adapter, 0.05)
    return model.train(), adapter


def full(tensor: Tensor) -> Tensor:
    """A copy of the whole of a sharded tensor."""
    whole: Any = getattr(tensor, "full_tensor", None)
    return (whole() if whole is not None else tensor).detach().clone()


def chunked(wrapped: Any, adapter: rw.Adapter, mine: Tensor, rank: int, whole: bool) -> dict[str, Tensor]:
    """Gradients of an adapter on the head; the processes have unlike numbers of labels, so of chunks."""
    model = getattr(wrapped, "module", wrapped)
    labels = mine.masked_fill(torch.arange(mine.shape[1]) < 5 * rank, -100)
    with nullcontext() if whole else deferred_logits(model):
        wrapped(input_ids=mine, labels=labels, num_items_in_batch=20).loss.backward()
    return {name: full(p.grad) for name, p in adapter.named_parameters(trainable=True)}


def train(model: Any, adapter: rw.Adapter, mine: Tensor) -> dict[str, Tensor]:
    """Three steps on these rows: losses, first gradients and parameters afterwards."""
    found: dict[str, Tensor] = {}
    optimizer = adapter.optimizer(lr=1e-3)
    for step in range(3):
        optimizer.zero_grad()
        value = model(input_ids=mine, labels=mine).loss
        value.backward()
        value = value.detach().clone()
        if dist.is_initialized():
            dist.all_reduce(value)
            value /= dist.get_world_size()
        found[f"loss/{step}"] = value
        for name, parameter in adapter.named_parameters(trainable=True):
            if step == 0:
                assert parameter.grad is not None
                found[f"grad/{name}"] = full(parameter.grad)
        optimizer.step()
    return found | {f"value/{n}": full(p) for n, p in adapter.named_parameters()}


def worker(rank: int, port: int, folder: str) -> None:
    """One of two processes: FSDP2 and DDP with each method; rank 0 writes what it found."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    mine = tokens(4)[2 * rank : 2 * rank + 2]
    found: dict[str, Any] = {}
    for method in METHODS:
        model, adapter = adapted(method)
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        with pytest.raises(AttachError, match="before fully_shard"):
            rw.attach(model, rw.recipe("lora", rank=2), "late")
        found[f"fsdp/{method}"] = train(model, adapter, mine)
        adapter.save(Path(folder) / f"fsdp-{method}")
        with torch.no_grad(), rw.disabled(model):
            found[f"fsdp/{method}"]["base"] = model(tokens(4)).logits

        model, adapter = adapted(method)
        wrapped = nn.parallel.DistributedDataParallel(model)
        found[f"ddp/{method}"] = train(wrapped, adapter, mine)
        adapter.save(Path(folder) / f"ddp-{method}")
        with patch.object(losses, "CHUNK_BYTES", 4 * 64 * 5):
            for whole in (False, True):
                model, adapter = adapted(method, sites=rw.Sites(("attention", "lm_head")))
                wrapped = nn.parallel.DistributedDataParallel(model)
                found[f"ddp/{method}/{whole}"] = chunked(wrapped, adapter, mine, rank, whole)
                model, adapter = adapted(method, sites=rw.Sites(("attention", "lm_head")))
                for layer in model.model.layers:
                    fully_shard(layer, mesh=mesh)
                fully_shard(model, mesh=mesh)
                found[f"fsdp/{method}/{whole}"] = chunked(model, adapter, mine, rank, whole)
        fully_shard(alone := nn.Linear(4, 4), mesh=mesh)
        with pytest.raises(AttachError, match="unit of its own"):
            rw.linear_cross_entropy(alone, torch.ones(2, 4), torch.tensor([0, 1]))
    if rank == 0:
        torch.save(found, Path(folder) / "found.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(worker, (port, str(tmp_path)), nprocs=2)  # type: ignore[attr-defined]
    found = torch.load(tmp_path / "found.pt")
    for method in METHODS:
        model, adapter = adapted(method)
        expected = train(model, adapter, tokens(4))
        with torch.no_grad(), rw.disabled(model):
            base = model(tokens(4)).logits
        adapter.save(tmp_path / f"one-{method}")
        one = load_file(tmp_path / f"one-{method}" / "adapter.safetensors")
        for way in ("fsdp", "ddp"):
            for name, value in expected.items():
                near = (found[f"{way}/{method}"][name] - value).abs().max()
                assert near < 1e-6, f"{way} {method} {name}: {near}"
            file = tmp_path / f"{way}-{method}" / "adapter.safetensors"
            two = load_file(file)
            assert two.keys() == one.keys()
            assert all((two[n] - one[n]).abs().max() < 1e-6 for n in one)
            with (
                safe_open(file, "pt") as left,
                safe_open(tmp_path / f"one-{method}" / "adapter.safetensors", "pt") as right,
            ):
                assert left.metadata() == right.metadata()
            rw.load(llama(), file.parent)
        assert torch.allclose(found[f"fsdp/{method}"]["base"], base, atol=1e-6)
        expected = found[f"ddp/{method}/True"]
        for way in ("ddp/{}/False", "fsdp/{}/False", "fsdp/{}/True"):
            for name, value in found[way.format(method)].items():
                assert (value - expected[name]).abs().max() <= 1e-5 * expected[name].abs().max(), f"{way} {name}"
