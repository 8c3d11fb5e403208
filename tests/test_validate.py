"""Validation: the loss of training, on documents that are not trained on, the same for any number of ranks."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, read_metrics, spawn, tiny_run, write_corpus
from torch import nn

from minitrain import Batch, PackedData, Qwen3Config, Qwen3MoeConfig, UserError, build_model, train
from minitrain.batch import IGNORE
from minitrain.config import DataConfig, ParallelConfig, SourceConfig, TrainConfig
from minitrain.loss import cross_entropy
from minitrain.models import init_weights
from minitrain.parallel import parallelize
from minitrain.parallel.comm import Group
from minitrain.parallel.mesh import Mesh, init_mesh
from minitrain.validate import validate

CPU = Mesh(torch.device("cpu"))


@pytest.fixture
def sources(tmp_path):
    """Two sources; the second, of weight 0, marks what is learnt."""
    documents = [[(7 * d + n) % 97 for n in range(2 + 5 * d % 29)] for d in range(40)]
    a = write_corpus(tmp_path / "a", documents)
    b = write_corpus(tmp_path / "b", documents[::-1][:9], trained=range(0, 97, 2))
    return [SourceConfig(str(a)), SourceConfig(str(b), 0.0)]


def settings(sources, **others):
    return {"path": "", "sources": sources, "tokens_per_row": 64, "max_seqlen": 32, "held_out": 11, **others}


def random_model(cfg=None):
    model = build_model(cfg or Qwen3Config(**TINY), "cpu")
    init_weights(model, seed=0)
    return model


def validation_rows(run_dir):
    return [json.loads(line) for line in (Path(run_dir) / "validation.jsonl").read_text().splitlines()]


def test_the_loss_is_the_mean_over_the_learnt_tokens_of_the_held_out_documents(sources):
    data = PackedData(DataConfig(**settings(sources, packing="best_fit", look_ahead=4)), CPU, 101)
    model, results = random_model(), validate(random_model(), data, cross_entropy, CPU)
    for result, source in zip(results, data.sources, strict=True):
        shard = source.held_out.shards[0]
        total = tokens = 0
        for start, n in zip(source.held_out.start.tolist(), source.held_out.length.tolist(), strict=True):
            batch = Batch.pack([shard.tokens[start : start + n].long()])
            if shard.trained is not None:
                batch.targets[:-1][~shard.trained[start + 1 : start + n]] = IGNORE
            logits = model.lm_head(model(batch))
            total += nn.functional.cross_entropy(logits, batch.targets, ignore_index=IGNORE, reduction="sum").item()
            tokens += int((batch.targets != IGNORE).sum())
        assert result["source"] == source.path and result["trained_tokens"] == tokens > 0
        assert result["loss"] == pytest.approx(total / tokens, rel=1e-5)
        assert result["perplexity"] == pytest.approx(math.exp(total / tokens), rel=1e-4)
    assert len(results) == 2


@pytest.mark.parametrize("n", [2, 3, 8])
def test_any_number_of_ranks_gives_the_same_numbers(sources, n):
    cfg = DataConfig(**settings(sources, rows_per_step=24))
    model = random_model()
    sums = []  # what each rank would add, in the order of the calls

    def run(rank, total):
        mesh = SimpleNamespace(
            device=torch.device("cpu"), dp_rank=rank, dp_size=n, sum_rows=total, group=lambda _: Group()
        )
        return validate(model, PackedData(cfg, mesh, 101), cross_entropy, mesh)

    for rank in range(n):
        sums.append([])
        run(rank, lambda number: sums[-1].append(number) or number)
    totals = [map(sum, zip(*sums, strict=True)) for _ in range(n)]
    results = [run(rank, lambda _, rank=rank: next(totals[rank])) for rank in range(n)]
    assert results == [validate(model, PackedData(cfg, CPU, 101), cross_entropy, CPU)] * n


def validate_in_parts(cfg, expected):
    model, lengths = random_model(), []
    mesh = init_mesh("cpu", ParallelConfig(cp=2), model.config)
    parallelize(model, mesh, TrainConfig())
    model.register_forward_pre_hook(lambda _, args: lengths.append(len(args[0].tokens)))
    results = validate(model, PackedData(cfg, mesh, 101), cross_entropy, mesh)
    assert set(lengths) == {cfg.tokens_per_row // 2}
    for result, of_one in zip(results, expected, strict=True):
        assert result["trained_tokens"] == of_one["trained_tokens"]
        assert result["loss"] == pytest.approx(of_one["loss"], rel=1e-5)


def test_ranks_that_share_a_row_in_training_share_it_here(sources):
    cfg = DataConfig(**settings(sources))
    spawn(2, validate_in_parts, cfg, validate(random_model(), PackedData(cfg, CPU, 101), cross_entropy, CPU))


def test_a_run_validates_every_n_steps_and_at_the_end(sources, tmp_path, capsys):
    cfg = tiny_run("", tmp_path / "run", train={"steps": 7, "validate_every": 3}, data=settings(sources))
    train(cfg)
    rows = validation_rows(tmp_path / "run")
    assert [(row["step"], row["source"]) for row in rows] == [(s, x.path) for s in (3, 6, 7) for x in sources]
    assert all(row.keys() == {"step", "source", "loss", "perplexity", "trained_tokens"} for row in rows)
    assert rows[-2]["loss"] < rows[0]["loss"]  # it learns
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == list(range(1, 8))
    assert capsys.readouterr().out.count("validation loss") == 6
    train(tiny_run("", tmp_path / "without", train={"steps": 7}, data=settings(sources)))
    losses = [[row["loss"] for row in read_metrics(tmp_path / name)] for name in ("run", "without")]
    assert losses[0] == losses[1]  # to look changes nothing


def test_a_run_that_was_stopped_has_each_validation_once(sources, tmp_path):
    class Stop(Exception):
        pass

    def stop(step, model, extras):
        if step == 5:
            raise Stop

    options = {"train": {"steps": 8, "validate_every": 2}, "checkpoint": {"every": 3}, "data": settings(sources)}
    train(tiny_run("", tmp_path / "calm", **options))
    with pytest.raises(Stop):
        train(tiny_run("", tmp_path / "stopped", **options), on_step=stop)
    assert validation_rows(tmp_path / "stopped")[-1]["step"] == 4  # behind the checkpoint of step 3
    train(tiny_run("", tmp_path / "stopped", **options))
    assert validation_rows(tmp_path / "stopped") == validation_rows(tmp_path / "calm")


def test_where_nothing_is_learnt_the_loss_is_no_number_and_no_checkpoint_the_best(tmp_path):
    corpus = write_corpus(tmp_path / "corpus", [[1, 2, 3]] * 20, trained=[])
    options = {"data": {"held_out": 2}, "train": {"steps": 2, "validate_every": 1}}
    train(tiny_run(corpus, tmp_path / "run", checkpoint={"every": 1, "keep_best": True}, **options))
    for row in validation_rows(tmp_path / "run"):
        assert (row["loss"], row["perplexity"], row["trained_tokens"]) == (None, None, 0)
    assert not (tmp_path / "run" / "checkpoints" / "best").exists()


def test_experts_do_not_count_rows_of_validation(sources):
    model = random_model(Qwen3MoeConfig(**TINY, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2))
    validate(model, PackedData(DataConfig(**settings(sources)), CPU, 101), cross_entropy, CPU)
    assert all(layer.mlp.load.sum() == 0 for layer in model.layers.values())


def test_a_loss_that_is_no_number_stops_the_validation(sources):
    data = PackedData(DataConfig(**settings(sources)), CPU, 101)
    with pytest.raises(FloatingPointError, match=r"validation on .*/a: loss nan"):
        validate(random_model(), data, lambda hidden, *_: (hidden.sum() * float("nan"), {}), CPU)


def test_a_run_needs_something_to_validate_on(corpus, tmp_path):
    cfg = tiny_run(corpus, tmp_path / "run", train={"validate_every": 5})
    with pytest.raises(UserError, match=r"train\.validate_every=5: there is nothing to validate on"):
        train(cfg)
    assert not (tmp_path / "run").exists()


def test_data_of_ones_own_has_to_have_held_out_rows(tmp_path):
    cfg = tiny_run("", tmp_path / "run", train={"validate_every": 2})
    with pytest.raises(UserError, match=r"data of your own needs held_out_rows\(\)"):
        train(cfg, data=iter([]))


def test_data_of_ones_own_with_held_out_rows_needs_no_setting(tmp_path):
    class Counting:
        def __iter__(self):
            return self

        def __next__(self):
            return [Batch.pack([torch.arange(20)])]

        def held_out_rows(self):
            return {"mine": iter(next(self))}

    train(tiny_run("", tmp_path / "run", train={"steps": 2, "validate_every": 2}), data=Counting())
    assert [row["source"] for row in validation_rows(tmp_path / "run")] == ["mine"]
