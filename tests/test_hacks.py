"""Read this first: five ways to change the trainer, each a few lines on what it already exports.

    1  other attention on some layers     assign a function:      block.self_attn.attention = sliding
    2  a new optimizer                    pass a class:           mt.train(cfg, optimizer=Lion)
    3  a new block                        subclass the model:     mt.train(cfg, model=SideBySide(cfg.model))
    4  a new loss                         pass a function:        mt.train(cfg, loss_fn=z_loss)
    5  look inside while it trains        pass a function:        mt.train(cfg, on_step=look)

Nothing is registered and nothing here is special to tests: copy a hack into a file of yours, and change it. Hacks 3
and 4 also work without any Python of your own around them, from a TOML file; the last two tests show how.
Every hack is trained for some steps on documents that count upwards, and then asked whether it did what it should.
"""

import functools
import inspect
import math
import sys

import pytest
import torch
from conftest import read_metrics, tiny_run

import minitrain as mt
from minitrain.__main__ import run as main
from minitrain.attention import attention
from minitrain.batch import IGNORE
from minitrain.config import to_toml
from minitrain.models.layers import Attention, Block, SwiGLU


@pytest.fixture
def cfg(corpus, tmp_path):
    """A config as TOML gives it too: a Qwen3 of two layers, 30 steps of 128 tokens, on the CPU."""
    return tiny_run(corpus, tmp_path / "run", train={"steps": 30}, data={"tokens_per_row": 128})


def losses(cfg):
    return [row["loss"] for row in read_metrics(cfg.run_dir)]


# ---- 1. Other attention on some layers: any function of the signature of minitrain.attention.attention


def test_swap_attention_on_some_layers(cfg):
    sliding = functools.partial(attention, window=3)  # each token sees itself and three before it

    model = mt.build_model(cfg.model)  # on meta: no memory yet, train() gives it weights
    for i, block in model.layers.items():
        if int(i) % 2 == 0:
            block.self_attn.attention = sliding
    mt.train(cfg, model=model)

    assert losses(cfg)[-1] < losses(cfg)[0] / 2
    assert reach_of_token_0(model, "0") == 3  # the first layer slides
    assert reach_of_token_0(model, "1") == 19  # the second sees everything


def reach_of_token_0(model, layer):
    """The last of 20 tokens that hears of a change to the first one, after this layer."""
    hidden = []
    hook = model.layers[layer].register_forward_hook(lambda _module, _args, x_TD: hidden.append(x_TD))
    model.logits(torch.arange(20))
    model.logits(torch.tensor([50, *range(1, 20)]))
    hook.remove()
    return (hidden[0] - hidden[1]).abs().amax(-1).gt(1e-6).nonzero().max()


# ---- 2. A new optimizer: an ordinary torch.optim.Optimizer. It is handed fp32 weights and gradients, clipped and
#         averaged over the step; its state is saved and restored by the names of the parameters


class Lion(torch.optim.Optimizer):
    """Moves every weight by the learning rate, in the direction of momentum: Chen et al. 2023, arXiv:2302.06675."""

    def __init__(self, params, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr, (beta1, beta2) = group["lr"], group["betas"]
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                p.mul_(1 - lr * group["weight_decay"]).sub_(lr * momentum.lerp(p.grad, 1 - beta1).sign())
                momentum.lerp_(p.grad, 1 - beta2)


def test_train_with_a_new_optimizer(cfg, tmp_path):
    cfg.optim.lr, cfg.optim.warmup_steps, cfg.checkpoint.every = 1e-2, 0, 15
    weights = []
    mt.train(cfg, optimizer=Lion, on_step=lambda step, model, extras: weights.append(model.norm.weight.clone()))

    assert losses(cfg)[-1] < losses(cfg)[0] / 2
    assert torch.allclose((weights[0] - 1).abs(), torch.tensor(1e-2), atol=1e-6)  # by lr, up or down, from 1
    expected = losses(cfg)

    (tmp_path / "run/checkpoints/step-00000030").rename(tmp_path / "aside")
    mt.train(cfg, optimizer=Lion)  # goes on from step 15, with the momentum of then
    assert losses(cfg) == expected


# ---- 3. A new block: attention and feed-forward side by side, both on the block's input (as in GPT-J and PaLM)


class SideBySideBlock(Block):
    def forward(self, x_TD, rope, batch):
        seen_TD = self.self_attn(self.input_layernorm(x_TD), rope, batch)
        return x_TD + seen_TD + self.mlp(self.post_attention_layernorm(x_TD), batch)


class SideBySide(mt.Qwen3ForCausalLM):
    @staticmethod
    def block(cfg):
        return SideBySideBlock(cfg, Attention(cfg, qk_norm=True), SwiGLU(cfg.hidden_size, cfg.intermediate_size))


def test_train_a_new_block(cfg):
    with torch.device("meta"):
        model = SideBySide(cfg.model)
    mt.train(cfg, model=model)

    assert losses(cfg)[-1] < losses(cfg)[0] / 2
    inputs = []
    for norm in (model.layers["0"].input_layernorm, model.layers["0"].post_attention_layernorm):
        norm.register_forward_pre_hook(lambda _module, args: inputs.append(args[0]))
    model.logits(torch.arange(20))
    assert torch.equal(inputs[0], inputs[1])  # the feed-forward half does not wait for attention


# ---- 4. A new loss: (hidden, head, batch) -> a sum over trained tokens, and sums by name that are logged beside it


def z_loss(hidden_TD, head, batch, weight=1e-2):
    """Cross-entropy + weight * log(Z)^2, Z the softmax's denominator: keeps logits from drifting (as in PaLM)."""
    loss, _ = mt.cross_entropy(hidden_TD, head, batch)
    log_z_T = head(hidden_TD).logsumexp(-1)  # NOTE all logits at once: cut hidden_TD where T * vocabulary is large
    z = (log_z_T.square() * (batch.targets != IGNORE)).sum()
    return loss + weight * z, {"cross_entropy": loss, "z": z}


def test_train_with_a_new_loss(cfg):
    mt.train(cfg, loss_fn=z_loss)

    rows = read_metrics(cfg.run_dir)
    for row in rows:
        assert row["loss"] == pytest.approx(row["cross_entropy"] + 1e-2 * row["z"])
    assert rows[0]["z"] == pytest.approx(math.log(101) ** 2, rel=0.02)  # 101 logits near 0
    assert rows[-1]["cross_entropy"] < rows[0]["cross_entropy"] / 2

    cfg.run_dir += "-strong"
    mt.train(cfg, loss_fn=functools.partial(z_loss, weight=1.0))
    assert read_metrics(cfg.run_dir)[-1]["z"] < rows[-1]["z"] / 10


# ---- 5. Look inside while it trains: on_step gets the model after every step, and hooks see what flows through it


def test_look_inside_while_training(cfg):
    scale, seen = {}, []

    def look(step, model, extras):
        if step % 10 == 0:
            seen.append({"step": step, **scale})
            seen[-1]["after 3 4 5"] = mt.generate(model, torch.tensor([3, 4, 5]), 1, temperature=0)[-1].item()

    model = mt.build_model(cfg.model)
    for i, block in model.layers.items():
        block.register_forward_hook(lambda _module, _args, x_TD, i=i: scale.update({i: x_TD.std().item()}))
    cfg.train.steps = 60
    mt.train(cfg, model=model, on_step=look)

    assert [s["step"] for s in seen] == [10, 20, 30, 40, 50, 60]
    assert seen[-1]["after 3 4 5"] == 6  # it has learnt to count
    assert seen[0]["1"] < seen[-1]["1"]  # and its residual stream has grown


# ---- 3 and 4 from TOML: a file my_hack.py where Python finds it, such as the folder that you start from

MY_HACK = f"""
import minitrain as mt
from minitrain.batch import IGNORE
from minitrain.models.layers import Attention, Block, SwiGLU

{inspect.getsource(SideBySideBlock)}
{inspect.getsource(SideBySide)}
{inspect.getsource(z_loss)}
"""


@pytest.fixture
def my_hack(tmp_path, monkeypatch):
    (tmp_path / "my_hack.py").write_text(MY_HACK)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("my_hack", None)


def test_a_hack_is_named_in_toml(cfg, my_hack, tmp_path):
    text = to_toml(cfg).replace('type = "qwen3"', 'type = "my_hack:SideBySide"')
    text = text.replace('loss = "minitrain.loss:cross_entropy"', 'loss = "my_hack:z_loss"')
    (tmp_path / "my.toml").write_text(text)
    main(["--config", str(tmp_path / "my.toml")])  # what `python -m minitrain --config my.toml` does

    rows = read_metrics(tmp_path / "run")
    assert rows[-1]["cross_entropy"] < rows[0]["cross_entropy"] / 2 and "z" in rows[0]
    from my_hack import SideBySide as Mine

    assert isinstance(Mine.from_pretrained(tmp_path / "run" / "export").layers["0"].mlp, SwiGLU)


def test_a_hack_is_named_on_the_command_line(cfg, my_hack, tmp_path):
    (tmp_path / "plain.toml").write_text(to_toml(cfg))
    main(["--config", str(tmp_path / "plain.toml"), "--train.loss", "my_hack:z_loss", "--train.steps=2"])
    assert read_metrics(tmp_path / "run")[1]["z"] > 0
