"""Models of transformers: adapt, train a step, save, load, merge; compile; autocast."""

import copy
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

import rankwise as rw
from rankwise.testing import randomise

IDS = torch.arange(22).reshape(2, 11) * 7 % 64
TEXT = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
PADS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MOE = {**TEXT, **HEADS, **PADS, "num_local_experts": 4, "num_experts_per_tok": 2}


@dataclass(frozen=True)
class Case:
    """A model and where it is adapted."""

    name: str
    make: Any
    inputs: dict[str, Tensor]
    sites: rw.Sites = rw.Sites()
    count: int = 0
    more: dict[str, Any] = field(default_factory=dict)  # options of DoRA


CASES = [
    Case("llama", lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**TEXT, **HEADS)), {"input_ids": IDS}, count=14),
    Case(
        "gpt2",
        lambda: tf.GPT2LMHeadModel(
            tf.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32, **PADS)
        ),
        {"input_ids": IDS},
        count=8,
    ),
    Case(
        "gpt2, q and v of c_attn",
        lambda: tf.GPT2LMHeadModel(
            tf.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32, **PADS)
        ),
        {"input_ids": IDS},
        rw.Sites("c_attn", parts={"c_attn": ("q", "v")}),
        count=2,
    ),
    Case(
        "phi3, q and v of qkv, gate of gate_up",
        lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**TEXT, **HEADS, **PADS)),
        {"input_ids": IDS},
        rw.Sites(["qkv_proj", "gate_up_proj"], parts={"qkv_proj": ("q", "v"), "gate_up_proj": ("gate",)}),
        count=4,
    ),
    Case(
        "bert",
        lambda: tf.BertForSequenceClassification(
            tf.BertConfig(**TEXT, num_attention_heads=4, max_position_embeddings=32)
        ),
        {"input_ids": IDS},
        rw.Sites(train="classifier"),
        count=15,
    ),
    Case(
        "vit",
        lambda: tf.ViTForImageClassification(
            tf.ViTConfig(
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                image_size=8,
                patch_size=4,
            )
        ),
        {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 64).reshape(2, 3, 8, 8)},
        rw.Sites(["all-linear", nn.Conv2d]),
        count=13,
    ),
    Case("mixtral", lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**MOE)), {"input_ids": IDS}, count=12),
    Case(
        "qwen3 moe",
        lambda: tf.Qwen3MoeForCausalLM(
            tf.Qwen3MoeConfig(
                **{k: v for k, v in MOE.items() if k != "num_local_experts"},
                num_experts=4,
                moe_intermediate_size=24,
                head_dim=8,
            )
        ),
        {"input_ids": IDS},
        count=12,
    ),
    Case("gpt-oss", lambda: tf.GptOssForCausalLM(tf.GptOssConfig(**MOE, head_dim=8)), {"input_ids": IDS}, count=12),
    Case(
        "llama4, whose router is a linear layer with a forward of its own",
        lambda: tf.Llama4ForCausalLM(
            tf.Llama4TextConfig(**{**MOE, "num_experts_per_tok": 1}, intermediate_size_mlp=48, head_dim=8)
        ),
        {"input_ids": IDS},
        count=20,
        more={"recompute": True},  # it adds to the shared expert's output in place
    ),
    Case(
        "mamba, which reads dt_proj's weight itself",
        lambda: tf.MambaForCausalLM(
            tf.MambaConfig(vocab_size=64, hidden_size=32, state_size=4, num_hidden_layers=2, time_step_rank=4, **PADS)
        ),
        {"input_ids": IDS},
        count=8,
    ),
    Case(
        "wavlm, whose attention reads its projections' weights itself",
        lambda: tf.WavLMForCTC(
            tf.WavLMConfig(
                **{**TEXT, "num_attention_heads": 4},
                conv_dim=(32, 32),
                conv_kernel=(4, 4),
                conv_stride=(4, 4),
                num_conv_pos_embeddings=4,
                num_conv_pos_embedding_groups=2,
                num_buckets=8,
                apply_spec_augment=False,
                layerdrop=0.0,
                **PADS,
            )
        ),
        {"input_values": torch.linspace(-1, 1, 320).sin().reshape(2, 160)},
        rw.Sites(exclude="gru_rel_pos_linear"),
        count=13,
    ),
]
METHODS = {"lora": {"rank": 4}, "dora": {"rank": 4}, "oft": {"block": 4}}


def made(case: Case) -> Any:
    torch.manual_seed(0)
    model = case.make().eval()
    with torch.no_grad():  # transformers starts its weights at 0.02: too small to tell things apart
        for p in model.parameters():
            p.mul_(4) if p.dim() > 1 else None
    return model


def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs).logits


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_a_life(case, method, tmp_path):
    base = made(case)
    names = [n for n, _ in base.named_parameters()]
    model = copy.deepcopy(base)
    options = METHODS[method] | (case.more if method == "dora" else {})
    adapter = rw.attach(model, rw.recipe(method, **options, sites=case.sites))
    assert len(adapter) == case.count
    assert [n for n, _ in model.named_parameters() if ".adapters." not in n] == names
    with torch.no_grad():
        start = logits(base, case.inputs)
        torch.testing.assert_close(logits(model, case.inputs), start, rtol=1e-4, atol=1e-5)
        randomise(adapter, lambda: logits(model, case.inputs))
    optimizer = adapter.optimizer(lr=1e-3)
    y = logits(model.train(), case.inputs)
    (y - torch.randn_like(y)).square().mean().backward()
    silent = [n for n, p in adapter.named_parameters(trainable=True) if p.grad is None]
    assert not silent
    assert all(p.grad is None for n, p in model.named_parameters() if ".adapters." not in n)
    optimizer.step()
    with torch.no_grad():
        want = logits(model.eval(), case.inputs)
        adapter.save(tmp_path / "adapter")
        other = copy.deepcopy(base)
        rw.load(other, tmp_path / "adapter")
        assert torch.equal(logits(other, case.inputs), want)
        with rw.merged(other):
            inside = logits(other, case.inputs)
        rw.merge(other)
        assert torch.equal(logits(other, case.inputs), inside)
        torch.testing.assert_close(inside, want, rtol=1e-4, atol=1e-4)
        model.save_pretrained(tmp_path / "model")
        again = type(base).from_pretrained(tmp_path / "model").eval()
        assert torch.equal(logits(again, case.inputs), start)


@pytest.mark.parametrize("method", ["lora", "dora", "lora_fa", "vera"])
def test_compiled_whole(method):
    torch._dynamo.reset()
    case = CASES[0]
    torch.manual_seed(0)
    config = tf.LlamaConfig(**{**TEXT, "num_hidden_layers": 1}, **HEADS)
    model = tf.LlamaForCausalLM(config)
    adapter = rw.attach(model, rw.recipe(method, rank=4))
    randomise(adapter, lambda: logits(model, case.inputs))
    parameters = list(adapter.parameters())

    def run(f: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
        y = f(input_ids=IDS, use_cache=False).logits
        return y, torch.autograd.grad(y.square().mean(), parameters)

    want, grads = run(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    got, compiled_grads = run(compiled)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(compiled_grads, grads, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_autocast(method):
    case = CASES[0]
    model = made(case)
    adapter = rw.attach(model, rw.recipe(method, **METHODS[method]))
    randomise(adapter, lambda: logits(model, case.inputs))
    want = logits(model, case.inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = logits(model, case.inputs)
    assert got.dtype == torch.bfloat16
    assert float((got.float() - want).detach().norm() / want.detach().norm()) < 0.05
    got.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in adapter.parameters())


def test_routed_batch_of_a_model():
    case = CASES[0]
    model = made(case)
    for name, method in (("one", "dora"), ("two", "oft")):
        adapter = rw.attach(model, rw.recipe(method, **METHODS[method]), name)
        randomise(adapter, lambda: logits(model, case.inputs))
    ids = torch.cat([IDS, IDS[:1]])
    rows = ["two", None, "one"]
    with torch.no_grad(), rw.route(model, rows):
        got = logits(model, {"input_ids": ids})
    for i, row in enumerate(rows):
        with torch.no_grad(), rw.set_active(model, row):
            want = logits(model, {"input_ids": ids[i : i + 1]})
        torch.testing.assert_close(got[i : i + 1], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("case", "name", "parts"),
    [(CASES[8], "gate_up_proj", ("gate",)), ("neox", "query_key_value", ("q",))],
    ids=["gpt-oss", "neox"],
)
def test_interleaved_parts_are_refused(case, name, parts):
    neox = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**neox)) if case == "neox" else case.make()
    with pytest.raises(rw.errors.TargetError, match="interleaved"):
        rw.attach(model, rw.recipe("lora", rank=2, sites=rw.Sites(name, parts={name: parts})))
    assert not rw.adapters(model)
