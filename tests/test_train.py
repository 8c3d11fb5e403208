"""The loop: what a step means, what stops it, and what can be put into it."""

import dataclasses
import functools
from contextlib import nullcontext

import pytest
import torch
from conftest import TINY, read_metrics, tiny_run, write_corpus
from torch import nn

from minitrain import (
    Batch,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    add_norm,
    build_model,
    norm_rotate,
    routed_rows,
    save_pretrained,
    swiglu,
    train,
)
from minitrain.batch import IGNORE
from minitrain.config import TrainConfig, UserError, load_config
from minitrain.hf import default_config
from minitrain.loss import cross_entropy
from minitrain.models import init_weights
from minitrain.parallel import parallelize
from minitrain.parallel.mesh import Mesh
from minitrain.pieces import Saved
from minitrain.train import forward_backward

CPU = Mesh(torch.device("cpu"))
MOE = Qwen3MoeConfig(**TINY, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2)


def losses(run_dir):
    return [row["loss"] for row in read_metrics(run_dir)]


def random_model(cfg=None):
    model = build_model(cfg or Qwen3Config(**TINY), "cpu")
    init_weights(model, seed=0)
    return model


def random_batch(lengths, vocab_size=101):
    return Batch.pack([torch.randint(vocab_size, (n,)) for n in lengths])


def gradients(model, batches, scale):
    model.zero_grad()
    loss, _ = forward_backward(model, batches, cross_entropy, scale)
    return loss, {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("model", [None, MOE], ids=["qwen3", "moe"])
def test_a_tiny_model_learns(corpus, tmp_path, model):
    train(tiny_run(corpus, tmp_path / "run", model, train={"steps": 50}, data={"tokens_per_row": 128}))
    first, *_, last = losses(tmp_path / "run")
    assert abs(first - torch.tensor(101.0).log()) < 0.1  # random weights: as good as guessing
    assert last < first / 3


# ---- the meaning of a step


def test_the_loss_is_the_mean_over_trained_tokens_however_they_are_cut_into_rows():
    """Rows of unequal numbers of targets: a mean of the rows' means would be another number."""
    model = random_model()
    documents = [torch.randint(101, (n,)) for n in (30, 3, 2, 17)]
    whole, apart = [Batch.pack(documents)], [Batch.pack([d]) for d in documents]
    scale = 1 / sum(b.num_targets for b in whole)
    assert scale == 1 / (52 - 4)
    loss, grads = gradients(model, whole, scale)
    loss_of_rows, grads_of_rows = gradients(model, apart, scale)

    logits = model.lm_head(model(whole[0]))
    expected = nn.functional.cross_entropy(logits, whole[0].targets, ignore_index=IGNORE)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(loss_of_rows, expected)
    torch.testing.assert_close(grads_of_rows, grads)


def test_rows_per_step_do_not_change_the_run(corpus, tmp_path):
    """2 rows of 64 tokens against 1 of 128: other cuts, the same tokens and targets on the whole."""
    cuts = {"whole": {"tokens_per_row": 128}, "rows": {"tokens_per_row": 64, "rows_per_step": 2}}
    for name, data in cuts.items():
        train(tiny_run(corpus, tmp_path / name, data=data))
    whole, rows = (read_metrics(tmp_path / name) for name in cuts)
    assert [row["trained_tokens"] for row in whole] == [row["trained_tokens"] for row in rows]
    assert whole[-1]["loss"] == pytest.approx(rows[-1]["loss"], rel=0.05)  # a cut document has less context


def test_a_batch_without_targets_gives_loss_0_and_no_nan(corpus, tmp_path):
    def masked():
        while True:
            batch = random_batch([40, 24])
            batch.targets.fill_(IGNORE)
            yield [dataclasses.replace(batch, num_targets=0)]

    train(tiny_run(corpus, tmp_path / "run", train={"steps": 3}), data=masked())
    for row in read_metrics(tmp_path / "run"):
        assert row["loss"] == row["grad_norm"] == row["trained_tokens"] == 0


@pytest.mark.parametrize("recompute", ["cheap", "block", "full"])
@pytest.mark.parametrize("cfg", [Qwen3Config(**TINY), MOE], ids=["qwen3", "moe"])
def test_recompute_gives_the_same_gradients(cfg, recompute):
    model, batch = random_model(cfg), random_batch([40, 24])
    expected_loss, expected = gradients(model, [batch], 1 / batch.num_targets)
    parallelize(model, CPU, TrainConfig(recompute=recompute))
    runs = []
    model.layers["1"].mlp.register_forward_pre_hook(lambda *_: runs.append("mlp"))
    model.norm.register_forward_pre_hook(lambda *_: runs.append("norm"))
    loss, grads = gradients(model, [batch], 1 / batch.num_targets)
    assert runs == ["mlp", "norm", "mlp"]  # blocks run again in backward, what is outside them does not
    assert torch.equal(loss, expected_loss)
    assert all(torch.equal(grads[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_each_recompute_keeps_less_and_computes_again_what_it_says(monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager_decomp_partition"))
    model = random_model(Qwen3Config(**TINY))
    batch = random_batch([32, 32])  # of equal lengths, whose attention is one call: the block is one graph
    kept, again = {}, {}
    for recompute in ("none", "cheap", "block", "full"):
        torch._dynamo.reset()
        parallelize(model, CPU, TrainConfig(recompute=recompute, compile="on"))
        storages = {}

        def keep(x, storages=storages):
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            hidden_TD = model(batch)
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept[recompute] = sum(n for place, n in storages.items() if place not in weights)
        with torch.profiler.profile() as profile:
            hidden_TD.sum().backward()
        names = [event.name for event in profile.events()]
        again[recompute] = (
            sum(n in ("aten::mm", "aten::addmm") for n in names),
            sum("scaled_dot_product" in n and not n.endswith("backward") for n in names),
        )
    assert kept["none"] > kept["cheap"] > kept["block"] > kept["full"], kept
    layers, products = 2, 7
    assert again["none"] == again["cheap"] == (layers * 2 * products, 0), again
    assert again["block"][0] > again["none"][0] and again["block"][1] == 0 < again["full"][1], again


# ---- what stops it


def test_a_nan_stops_the_run_and_leaves_the_weights_as_they_were(corpus, tmp_path):
    """In step 7. The host looks before the checkpoint of step 8: until then steps change nothing, and none is saved."""
    calls = []

    def loss_fn(hidden, head, batch):
        loss, extras = cross_entropy(hidden, head, batch)
        calls.append(batch)
        return loss * float("nan") if len(calls) == 7 else loss, extras

    weights = {}

    def keep(step, model, extras):
        weights[step] = {name: p.clone() for name, p in model.named_parameters()}

    cfg = tiny_run(corpus, tmp_path / "run", checkpoint={"every": 4})
    with pytest.raises(FloatingPointError, match="step 7: loss nan"):
        train(cfg, loss_fn=loss_fn, on_step=keep)
    assert all(torch.equal(weights[6][name], p) for name, p in weights[max(weights)].items())
    assert not torch.equal(weights[5]["norm.weight"], weights[6]["norm.weight"])
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*")] == ["step-00000004"]
    rows = read_metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert rows[6]["loss"] is None and rows[5]["loss"] > 0  # null: JSON has no NaN


def test_a_nan_stops_an_optimizer_that_does_not_know_of_them(corpus, tmp_path):
    def loss_fn(hidden, head, batch):
        return cross_entropy(hidden, head, batch)[0] * float("nan"), {}

    model = random_model()
    before = {name: p.clone() for name, p in model.named_parameters()}
    cfg = tiny_run(corpus, tmp_path / "run", train={"steps": 3})
    with pytest.raises(FloatingPointError, match="step 1: loss nan"):
        train(cfg, model=model, loss_fn=loss_fn, optimizer=torch.optim.RMSprop)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_nan_in_the_loss_alone_stops_the_run_before_the_step(corpus, tmp_path):
    """The gradient is finite here: only the loss tells."""

    def loss_fn(hidden, head, batch):
        return cross_entropy(hidden, head, batch)[0] + float("nan"), {}

    model = random_model()
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(FloatingPointError, match="step 1: loss nan"):
        train(tiny_run(corpus, tmp_path / "run", train={"steps": 3}), model=model, loss_fn=loss_fn)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


# ---- what can be put into it


def test_on_step_sees_every_step_the_model_and_the_extras(corpus, tmp_path):
    def loss_fn(hidden, head, batch):
        named = {"tokens": torch.tensor(float(batch.num_targets)), "twice": 2.0 * batch.num_targets}
        return cross_entropy(hidden, head, batch)[0], named

    seen = []
    cfg = tiny_run(corpus, tmp_path / "run", train={"steps": 5})
    model = train(cfg, loss_fn=loss_fn, on_step=lambda *args: seen.append(args))
    assert [step for step, *_ in seen] == [1, 2, 3, 4, 5]
    assert all(m is model and extras["tokens"].item() == pytest.approx(1) for _, m, extras in seen)  # a mean, too
    assert all(row["twice"] == pytest.approx(2) for row in read_metrics(tmp_path / "run"))  # a plain number may be one


def test_a_model_with_weights_is_trained_as_it_is(corpus, tmp_path):
    model = random_model()
    nn.init.normal_(model.lm_head.weight, std=1.0)
    trained = train(tiny_run(corpus, tmp_path / "run", train={"steps": 1}, optim={"lr": 0.0}), model=model)
    assert trained is model and losses(tmp_path / "run")[0] > 10  # its own weights, not fresh ones


def test_a_runs_folder_describes_the_model_that_was_given(corpus, tmp_path):
    larger = Qwen3Config(**{**TINY, "num_hidden_layers": 3})
    train(tiny_run(corpus, tmp_path / "run", train={"steps": 1}), model=build_model(larger))
    assert load_config(tmp_path / "run/config.toml", [], default_config).model == larger
    assert Saved(tmp_path / "run/checkpoints/latest").manifest["config"]["model"]["num_hidden_layers"] == 3
    with pytest.raises(UserError, match=r"data\.max_seqlen=32 is more than model\.max_position_embeddings=16"):
        short = Qwen3Config(**TINY, max_position_embeddings=16)
        train(tiny_run(corpus, tmp_path / "short"), model=build_model(short))


def test_data_may_be_any_iterator_and_the_optimizer_any_function(corpus, tmp_path):
    batch = random_batch([40, 24])
    made = []

    def sgd(params):
        made.append(torch.optim.SGD(params, momentum=0.9))
        return made[-1]

    cfg = tiny_run("", tmp_path / "run", optim={"lr": 0.5, "schedule": "constant", "warmup_steps": 0, "max_norm": 0})
    train(cfg, data=iter([[batch]] * 20), optimizer=sgd)
    assert made[0].param_groups[0]["lr"] == 0.5
    assert losses(tmp_path / "run")[-1] < 0.8 * losses(tmp_path / "run")[0]
    assert {row["trained_tokens"] for row in read_metrics(tmp_path / "run")} == {62}


def test_a_run_starts_from_exported_weights(corpus, tmp_path):
    model = train(tiny_run(corpus, tmp_path / "first", train={"steps": 40}))
    save_pretrained(model, tmp_path / "export")
    start = Qwen3Config(**TINY, pretrained=str(tmp_path / "export"))
    data = {"seed": 1}
    train(tiny_run(corpus, tmp_path / "second", start, train={"steps": 2}, data=data))
    train(tiny_run(corpus, tmp_path / "random", train={"steps": 2}, data=data))
    assert losses(tmp_path / "second")[0] < losses(tmp_path / "random")[0] / 2

    loaded = Qwen3ForCausalLM.from_pretrained(tmp_path / "export")
    loss, _ = cross_entropy(loaded(b := random_batch([9])), loaded.lm_head, b)
    assert torch.equal(loss, cross_entropy(model(b), model.lm_head, b)[0])


def test_settings_of_another_model_than_the_pretrained_are_refused(corpus, tmp_path):
    save_pretrained(random_model(), tmp_path / "export")
    wider = Qwen3Config(**{**TINY, "intermediate_size": 64}, pretrained=str(tmp_path / "export"))
    with pytest.raises(UserError, match="has shape"):
        train(tiny_run(corpus, tmp_path / "run", wider))


def test_settings_that_do_less_than_they_say_are_said_in_a_line(corpus, tmp_path, caplog):
    settings = {"data": {"held_out": 2}, "optim": {"warmup_steps": 3}}
    cfg = tiny_run(corpus, tmp_path / "run", train={"steps": 3}, **settings)
    model = build_model(cfg.model)
    model.layers["0"].register_buffer("seen", torch.zeros(()))
    train(cfg, model=model)
    warmup, held_out, buffer = (record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    assert warmup == "optim.warmup_steps=3: the learning rate does not reach optim.lr in train.steps=3"
    assert held_out.startswith("data.held_out=2: not trained on, and with train.validate_every=0 not validated on")
    assert buffer.startswith("buffer layers.0.seen is persistent, but in no checkpoint")
    assert [row["lr"] for row in read_metrics(tmp_path / "run")] == pytest.approx([0.0025, 0.005, 0.0075])
    caplog.clear()
    train(tiny_run(corpus, tmp_path / "calm", train={"steps": 4, "validate_every": 4}, **settings))
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    assert read_metrics(tmp_path / "calm")[-1]["lr"] == 0.01


def test_a_run_is_a_pure_function_of_its_config(corpus, tmp_path):
    for name in ("a", "b"):
        train(tiny_run(corpus, tmp_path / name, MOE, train={"steps": 5}))
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    train(tiny_run(corpus, tmp_path / "c", MOE, train={"steps": 5, "seed": 1}))
    assert losses(tmp_path / "a") != losses(tmp_path / "c")


# ---- what the loop leaves behind, and what it makes of models that are not its own


def test_a_model_that_was_trained_can_be_trained_again_otherwise(corpus, tmp_path):
    """In bf16, where gradients are moved to masters by hooks; recomputation and backend are the second run's own."""
    settings = {"steps": 5, "dtype": "bfloat16"}
    first = tiny_run(corpus, tmp_path / "first", train={**settings, "recompute": "full", "attention": "sdpa"})
    model = train(first)
    assert model.layers["0"].forward.func.__name__ == "checkpoint"
    train(tiny_run(corpus, tmp_path / "second", train={**settings, "attention": "reference"}), model=model)
    assert model.layers["0"].forward.__func__ is type(model.layers["0"]).forward
    assert model.layers["0"].self_attn.attention.keywords == {"backend": "reference"}
    assert losses(tmp_path / "second")[0] < losses(tmp_path / "first")[0]
    batch = random_batch([20])
    cross_entropy(model(batch), model.lm_head, batch)[0].backward()
    assert model.norm.weight.grad is not None  # no hook takes it away any more


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_frozen_weights_stay_as_they_are(corpus, tmp_path, dtype):
    model = random_model().to(getattr(torch, dtype))
    model.layers["0"].mlp.requires_grad_(False)
    before = {name: p.clone() for name, p in model.named_parameters()}
    train(tiny_run(corpus, tmp_path / "run", train={"steps": 3, "dtype": dtype}), model=model)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == name.startswith("layers.0.mlp."), name


def test_norms_of_any_name_begin_as_norms_and_what_has_no_rule_is_an_error(corpus, tmp_path):
    def on_meta(**parts):
        model = build_model(Qwen3Config(**TINY))
        with torch.device("meta"):
            for name, make in parts.items():
                setattr(model.layers["0"], name, make())
        return model

    cfg = tiny_run(corpus, tmp_path / "run", train={"steps": 1})
    cfg.checkpoint.export = False
    model = train(cfg, model=on_meta(ln2=lambda: nn.LayerNorm(32)))
    assert (model.layers["0"].ln2.weight == 1).all() and (model.layers["0"].ln2.bias == 0).all()
    with pytest.raises(UserError, match=r"first values of layers\.0\.gain"):
        train(cfg, model=on_meta(gain=lambda: nn.Parameter(torch.ones(32))))
    with pytest.raises(UserError, match="buffer running_mean of BatchNorm1d has no values on meta"):
        train(cfg, model=on_meta(batch_norm=lambda: nn.BatchNorm1d(32)))


def test_data_that_ends_is_named(corpus, tmp_path):
    with pytest.raises(UserError, match="the data ended before step 20"):
        train(tiny_run(corpus, tmp_path / "run"), data=[[random_batch([20])], [random_batch([30])]])
    assert len(losses(tmp_path / "run")) == 2


def test_what_an_optimizer_keeps_is_saved_or_refused(corpus, tmp_path):
    class Counting(torch.optim.SGD):
        def step(self):
            super().step()
            for p in self.param_groups[0]["params"]:
                self.state[p]["steps"] = 1

    with pytest.raises(ValueError, match=r"Counting keeps embed_tokens\.weight\.steps=1; make it a tensor"):
        train(tiny_run(corpus, tmp_path / "run", train={"steps": 2}), optimizer=lambda params: Counting(params, lr=0.1))


@pytest.mark.parametrize("offload", ["", "optimizer"])
@pytest.mark.parametrize(
    "keep, complaint",
    [
        (lambda o: o.param_groups[0].update(momentum=0.5), r"momentum=0\.5 in a group"),
        (lambda o: o.param_groups[0].update(k=3), "k=3 in a group"),
        (lambda o: o.state["all"].update(k=3), r"state\['all'\]"),
        (lambda o: None, None),
    ],
    ids=["changed", "new", "global", "nothing"],
)
def test_what_an_optimizer_keeps_beside_its_parameters_is_refused(corpus, tmp_path, keep, complaint, offload):
    """It would be lost: a checkpoint holds what state[p] has."""

    class Keeping(torch.optim.SGD):
        def step(self):
            super().step()
            keep(self)

    cfg = tiny_run(corpus, tmp_path / "run", train={"steps": 2}, parallel={"offload": offload})
    with pytest.raises(UserError, match=f"Keeping keeps {complaint}; make it") if complaint else nullcontext():
        train(cfg, optimizer=lambda params: Keeping(params, lr=0.1))


def test_data_of_another_tokenizer_than_the_pretrained_models_is_refused(corpus, tmp_path):
    source = tmp_path / "source"
    save_pretrained(random_model(), source, tokenizer=corpus)
    cfg = tiny_run(corpus, tmp_path / "run", Qwen3Config(**TINY, pretrained=str(source)), train={"steps": 1})
    train(cfg)
    text = (source / "tokenizer.json").read_text()
    (source / "tokenizer.json").write_text(text + "\n")  # other bytes, the same tokens
    train(cfg)
    (source / "tokenizer.json").write_text(text.replace('"100"', '"hundred"'))
    with pytest.raises(UserError, match="made with another tokenizer than"):
        train(cfg)


def test_data_of_ones_own_takes_no_file_from_the_folder_that_the_run_starts_in(tmp_path, monkeypatch):
    source, here = tmp_path / "source", tmp_path / "here"
    write_corpus(tmp_path / "corpus", [[1]])
    save_pretrained(random_model(), source, tokenizer=tmp_path / "corpus")
    write_corpus(here, [[1]], vocab_size=50)
    (here / "report.json").write_text('{"chat": true}')
    (here / "chat_template.jinja").write_text("of another project")
    monkeypatch.chdir(here)
    cfg = tiny_run("", tmp_path / "run", Qwen3Config(**TINY, pretrained=str(source)), train={"steps": 1})
    train(cfg, data=iter([[random_batch([20])]]))
    assert not (tmp_path / "run" / "export" / "chat_template.jinja").exists()


@pytest.mark.gpu
@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("compile", ["off", "on"])
def test_a_row_makes_one_plan_of_attention_for_all_layers_and_passes(monkeypatch, compile, recompute):
    kernels = pytest.importorskip("minitrain.kernels", reason="the CUDA extension is not built")
    made, make = [], kernels.attention_plan
    monkeypatch.setattr(kernels, "attention_plan", lambda *args: (made.append(args), make(*args)))
    cfg = TrainConfig(attention="native", compile=compile, recompute=recompute)
    model = random_model(Qwen3Config(**TINY | {"head_dim": 64})).to("cuda", torch.bfloat16)
    model = parallelize(model, Mesh(torch.device("cuda")), cfg)
    for lengths in ([300, 20], [7, 313]):
        made.clear()
        forward_backward(model, [random_batch(lengths).to("cuda")], cross_entropy, scale=1 / 318)
        assert len(made) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("recompute", ["none", "cheap"])
@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe"])
def test_on_the_gpu_loss_and_gradients_are_as_near_to_exact_ones_as_plain_bf16s(monkeypatch, kind, recompute):
    """Distance of each gradient from the one in float64: at most 1.25 times that of the plain functions in bf16.

    These have a norm's weight, 64 numbers, by chance 1.21 times as near: attention's P is in fp32 there.
    """
    sizes = TINY | {"head_dim": 64, "hidden_size": 256, "intermediate_size": 512}
    moe = {"moe_intermediate_size": 128, "num_experts": 4, "num_experts_per_tok": 4}  # all: rounding flips no choice
    model = random_model(Qwen3Config(**sizes) if kind == "qwen3" else Qwen3MoeConfig(**sizes, **moe)).bfloat16()
    torch.manual_seed(0)
    batch = random_batch([300, 1, 77, 400])

    def of(device, dtype, **settings):
        copy = build_model(model.config, "cpu")
        copy.load_state_dict(model.state_dict())
        copy = parallelize(copy.to(device, dtype), Mesh(torch.device(device)), TrainConfig(**settings))
        loss, grads = gradients(copy, [batch.to(device)], 1 / batch.num_targets)
        return {"loss": loss.double().cpu(), **{name: grad.double().cpu() for name, grad in grads.items()}}

    exact = of("cpu", torch.float64)
    fast = of("cuda", torch.bfloat16, recompute=recompute)
    for module in (add_norm, norm_rotate, routed_rows, swiglu):
        monkeypatch.setattr(module, "can_run", lambda *_: False)
    plain = of("cuda", torch.bfloat16, attention="reference", compile="off")
    for name, value in exact.items():
        ours, theirs = ((results[name] - value).norm() for results in (fast, plain))
        assert ours <= 1.25 * theirs + 1e-4 * value.norm(), (
            f"{name}: {ours / value.norm()}, plain {theirs / value.norm()}"
        )


@pytest.mark.parametrize("asked", [False, True])
def test_only_deterministic_training_asks_torch_for_it_and_only_while_it_runs(corpus, tmp_path, asked):
    def settings():
        return torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory

    seen, before = [], settings()
    cfg = tiny_run(corpus, tmp_path / "run", train={"steps": 1, "deterministic": asked})
    train(cfg, on_step=lambda *_: seen.append(settings()))
    assert seen == [(True, False) if asked else before]
    assert settings() == before
    with pytest.raises(UserError, match="cannot be imported"):
        train(dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, loss="no:such")))
    assert settings() == before


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe"])
def test_deterministic_training_on_the_gpu_gives_the_same_bits_twice(tmp_path, kind):
    sizes = TINY | {"head_dim": 64}
    model = Qwen3Config(**sizes) if kind == "qwen3" else dataclasses.replace(MOE, **sizes)
    data = [[random_batch([900, 31, 700]).to("cuda"), random_batch([1631]).to("cuda")] for _ in range(4)]
    runs = []
    for name in ("a", "b"):
        cfg = tiny_run(
            "", tmp_path / name, model, train={"steps": 4, "device": "cuda", "compile": "off", "deterministic": True},
            checkpoint={"every": 0, "export": False},
        )  # fmt: skip
        runs.append([p.clone() for p in train(cfg, data=data).parameters()])
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert all(a.equal(b) for a, b in zip(*runs, strict=True))
