"""--prove: what it says of layouts that are right, and of one that is not."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import spawn, tiny_run

from minitrain.config import ParallelConfig, UserError, to_toml
from minitrain.models import build_model
from minitrain.models.llama import LlamaConfig
from minitrain.models.qwen3 import Qwen3Config
from minitrain.models.qwen3_moe import Qwen3MoeConfig
from minitrain.parallel import tp
from minitrain.parallel.layout import objections
from minitrain.prove import prove, tokens_of_a_row, twin

MODELS = {
    "tied": Qwen3Config(),
    "moe": Qwen3MoeConfig(router_z_loss_coef=0.01),
    "llama": LlamaConfig(num_attention_heads=64, num_key_value_heads=8, attention_bias=True),
    "one key head": LlamaConfig(num_attention_heads=32, num_key_value_heads=1),
}
ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "sizes", [{}, {"tp": 2}, {"tp": 8}, {"tp": 4, "cp": 2}, {"ep": 8}, {"tp": 2, "cp": 2, "ep": 4}]
)
def test_a_twin_is_small_of_the_same_structure_and_fits_in_the_layout(name, sizes):
    big, parallel = MODELS[name], ParallelConfig(**sizes)
    if objections(parallel, 64, big):
        return
    small = twin(big, parallel)
    assert objections(parallel, 64, small) == []
    assert small.num_attention_heads / small.num_key_value_heads == big.num_attention_heads / big.num_key_value_heads
    assert (small.head_dim * small.num_attention_heads == small.hidden_size) == (
        big.head_dim * big.num_attention_heads == big.hidden_size
    )
    assert tokens_of_a_row(parallel) % parallel.cp == 0
    whole = build_model(dataclasses.replace(big, num_hidden_layers=small.num_hidden_layers))
    model = build_model(small)
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in whole.named_parameters()]
    assert sum(p.numel() for p in model.parameters()) < 1e6


def tiny(model, **sizes):
    cfg = tiny_run("", "", parallel=sizes, data={"tokens_per_row": 96})
    return dataclasses.replace(cfg, model=model)


def prove_each(cfgs, path, are_right):
    with open(path, "a") as sys.stdout:  # of rank 0: the others say nothing
        assert [prove(cfg) for cfg in cfgs] == [are_right] * len(cfgs)


def test_layouts_are_proven_and_every_control_is_caught(tmp_path):
    cfgs = [tiny(MODELS["tied"], tp=2), tiny(MODELS["moe"], ep=2, zero=3), tiny(MODELS["llama"], cp=2, zero=2)]
    cfgs += [tiny(MODELS["tied"], pp=2, zero=1)]
    spawn(2, prove_each, cfgs, tmp_path / "said", True)
    said = (tmp_path / "said").read_text()
    assert "2 ranks: pp 1, dp 1, cp 1, tp 2, ep 1, zero 0; cpu, float64" in said
    assert said.count("\nPROVEN: ") == 4 and "NOT" not in said
    assert said.count(" caught: ") == 2 + 2 + 2 + 2  # norm, and: norms under tp, dense ones under ep and cp, tied ends


@pytest.mark.gpu
def test_layouts_are_proven_on_gpus(tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    layouts = {"tied": {"pp": 2, "zero": 3}, "moe": {"ep": 2, "zero": 3}, "llama": {"cp": 2}, "one key head": {"tp": 2}}
    cfgs = [tiny(MODELS[name], **sizes) for name, sizes in layouts.items()]
    for cfg in cfgs:
        cfg.train = dataclasses.replace(cfg.train, device="cuda", compile="off")
    spawn(2, prove_each, cfgs, tmp_path / "said", True, device="cuda")
    assert (tmp_path / "said").read_text().count("cuda, float32") == 4


def prove_wrongly(cfg, path):
    tp._STYLES["partial"] = lambda module, mesh, cfg: None  # as if gradients of norms were whole under tp
    prove_each([cfg], path, False)


def test_a_layout_that_is_wrong_is_not_proven(tmp_path):
    spawn(2, prove_wrongly, tiny(MODELS["tied"], tp=2), tmp_path / "said")
    said = (tmp_path / "said").read_text()
    assert "\nNOT PROVEN: " in said
    worst = said.split("gradient    weight\n")[1].split()[0]
    assert "norm.weight" in worst


def test_one_process_has_nothing_to_prove():
    with pytest.raises(UserError, match="--prove compares a layout with one process; start its ranks: torchrun"):
        prove(tiny(MODELS["tied"]))


@pytest.mark.slow
def test_it_is_started_by_torchrun_and_its_exit_code_is_the_verdict(tmp_path):
    (tmp_path / "run.toml").write_text(to_toml(tiny(MODELS["llama"], tp=2, zero=1)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4", "-m", "minitrain"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command += ["--config", str(tmp_path / "run.toml"), "--prove"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "\nPROVEN: " in done.stdout, done.stdout + done.stderr
