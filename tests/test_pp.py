"""Pipelines: their schedules without processes, and against one process in every company."""

import dataclasses
import functools
import gc
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from conftest import TINY, read_metrics, spawn, tiny_run, write_corpus
from safetensors.torch import load_file
from test_axes import MODELS, assert_alike, check, compile_with, errors, model_of, write_expected
from test_convert import contents, convert, newest
from test_hacks import z_loss
from test_validate import validation_rows
from torch import nn

import minitrain as mt
from minitrain.config import ParallelConfig, TrainConfig, UserError
from minitrain.hf import load_weights
from minitrain.loss import cross_entropy
from minitrain.models import build_model, init_weights, materialize
from minitrain.parallel import parallelize, pp
from minitrain.parallel.comm import Group
from minitrain.parallel.ddp import Gradients, on_gradient
from minitrain.parallel.deferred import Deferred
from minitrain.parallel.layout import objections
from minitrain.parallel.mesh import ALONE, Mesh, init_mesh
from minitrain.parallel.pp import bubble, messages_at_a_time, schedule, share_blocks
from minitrain.train import forward_backward

SCHEDULES = ("1f1b", "gpipe", "zb-h1")


# ---- schedules


def times_of(kind):
    """A backward's halves take as long as a forward."""
    return {"forward": 1, "backward": 1 if kind == "zb-h1" else 2, "weights": 1}


def simulate(kind, stages, rows, parts=1, **times):
    """Every stage does its actions in order, each as soon as what it needs is there. -> (when each ended, by its place,
    name and row; the most rows under way on each stage, to the end of what is done for them); AssertionError if they
    wait for each other."""
    times = times or times_of(kind)
    last = "weights" if kind == "zb-h1" else "backward"
    plans = [schedule(kind, stage, stages, rows, parts) for stage in range(stages)]
    at, clocks, ended, most = [0] * stages, [0] * stages, {}, [0] * stages
    while any(at[stage] < len(plan) for stage, plan in enumerate(plans)):
        moved = False
        for stage, plan in enumerate(plans):
            while at[stage] < len(plan):
                action, row, part = plan[at[stage]]
                place = part * stages + stage
                neighbour = {"forward": place - 1, "backward": place + 1}.get(action, -1)
                needs = [(neighbour, action, row)] if 0 <= neighbour < stages * parts else []
                needs += [(place, "forward", row)] if action == "backward" else []
                needs += [(place, "backward", row)] if action == "weights" else []
                if not all(need in ended for need in needs):
                    break
                begin = max([clocks[stage], *(ended[need] for need in needs)])
                clocks[stage] = begin + times[action]
                ended[place, action, row] = clocks[stage]
                at[stage] += 1
                under_way = sum((done == "forward") - (done == last) for done, *_ in plan[: at[stage]])
                most[stage] = max(most[stage], under_way)
                moved = True
        assert moved, "the stages wait for each other"
    return ended, most


def time_of(ended):
    return max(ended.values())


@pytest.mark.parametrize("kind", ["1f1b", "gpipe"])
@pytest.mark.parametrize("stages", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("rows", [1, 2, 3, 8, 20])
def test_a_schedule_ends_after_the_bubble_that_it_must_have(kind, stages, rows):
    ended, most = simulate(kind, stages, rows)
    assert time_of(ended) == (rows + stages - 1) * 3 == pytest.approx(rows * 3 / (1 - bubble(kind, stages, rows)))
    assert most == [rows if kind == "gpipe" else min(rows, stages - stage) for stage in range(stages)]


@pytest.mark.parametrize("stages", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 20])
def test_gradients_of_weights_fill_the_bubble_and_no_more_rows_are_under_way(stages, rows):
    ended, most = simulate("zb-h1", stages, rows)
    time = time_of(ended)
    assert time == rows * 3 + max(stages - 1, 2 * (stages - 1) - (rows - 1))  # 1f1b: 3 * (stages - 1)
    assert time == pytest.approx(rows * 3 / (1 - bubble("zb-h1", stages, rows)))
    assert most == [min(rows, stages)] * stages  # of 1f1b the first stage's
    for stage in range(stages):
        actions = schedule("zb-h1", stage, stages, rows)
        for kind in ("forward", "backward", "weights"):
            assert [row for action, row, _ in actions if action == kind] == list(range(rows))
        assert [action for action in actions if action[0] != "weights"] == schedule("1f1b", stage, stages, rows)
    if rows >= stages:  # where a forward, a backward and its weights take different times
        ended, _ = simulate("zb-h1", stages, rows, forward=10, backward=12, weights=9)
        assert time_of(ended) == rows * 31 + (stages - 1) * (10 + 12 - 9)


@pytest.mark.parametrize("stages", [2, 3, 4, 8])
@pytest.mark.parametrize("parts", [2, 3, 4])
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 9, 16, 23])
def test_with_parts_stages_wait_for_less_by_their_number(stages, parts, rows):
    ended, most = simulate("1f1b", stages, rows, parts)
    time = time_of(ended)
    assert time == (rows * parts + stages - 1) * 3 or rows < stages
    assert time == pytest.approx(rows * parts * 3 / (1 - bubble("1f1b", stages, rows, parts))) or rows < stages
    assert max(most) <= stages * 2 + (parts - 1) * (2 * stages - 1)


@pytest.mark.parametrize("kind, parts", [("gpipe", 1), ("1f1b", 1), ("zb-h1", 1), ("1f1b", 3)])
def test_messages_arrive_in_the_order_in_which_they_are_taken(kind, parts):
    """And the last row's backward is the last one through each part, on which Gradients relies."""
    plans = [schedule(kind, stage, 4, 11, parts) for stage in range(4)]
    for action in ("forward", "backward"):
        order = [[(row, part) for what, row, part in plan if what == action] for plan in plans]
        assert order == order[:1] * 4
        for part in range(parts):
            assert [row for row, p in order[0] if p == part] == list(range(11))
        before = [(row, part + 1) for row, part in order[0] if part < parts - 1]  # around, to the next part
        assert before == [(row, part) for row, part in order[0] if part]


@pytest.mark.parametrize("stages", [2, 3, 4, 8])
@pytest.mark.parametrize("kind, parts", [("gpipe", 1), ("1f1b", 1), ("zb-h1", 1), ("1f1b", 2), ("1f1b", 4)])
def test_what_a_stage_waits_for_before_it_sends_more_was_taken_long_ago(kind, stages, parts):
    """Else stages might wait for each other."""
    rows = 6 * stages + 5
    ended, _ = simulate(kind, stages, rows, parts)
    for place in range(stages * parts):
        sent = [  # when, and when its receiver began
            (ended[place, action, row], ended[to, action, row] - times_of(kind)[action])
            for action, to in (("forward", place + 1), ("backward", place - 1))
            for row in range(rows)
            if 0 <= to < stages * parts
        ]
        sent.sort()
        most = messages_at_a_time(stages)
        assert len(sent) > most
        assert all(taken < now for (_, taken), (now, _) in zip(sent, sent[most:], strict=False))


def send_many(rows):
    """One after the other through two stages: no more messages are kept than are said to be."""
    mesh, model = init_mesh("cpu", ParallelConfig(pp=2), MODELS["tied"]), build_model(MODELS["tied"], "cpu")
    init_weights(model, 0)
    parallelize(model, mesh, TrainConfig())
    kept, send = [], pp.Link._send
    with mock.patch.object(pp.Link, "_send", lambda link, *x: (send(link, *x), kept.append(len(link.under_way)))):
        forward_backward(model, [mt.Batch.pack([torch.arange(20)])] * rows, cross_entropy, 1.0, mesh)
    assert max(kept) == 8 < rows == len(kept) and not model.link.under_way


def test_a_stage_keeps_few_of_many_messages():
    spawn(2, send_many, 20)


def look_before_a_step(folder, layout):
    """At the hidden states of a row, with gradients that nobody asks for."""
    row = mt.Batch.pack([torch.arange(12)])
    found = errors("llama", layout, folder, steps=2, spoil=lambda model: pp.run(model, row))
    assert max(found.values()) < 1e-11, found


def test_a_forward_that_no_step_has_asked_for_changes_no_gradients(tmp_path):
    layout = ParallelConfig(pp=2, pp_schedule="zb-h1")
    write_expected(tmp_path / "one", [("llama", layout)], steps=2)
    spawn(2, look_before_a_step, tmp_path / "one", layout)


def test_one_stage_does_a_row_after_the_other():
    assert schedule("1f1b", 0, 1, 2) == [("forward", 0, 0), ("backward", 0, 0), ("forward", 1, 0), ("backward", 1, 0)]


# ---- stages


@pytest.mark.parametrize(
    "costs, stages, lengths",
    [
        ([1] * 8, 4, [2, 2, 2, 2]),
        ([1] * 7, 4, [1, 2, 2, 2]),
        ([1] * 27 + [11], 4, [9, 9, 9, 1]),  # a head that costs as much as ten blocks
        ([1] * 7 + [4], 4, [2, 2, 3, 1]),
        ([5, 1, 1, 1, 1, 1], 2, [1, 5]),
        ([1, 1, 1], 3, [1, 1, 1]),
    ],
)
def test_the_costliest_stage_costs_as_little_as_can_be(costs, stages, lengths):
    parts = share_blocks(costs, stages)
    assert [len(part) for part in parts] == lengths
    assert [i for part in parts for i in part] == list(range(len(costs)))


def test_a_block_has_all_its_gradients_before_its_input_has_one_also_where_a_stage_begins(monkeypatch):
    """With a norm whose backward makes those of weight and input at once, as RMSNorm's does on a GPU."""
    model, batch, seen = build_model(mt.Qwen3Config(**TINY), "cpu"), mt.Batch.pack([torch.arange(20)]), []
    init_weights(model, seed=0)
    block = model.layers["0"]
    block.input_layernorm = nn.LayerNorm(TINY["hidden_size"])
    for name, p in block.named_parameters():
        p.register_post_accumulate_grad_hook(lambda _, name=name: seen.append(name))
    block.register_forward_pre_hook(lambda _, args: on_gradient(args[0], lambda: seen.append("input")))
    monkeypatch.setattr(pp, "receive", lambda x, *_: x.normal_())
    monkeypatch.setattr(pp, "send", lambda *_: None)
    link = pp.Link(Mesh(torch.device("cpu"), groups={"pp": Group(1, 2)}))
    x_TD, y_TD = link.forward(model, batch)
    link.backward(x_TD, y_TD.sum())
    assert seen[-1] == "input" and sorted(seen[:-1]) == sorted(name for name, _ in block.named_parameters())


# ---- against one process


def test_two_stages_equal_one_process(tmp_path):
    layouts = [{}, {"pp_schedule": "zb-h1"}, {"pp_parts": 2, "zero": 3}]
    check(2, [ParallelConfig(pp=2, **settings) for settings in layouts], tmp_path, num_rows=3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("rows", [1, 2, 4, 5, 8])
def test_two_stages_equal_one_process_for_any_number_of_rows(kind, rows, tmp_path):
    check(2, [ParallelConfig(pp=2, pp_schedule=kind)], tmp_path, num_rows=rows)


@pytest.mark.slow
@pytest.mark.parametrize("ranks, rows", [(3, 1), (3, 2), (3, 3), (3, 5), (4, 1), (4, 4), (4, 6)])
def test_more_stages_equal_one_process(ranks, rows, tmp_path):
    check(ranks, [ParallelConfig(pp=ranks, pp_schedule=kind) for kind in SCHEDULES], tmp_path, num_rows=rows)


@pytest.mark.slow
@pytest.mark.parametrize("ranks, rows", [(2, 1), (2, 4), (2, 5), (3, 7)])
def test_stages_of_parts_equal_one_process(ranks, rows, tmp_path):
    check(ranks, [ParallelConfig(pp=ranks, pp_parts=parts) for parts in (2, 3)], tmp_path, num_rows=rows)


@pytest.mark.slow
def test_stages_of_parts_and_another_axis_equal_one_process(tmp_path):
    layouts = [{}, {"tp": 2}, {"cp": 2}, {"ep": 2}, {"zero": 2}]
    check(4, [ParallelConfig(pp=2, pp_parts=2, **sizes) for sizes in layouts], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["1f1b", "zb-h1"])
def test_stages_and_another_axis_equal_one_process(kind, tmp_path):
    layouts = [{}, {"tp": 2}, {"cp": 2}, {"ep": 2}, {"zero": 1}, {"zero": 2}, {"tp": 2, "zero": 2}]
    check(4, [ParallelConfig(pp=2, pp_schedule=kind, **sizes) for sizes in layouts], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["1f1b", "zb-h1"])
def test_recomputed_blocks_of_stages_repeat_their_collectives(kind, tmp_path):
    layouts = [ParallelConfig(pp=2, pp_schedule=kind, tp=2), ParallelConfig(pp=2, pp_schedule=kind, ep=2)]
    check(4, layouts, tmp_path, TrainConfig(recompute="full"))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_stages_and_two_other_axes_equal_one_process(tmp_path):
    layouts = [{"tp": 2, "ep": 2}, {"tp": 2, "cp": 2}, {"cp": 2, "ep": 2}, {"zero": 2, "shard_within": 2}]
    check(8, [ParallelConfig(pp=2, **sizes) for sizes in layouts], tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_axes_together_equal_one_process(tmp_path):
    check(16, [ParallelConfig(pp=2, cp=2, tp=2, ep=2)], tmp_path)


# ---- gradients of weights that are made later


def traceable_attention(q_THC, k_SKC, v_SKC, *_):
    q_HTC, k_HSC, v_HSC = (x.repeat_interleave(4 // x.shape[1], 1).transpose(0, 1) for x in (q_THC, k_SKC, v_SKC))
    return ((q_HTC @ k_HSC.transpose(1, 2)).softmax(-1) @ v_HSC).transpose(0, 1)


@pytest.mark.parametrize("compiled", ["off", pytest.param("on", marks=pytest.mark.slow)])
@pytest.mark.parametrize("recompute", ["none", "cheap", "block", "full"])
def test_a_row_has_its_gradients_of_weights_when_they_are_asked_for(recompute, compiled):
    rows = [mt.Batch.pack([(torch.arange(20) * i) % 101]) for i in (1, 2, 3)]
    train, grads, graphs = TrainConfig(recompute=recompute, compile=compiled), {}, torch._dynamo.utils.counters["stats"]
    graphs.clear()
    for is_deferred in (False, True):
        model = compile_with(ALONE, mt.LlamaConfig(**TINY, attention_bias=True), train, backend="aot_eager")
        for block in model.layers.values():
            block.self_attn.attention = traceable_attention
        deferred, got = Deferred(model) if is_deferred else None, []
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(lambda p, got=got: got.append(p.grad is not None))
        losses = [model(row).sin().sum() for row in rows]
        for done, loss in enumerate(losses):
            loss.backward()
            if is_deferred and done:
                deferred.run()
        linears = [module.weight for module in model.layers.modules() if isinstance(module, nn.Linear)]
        before = [p.grad.clone() for p in linears]
        if is_deferred:
            deferred.run()
            assert not any(p.grad.equal(of_two) for p, of_two in zip(linears, before, strict=True))
            assert not deferred.rows
            deferred.close()
        assert all(got) and len(got) == len(rows) * sum(p.grad is not None for p in model.parameters())
        grads[is_deferred] = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert graphs.pop("unique_graphs", 0) == (compiled == "on")  # of which all blocks make use
        model.zero_grad()
        model(rows[0]).sin().sum().backward()  # after what was deferred is over, as before it
        grads[is_deferred] |= {f"{name} again": p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_alike(grads[True], grads[False], 1e-5, recompute)


@pytest.mark.parametrize("compiled", ["off", pytest.param("on", marks=pytest.mark.slow)])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_a_block_that_calls_a_linear_twice_is_refused(recompute, compiled):
    train, twice = TrainConfig(recompute=recompute, compile=compiled), mt.LlamaConfig(**TINY)
    model = compile_with(ALONE, twice, train, backend="aot_eager")
    for block in model.layers.values():
        block.self_attn.attention = traceable_attention
    shared = model.layers["1"].mlp
    shared.up_proj = shared.gate_proj
    Deferred(model)
    with pytest.raises(mt.UserError, match=r"layers\.1\.mlp\.gate_proj is called 2 times by its block, not once"):
        model(mt.Batch.pack([torch.arange(20)])).sin().sum().backward()


# ---- each part of it is needed


def without(name, mesh):
    return dataclasses.replace(mesh, groups={other: group for other, group in mesh.groups.items() if other != name})


def compare_with_mistakes(folder):
    pp = ParallelConfig(pp=2)
    for name, group, wrong in (("tied", "ends", "gradient embed_tokens.weight"), ("llama", "world", "norm")):
        spoil = functools.partial(without, group)
        found = errors(name, pp, folder, steps=1, spoil_mesh=spoil)
        assert found[wrong] > 1e-5, (name, group)
        assert group == "ends" or all(value < 1e-11 for key, value in found.items() if key != wrong)


def forget_weights(deferred):
    """In the place of Deferred.run."""
    for key in reversed(deferred.rows.popleft()):
        deferred.then[key]()


def compare_without_weights(folder):
    layout = ParallelConfig(pp=2, pp_schedule="zb-h1")
    with mock.patch.object(Deferred, "run", forget_weights):
        found = errors("llama", layout, folder, steps=1)
    wrong = {key for key, value in found.items() if value > 1e-5}
    of_blocks = {key for key in found if key.startswith("gradient layers.") and key.endswith("_proj.weight")}
    assert wrong == of_blocks | {"norm"}


def test_gradients_of_weights_come_in_actions_of_their_own_and_no_others(tmp_path):
    write_expected(tmp_path / "one", [("llama", ParallelConfig(pp=2))])
    spawn(2, compare_without_weights, tmp_path / "one")


def test_the_sums_over_stages_are_needed(tmp_path):
    write_expected(tmp_path / "one", [(name, ParallelConfig(pp=2)) for name in ("tied", "llama")])
    spawn(2, compare_with_mistakes, tmp_path / "one")


# ---- whole runs: hacks, checkpoints, validation


def test_a_run_goes_on_with_other_stages_validates_and_is_converted(tmp_path):
    """Two stages, then one process, then two stages of two parts each: as if nothing had happened."""
    documents = [[(7 * d + n) % 97 for n in range(2 + 5 * d % 29)] for d in range(60)]
    path = str(write_corpus(tmp_path / "corpus", documents))
    model = mt.Qwen3Config(**TINY | {"num_hidden_layers": 5}, tie_word_embeddings=True)

    def config(name, steps, **parallel):
        return tiny_run(
            path, tmp_path / name, model, train={"steps": steps, "validate_every": 2}, parallel=parallel,
            optim={"schedule": "constant", "lr": 1e-2, "warmup_steps": 0},
            data={"rows_per_step": 2, "held_out": 9, "packing": "best_fit"},
        )  # fmt: skip

    mt.train(config("alone", 6))
    spawn(2, mt.train, config("moved", 2, pp=2, pp_schedule="zb-h1"))
    mt.train(config("moved", 4))
    spawn(2, mt.train, config("moved", 6, pp=2, pp_parts=2, zero=1))
    for read, keys in ((read_metrics, ("loss", "grad_norm")), (validation_rows, ("loss", "perplexity"))):
        for row, of_one in zip(read(tmp_path / "moved"), read(tmp_path / "alone"), strict=True):
            assert row["step"] == of_one["step"] and row["trained_tokens"] == of_one["trained_tokens"]
            assert [row[key] for key in keys] == pytest.approx([of_one[key] for key in keys], rel=1e-4)
    convert.main([str(newest(config("moved", 6))), "--out", str(tmp_path / "out")])
    folders = tmp_path / "out", tmp_path / "moved" / "export", tmp_path / "alone" / "export"
    converted, moved, alone = (load_file(folder / "model.safetensors") for folder in folders)
    assert moved.keys() == alone.keys() == converted.keys()
    assert all(moved[name].equal(converted[name]) for name in moved)
    assert all(torch.allclose(moved[name], alone[name], atol=1e-4) for name in alone)


def train_half(cfg):
    model = build_model(cfg.model)
    for module in (model.embed_tokens, model.layers["0"], model.layers["1"]):
        module.requires_grad_(False)
    mt.train(cfg, model=model)


@pytest.mark.parametrize(
    "parallel", [{"pp_parts": 2}, {"pp_parts": 2, "zero": 3}, {"pp_schedule": "zb-h1", "zero": 3}], ids=str
)
def test_a_first_part_may_be_frozen(parallel, corpus, tmp_path):
    def config(name, **parallel):
        model = mt.Qwen3Config(**TINY | {"num_hidden_layers": 5})
        checkpoint = {"every": 0, "export": False}
        data = {"rows_per_step": 2}
        return tiny_run(
            corpus, tmp_path / name, model, train={"steps": 3}, parallel=parallel, checkpoint=checkpoint, data=data
        )

    train_half(config("alone"))
    spawn(2, train_half, config("parts", pp=2, **parallel))
    for row, of_one in zip(*(read_metrics(tmp_path / name) for name in ("parts", "alone")), strict=True):
        assert [row[key] for key in ("loss", "grad_norm")] == pytest.approx([of_one["loss"], of_one["grad_norm"]], 1e-4)


def load_stages(folder):
    one = load_file(folder / "model.safetensors")
    names = set()
    mesh = init_mesh("cpu", ParallelConfig(pp=2), model_of("tied", ParallelConfig(pp=2)))
    model = parallelize(build_model(model_of("tied", ParallelConfig(pp=2))), mesh, TrainConfig())
    materialize(model, "cpu", torch.float32)
    load_weights(model, folder)
    for name, p in model.named_parameters():
        assert p.equal(one[f"model.{name}"]), name
        names.add(name)
    assert len(names) < 0.75 * len(one) and "embed_tokens.weight" in names  # both ends have it
    assert (model.lm_head is None) == (mesh.rank == 0)
    mt.save_pretrained(model, folder.with_name("again"))
    with pytest.raises(UserError, match="cut by an earlier run"):
        parallelize(model, mesh, TrainConfig())
    model = build_model(model_of("llama", ParallelConfig(pp=2))).requires_grad_(False)
    with pytest.raises(UserError, match=r"parallel\.pp: all of stage [01] is frozen; use fewer stages than pp=2"):
        parallelize(model, mesh, TrainConfig())
    model = build_model(model_of("tied", ParallelConfig(pp=2)))
    model.extra = nn.Linear(3, 3)
    with pytest.raises(UserError, match=r"parallel\.pp: which stage has extra\?"):
        parallelize(model, mesh, TrainConfig())


def test_each_stage_reads_its_own_pretrained_weights_and_together_they_save_them(tmp_path):
    model = build_model(model_of("tied", ParallelConfig(pp=2)), "cpu")
    init_weights(model, 0)
    mt.save_pretrained(model, tmp_path / "saved")
    spawn(2, load_stages, tmp_path / "saved")
    assert contents(tmp_path / "again") == contents(tmp_path / "saved")


def test_more_stages_than_layers_are_refused():
    assert objections(ParallelConfig(pp=3), 3, MODELS["tied"]) == ["parallel.pp=3 is more than num_hidden_layers=2"]
    too_many, without = ParallelConfig(pp=2, pp_parts=2), ParallelConfig(pp_parts=2)
    assert objections(too_many, 2, MODELS["tied"]) == ["parallel.pp * pp_parts=4 is more than num_hidden_layers=2"]
    assert objections(without, 1, MODELS["tied"]) == ['parallel.pp_parts=2 needs several stages and pp_schedule="1f1b"']
    assert objections(ParallelConfig(pp_schedule="zb-h1"), 1) == ['parallel.pp_schedule="zb-h1" needs several stages']


def test_blocks_that_have_a_parameter_together_are_refused_where_each_would_train_its_own():
    model = build_model(MODELS["tied"], "cpu")
    model.layers["1"].mlp = model.layers["0"].mlp
    mesh = Mesh(torch.device("cpu"), groups={"pp": Group(0, 2)})
    with pytest.raises(UserError, match=r"pp: layers\.1\.mlp\.gate_proj\.weight is a parameter of another block, too"):
        pp.apply_pp(model, mesh)


def train_and_look_for_gradients(cfg):
    model = mt.train(cfg)
    gc.collect()
    assert not [x for x in gc.get_objects() if isinstance(x, Gradients)]
    return model


def test_a_model_whose_weights_gradients_were_deferred_keeps_no_memory_of_gradients(corpus, tmp_path):
    layout = {"pp": 2, "pp_schedule": "zb-h1"}
    spawn(2, train_and_look_for_gradients, tiny_run(corpus, tmp_path, train={"steps": 2}, parallel=layout))


def look_at_extras_and_ends(cfg):
    seen = []
    model = mt.train(cfg, loss_fn=z_loss, on_step=lambda step, model, extras: seen.append([*extras]))
    assert seen == [["cross_entropy", "z"]] * 5
    ends = [None] * 2
    dist.all_gather_object(ends, model.embed_tokens.weight.detach())
    assert ends[0].equal(ends[1])


def test_every_stage_knows_the_extras_of_the_loss_and_a_tied_matrix_stays_the_same_to_the_bit(corpus, tmp_path):
    train = {"steps": 5, "dtype": "bfloat16"}
    spawn(2, look_at_extras_and_ends, tiny_run(corpus, tmp_path / "run", train=train, parallel={"pp": 2}))
