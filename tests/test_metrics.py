"""The meter against arithmetic by hand, and what metrics.jsonl and the console say."""

import re
import sys
import time

import pytest
import torch
from conftest import TINY, read_metrics, tiny_run

from minitrain import Batch, LlamaConfig, PackedData, Qwen3Config, Qwen3MoeConfig, build_model, metrics, train
from minitrain.config import TrainConfig
from minitrain.metrics import Flops, Log, peak_tflops
from minitrain.models import init_weights
from minitrain.parallel.mesh import Mesh

# ---- FLOPs


def test_qwen3_0_6b_needs_5_gflop_for_a_token_of_a_document_of_4096():
    flops = Flops.of(build_model(Qwen3Config()))
    attention = 1024 * 16 * 128 + 2 * 1024 * 8 * 128 + 16 * 128 * 1024  # q, k and v, o
    assert flops.blocks == 28 * (attention + 3 * 1024 * 3072) == 440_401_920
    assert flops.head == 151_936 * 1024  # tied, and a matrix product all the same
    assert flops.attention == 28 * 16 * 128
    per_token = flops.causal(4096, 4096**2) / 4096
    assert per_token == 6 * 595_984_384 + 6 * 28 * 16 * 128 * 4096 == 4_985_192_448


def test_an_untied_model_has_the_same_matrices_to_multiply():
    tied, untied = (Flops.of(build_model(Qwen3Config(tie_word_embeddings=t))) for t in (True, False))
    assert tied == untied


def test_norms_biases_and_the_embedding_are_no_matrix_products():
    plain, biased = (Flops.of(build_model(LlamaConfig(**TINY, attention_bias=b))) for b in (False, True))
    matrices = 2 * (32 * 64 + 2 * 32 * 32 + 64 * 32 + 3 * 32 * 48)
    assert plain == biased == Flops(blocks=matrices, head=101 * 32, attention=2 * 4 * 16)


def test_of_experts_the_active_ones_count():
    flops = Flops.of(build_model(Qwen3MoeConfig()))  # 30B-A3B
    attention = 2048 * 32 * 128 + 2 * 2048 * 4 * 128 + 32 * 128 * 2048
    router, expert = 128 * 2048, 3 * 2048 * 768
    assert flops.blocks == 48 * (attention + router + 8 * expert)
    assert flops.blocks + flops.head == pytest.approx(3.04e9, rel=1e-2)  # the 3B of A3B, less the embedding


def test_frozen_matrices_have_no_gradient_of_their_own():
    cfg = Qwen3MoeConfig(**TINY, moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2)
    model = build_model(cfg)
    whole = Flops.of(model)
    model.lm_head.requires_grad_(False)
    model.layers["1"].mlp.experts.requires_grad_(False)
    flops = Flops.of(model)
    assert flops.frozen == 101 * 32 + 2 * 3 * 32 * 24
    assert flops.full(10, 30) == whole.full(10, 30) - 2 * flops.frozen * 10


def test_c_f_and_hfu_are_what_the_docstring_says():
    flops = Flops(blocks=1000, head=100, attention=7)
    tokens, pairs = 50, 30**2 + 20**2
    assert flops.causal(tokens, pairs) == 6 * 1100 * 50 + 6 * 7 * 1300
    assert flops.full(tokens, pairs) == 6 * 1100 * 50 + 12 * 7 * 1300
    assert flops.hardware(tokens, pairs, "none") == flops.causal(tokens, pairs)
    assert flops.hardware(tokens, pairs, "full") == flops.causal(tokens, pairs) + 2 * 1000 * 50 + 2 * 7 * 1300


@pytest.mark.parametrize(
    "device, peak",
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H20", 148),
        ("NVIDIA GB200", 2500),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA A10G", None),  # slower than an A10
        ("NVIDIA RTX A4000", None),  # not an A40
        ("CPU", None),
    ],
)
def test_a_peak_is_of_this_device_or_not_claimed(device, peak):
    assert peak_tflops(device) == peak


# ---- what a run writes

FIELDS = [
    "step",
    "lr",
    "trained_tokens",
    "padding",
    "loss",
    "grad_norm",
    "tokens_per_s",
    "step_ms",
    "tflops_c",
    "data_wait_ms",
]


def test_every_line_has_the_fields(corpus, tmp_path):
    train(tiny_run(corpus, tmp_path / "run", train={"steps": 12, "log_every": 5}))
    rows = read_metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert all(row.keys() == set(FIELDS) for row in rows)
    assert all(row["tokens_per_s"] > 0 and row["step_ms"] > 0 and row["tflops_c"] > 0 for row in rows)
    assert all(0 < row["trained_tokens"] <= 64 for row in rows)
    assert all(row["padding"] == 0 for row in rows)
    assert len({row["step_ms"] for row in rows}) == 3  # means over steps 1-5, 6-10 and 11-12
    assert rows[4]["step_ms"] * rows[4]["tokens_per_s"] == pytest.approx(64_000)


def test_a_run_that_is_ended_writes_the_lines_of_its_last_steps(corpus, tmp_path):
    """As by SIGTERM without checkpoints."""
    with pytest.raises(SystemExit):
        train(tiny_run(corpus, tmp_path / "run"), on_step=lambda step, *_: sys.exit(143) if step == 3 else None)
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [1, 2, 3]


def test_a_run_that_fails_has_written_the_lines_that_were_due(corpus, tmp_path):
    with pytest.raises(ZeroDivisionError):
        cfg = tiny_run(corpus, tmp_path / "run", train={"log_every": 2})
        train(cfg, on_step=lambda step, *_: 1 / (4 - step))
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [1, 2, 3, 4]


def test_a_line_is_written_with_the_next_step_queued_behind_it(corpus, tmp_path):
    written = []
    cfg = tiny_run(corpus, tmp_path / "run", train={"steps": 5, "log_every": 2})
    train(cfg, on_step=lambda *_: written.append(len(read_metrics(tmp_path / "run"))))
    assert written == [0, 0, 2, 2, 5]


@pytest.mark.gpu
def test_a_line_that_is_due_does_not_wait_for_the_gpu_and_has_its_time(tmp_path):
    cfg = TrainConfig(steps=6, log_every=1)
    batch, model = Batch.pack([torch.arange(9)]), build_model(Qwen3Config(**TINY), "cuda")
    with Log(tmp_path, cfg, model, Mesh(torch.device("cuda")), 0) as log:

        def seconds_of(step):
            begin, ones = time.perf_counter(), torch.ones((), device="cuda")
            log.step(step, [batch], 8, ones, ones, 1e-3, {"more": ones})
            return time.perf_counter() - begin

        seconds_of(1), seconds_of(2)  # loads what it launches
        torch.cuda._sleep(4_000_000_000)
        assert seconds_of(3) < 0.5 < 1.5 < seconds_of(4)
        torch.cuda._sleep(2_000_000_000)
        seconds_of(5), time.sleep(2), seconds_of(6)  # the host looks late
    rows = read_metrics(tmp_path)
    assert [row["more"] for row in rows] == [1.0] * 6
    assert 1500 < rows[2]["step_ms"] < 3000 and 700 < rows[4]["step_ms"] < 1800


def test_padding_is_a_share_of_the_tokens(corpus, tmp_path):
    cfg = tiny_run(corpus, tmp_path / "run", train={"steps": 9}, data={"packing": "best_fit", "look_ahead": 1})
    train(cfg)
    data = PackedData(cfg.data, Mesh(torch.device("cpu")), 101)
    expected = [batches[0].num_padding / 64 for _, batches in zip(range(9), data, strict=False)]
    assert [row["padding"] for row in read_metrics(tmp_path / "run")] == expected and sum(expected) > 0


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_the_meter_counts_the_tokens_and_pairs_of_the_documents_that_came(corpus, tmp_path, packing):
    rows = {"rows_per_step": 2, "packing": packing, "look_ahead": 1}
    cfg = tiny_run(corpus, tmp_path / "run", train={"steps": 3, "log_every": 1}, data=rows)
    flops = Flops.of(train(cfg))
    data = PackedData(cfg.data, Mesh(torch.device("cpu")), 101)
    for row, batches in zip(read_metrics(tmp_path / "run"), data, strict=False):
        lengths = []
        for batch in batches:
            documents = batch.cu_seqlens_q.unfold(0, 2, 1).tolist()
            lengths += [end - begin for begin, end in documents if begin < 64 - batch.num_padding]
        assert sum(lengths) < 128 or packing == "concat"
        expected = flops.causal(sum(lengths), sum(n**2 for n in lengths)) / sum(lengths)
        assert row["tflops_c"] / row["tokens_per_s"] == pytest.approx(expected / 1e12)


def test_the_consoles_loss_is_the_mean_since_the_line_before(corpus, tmp_path, capsys):
    train(tiny_run(corpus, tmp_path / "run", train={"steps": 6, "log_every": 3}))
    shown = [float(loss) for loss in re.findall(r"^step .*?loss ([\d.]+)", capsys.readouterr().out, re.M)]
    losses = [row["loss"] for row in read_metrics(tmp_path / "run")]
    assert shown == pytest.approx([sum(losses[:3]) / 3, sum(losses[3:]) / 3], abs=1e-4)


def test_an_unknown_device_gets_tflops_and_no_percentage(corpus, tmp_path, capsys):
    train(tiny_run(corpus, tmp_path / "run", train={"steps": 1}))
    line = capsys.readouterr().out
    assert "TFLOP/s" in line and "%" not in line and "MFU" not in line


def test_a_known_device_gets_three_percentages(corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(metrics, "peak_tflops", lambda name: 0.5)
    model = train(tiny_run(corpus, tmp_path / "run", train={"steps": 1, "recompute": "full"}))
    (row,) = read_metrics(tmp_path / "run")
    assert row["mfu_c"] == pytest.approx(row["tflops_c"] / 0.5)
    flops, tokens = Flops.of(model), 64
    pairs = (row["tflops_c"] / row["tokens_per_s"] * 1e12 * tokens - flops.causal(tokens, 0)) / (6 * flops.attention)
    assert row["mfu_f"] / row["mfu_c"] == pytest.approx(flops.full(tokens, pairs) / flops.causal(tokens, pairs))
    assert row["hfu"] / row["mfu_c"] == pytest.approx(
        flops.hardware(tokens, pairs, "full") / flops.causal(tokens, pairs)
    )
    line = capsys.readouterr().out
    assert f"MFU {row['mfu_c']:.1%} (full attention {row['mfu_f']:.1%}, hardware {row['hfu']:.1%})" in line


def test_expert_load_is_the_share_of_rows_since_the_line_before(corpus, tmp_path):
    cfg = Qwen3MoeConfig(**TINY, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2)
    model = build_model(cfg, "cpu")
    init_weights(model, seed=0)
    counts = torch.zeros(2, 2, 4)  # line, layer, expert
    calls = []

    def count(layer):
        def hook(module, args):
            counts[len(calls) // 2 // 3, layer] += args[1]
            calls.append(layer)

        return hook

    for i in range(2):
        model.layers[str(i)].mlp.experts.register_forward_pre_hook(count(i))
    train(tiny_run(corpus, tmp_path / "run", train={"steps": 6, "log_every": 3}), model=model)
    assert counts.sum() == 6 * 2 * 64 * 2  # steps, layers, tokens, experts for each
    rows = read_metrics(tmp_path / "run")
    assert [row["step"] for row in rows if "expert_load" in row] == [3, 6]
    for row, counted in zip((rows[2], rows[5]), counts, strict=True):
        load = torch.tensor(row["expert_load"])
        torch.testing.assert_close(load, counted / counted.mean(1, keepdim=True), atol=0.0051, rtol=0)
        torch.testing.assert_close(load.sum(1), torch.full((2,), 4.0), atol=0.03, rtol=0)
