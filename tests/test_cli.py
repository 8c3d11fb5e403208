"""python -m minitrain: what a person gets to see. Every mistake is one line and exit code 2, and leaves no trace."""

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY, read_metrics

from minitrain import Qwen3ForCausalLM
from minitrain.__main__ import main
from minitrain.config import CheckpointConfig, DataConfig, OptimConfig, ParallelConfig, SourceConfig, TrainConfig
from minitrain.models.layers import DecoderConfig

ROOT = Path(__file__).parents[1]


@pytest.fixture
def cli(monkeypatch, capsys):
    """cli("--flag", ...) -> exit code, stdout, stderr: main() in this process."""

    def run(*argv):
        monkeypatch.setattr(sys, "argv", ["minitrain", *map(str, argv)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
        return code, *capsys.readouterr()

    level = logging.getLogger("httpx").level
    yield run
    logging.getLogger("httpx").setLevel(level)


@pytest.fixture
def config(corpus, tmp_path):
    """A file that trains in a moment."""
    sizes = "\n".join(f"{key} = {value}" for key, value in TINY.items())
    path = tmp_path / "tiny.toml"
    path.write_text(
        f'run_dir = "{tmp_path / "run"}"\n'
        f'[model]\ntype = "qwen3"\n{sizes}\n'
        f'[data]\npath = "{corpus}"\ntokens_per_row = 64\nmax_seqlen = 32\n'
        f'[train]\nsteps = 5\ndevice = "cpu"\n'
    )
    return path


# ---- what goes well


def test_a_run_trains_exports_and_sums_itself_up(cli, config, tmp_path):
    code, out, err = cli("--config", config, "--train.sample", "7", "--train.steps=6")
    assert (code, err) == (0, "")
    assert re.search(
        r"^loss \d\.\d+ at step 1 -> \d\.\d+, mean of the last \d+ steps; Hugging Face folder: .*run/export$", out, re.M
    )
    assert re.search(r"^7 \d+ \d+ ", out, re.M)  # the sample goes on from its prompt
    run_dir = tmp_path / "run"
    assert {path.name for path in run_dir.iterdir()} == {
        "config.toml", "environment.txt", "metrics.jsonl", "checkpoints", "export"
    }  # fmt: skip
    assert Qwen3ForCausalLM.from_pretrained(run_dir / "export").config.hidden_size == 32
    assert "torch==" in (run_dir / "environment.txt").read_text()

    again = tmp_path / "again"  # the file that a run leaves repeats it
    assert cli("--config", run_dir / "config.toml", "--run_dir", again, "--checkpoint.export=false")[0] == 0
    assert [row["loss"] for row in read_metrics(again)] == [row["loss"] for row in read_metrics(run_dir)]
    assert not (again / "export").exists()


def test_the_sum_names_the_first_step_that_is_written_down(cli, config, tmp_path):
    assert "at step 1 -> " in cli("--config", config, "--train.steps=2")[1]
    (tmp_path / "run" / "metrics.jsonl").unlink()
    code, out, _ = cli("--config", config, "--train.steps=2")
    assert code == 0 and out.splitlines()[-1].startswith("no step was left; Hugging Face folder: ")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    assert re.search(r"^loss \d\.\d+ at step 3 -> \d\.\d+, mean of the last 3 steps", cli("--config", config)[1], re.M)


def test_help_lists_every_setting_with_its_default_and_a_sentence(cli):
    code, out, err = cli("--help")
    assert (code, err) == (0, "")
    text = " ".join(line.strip("│╭╰─╮╯ ") for line in out.splitlines())
    sections = {
        "model": DecoderConfig, "data": DataConfig, "optim": OptimConfig, "train": TrainConfig,
        "parallel": ParallelConfig, "checkpoint": CheckpointConfig, "data.sources.0": SourceConfig,
    }  # fmt: skip
    keys = [f"{name}.{key}" for name, section in sections.items() for key in section.__dataclass_fields__]
    keys.remove("data.sources")  # --help shows one of them
    for key in [*keys, "run_dir"]:
        entry = re.search(rf"--{re.escape(key)} (.*?)\(default: ", text)
        assert entry and " --" not in entry[1], key
        assert re.search(r"\w+ \w+.*\.", entry[1]), f"{key}: {entry[1]!r} is no sentence"


def test_help_knows_the_settings_of_the_architecture(cli):
    assert "--model.num_experts INT" in cli("--model.type=qwen3_moe", "--help")[1]
    assert "--model.num_experts INT" not in cli("--help")[1]


def test_a_real_process_exits_with_0(config):
    command = [sys.executable, "-m", "minitrain", f"--config={config}"]
    options = {"cwd": ROOT, "capture_output": True, "text": True, "env": {**os.environ, "PYTHONIOENCODING": "utf-8"}}
    good = subprocess.run([*command, "--checkpoint.export=false"], **options)
    assert (good.returncode, good.stderr) == (0, "") and "mean of the last 5 steps" in good.stdout


# ---- what goes wrong


def files(folder):
    return sorted(folder.rglob("*"))


def refuse(cli, folder, argv, *words):
    """One line beginning "error:", exit code 2, nothing written."""
    before = files(folder)
    code, _, err = cli(*argv)
    assert code == 2
    assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1, err
    for word in words:
        assert word in err, err
    assert files(folder) == before


FLAGS = {
    "--train.stesp=3": ["--train.stesp: no such setting; did you mean train.steps?"],
    "--steps=3": ["--steps: no such setting; did you mean train.steps?"],
    "steps=3": ["steps=3: settings are given as --section.key value, a file as --config steps=3"],
    "--train.steps=many": ["--train.steps", "'many'"],
    "--train.steps=1.5": ["--train.steps", "'1.5'"],
    "--train.steps=": ["--train.steps"],
    "--train.steps": ["--train.steps"],
    "--train.steps=a=b:c": ["--train.steps", "a=b:c"],
    "--train.steps=0": ["train.steps=0: must be at least 1"],
    "--checkpoint.export=perhaps": ["--checkpoint.export", "perhaps", "True"],
    "--optim.schedule=cosinus": ["--optim.schedule", "cosinus", "cosine"],
    "--optim.lr=-1": ["optim.lr=-1.0: must be at least 0"],
    "--optim.lr=nan": ["optim.lr=nan"],
    "--optim.beta2=1": ["optim.beta2=1.0: must be at least 0 and less than 1"],
    "--optim.min_lr_ratio=1.5": ["optim.min_lr_ratio=1.5: must be between 0 and 1"],
    "--optim.eps=0": ["optim.eps=0.0: must be more than 0"],
    "--optim.lr=inf": ["optim.lr=inf: must be a finite number"],
    "--optim.weight_decay=inf": ["optim.weight_decay=inf: must be a finite number"],
    "--optim.eps=inf": ["optim.eps=inf: must be a finite number"],
    "--model.rope_theta=0": ["rope_theta=0.0: must be more than 0 and finite"],
    "--model.rope_theta=inf": ["rope_theta=inf: must be more than 0 and finite"],
    "--model.rms_norm_eps=-1": ["rms_norm_eps=-1.0: must be at least 0 and finite"],
    "--model.rms_norm_eps=nan": ["rms_norm_eps=nan: must be at least 0 and finite"],
    "--model.initializer_range=-1": ["initializer_range=-1.0: must be at least 0 and finite"],
    "--model.initializer_range=inf": ["initializer_range=inf: must be at least 0 and finite"],
    "--optim.decay_steps=5": ["optim.decay_steps=5: needed with schedule wsd"],
    "--checkpoint.keep_every=1500": ["checkpoint.keep_every=1500: must be a multiple of checkpoint.every=1000"],
    "--model.num_attention_heads=3": ["num_attention_heads=3", "num_key_value_heads=2"],
    "--model.head_dim=7": ["head_dim=7", "even"],
    "--model.type=qwen9": ["model.type='qwen9'", "qwen3_moe"],
    "--model.type=no_such_module:Model": ["no_such_module"],
    "--model.type=json:JSONDecoder": ["model.type='json:JSONDecoder': has no config_class"],
    "--train.seed=18446744073709551616": ["train.seed=18446744073709551616: must be in -2**63 .. 2**63 - 1"],
    "--train.loss=minitrain.loss:torch": ["'minitrain.loss:torch' is a module, which cannot be called"],
    "--model.pretrained=/no/such/folder": ["/no/such/folder: no such folder"],
    "--model.vocab_size=50": ["model.vocab_size=50 is smaller than the tokenizer's 101"],
    "--model.max_position_embeddings=16": ["data.max_seqlen=32", "model.max_position_embeddings=16"],
    "--data.tokens_per_row=1": ["data.tokens_per_row=1: must be at least 2"],
    "--data.max_seqlen=65": ["data.max_seqlen=65", "tokens_per_row=64"],
    "--data.path=/no/such/folder": ["data.path=/no/such/folder: no such folder"],
    "--data.path=": ["data.path is not set"],
    "--train.attention=flush": ["attention backend 'flush' is unknown", "reference"],
    "--train.attention=flash_attn": ["'flash_attn' cannot run here"],
}


@pytest.mark.parametrize("flag", FLAGS)
def test_a_wrong_flag_is_one_line(cli, config, tmp_path, flag):
    refuse(cli, tmp_path, ["--config", config, flag], *FLAGS[flag])


def test_a_flag_for_no_file_is_one_line(cli, tmp_path):
    refuse(cli, tmp_path, ["--config"], "--config: expected one argument")


@pytest.mark.parametrize("loss", ["no_such_module:loss", "minitrain.loss:no_such_loss", "minitrain.loss", ""])
def test_a_loss_that_is_not_there_is_one_line(cli, config, tmp_path, loss):
    refuse(cli, tmp_path, ["--config", config, f"--train.loss={loss}"], repr(loss), "cannot be imported")


FILES = {
    "unknown key": ("[train]\nstpes = 3", ["train.stpes: no such setting; did you mean train.steps?", "bad.toml"]),
    "unknown section": ("[training]\nsteps = 3", ["training.steps: no such setting; did you mean train.steps?"]),
    "section as a value": ("train = 3", ["train: no such setting"]),
    "wrong type": ('[train]\nsteps = "many"', ["--train.steps", "'many'"]),
    "list": ("[train]\nsteps = [1, 2]", ["--train.steps"]),
    "truth for a number": ("[train]\nsteps = true", ["--train.steps"]),
    "number for a name": ("[model]\ntype = 3", ["model.type='3'"]),
    "bad choice": ('[train]\ndevice = "tpu"', ["--train.device", "tpu"]),
    "no TOML": ("[train\nsteps = 3", ["no TOML"]),
    "no text": ("\0\udcff", ["no TOML"]),
}


@pytest.mark.parametrize("case", FILES)
def test_a_wrong_file_is_one_line(cli, tmp_path, case):
    text, words = FILES[case]
    (tmp_path / "bad.toml").write_bytes(text.encode("utf-8", "surrogateescape"))
    refuse(cli, tmp_path, ["--config", tmp_path / "bad.toml", "--run_dir", tmp_path / "run"], *words)


@pytest.mark.parametrize("path", ["missing.toml", "."])
def test_a_file_that_cannot_be_read_is_one_line(cli, tmp_path, path):
    refuse(cli, tmp_path, [f"--config={tmp_path / path}"], str(tmp_path))


def test_a_file_in_the_place_of_the_run_dir_is_one_line(cli, config, tmp_path):
    (tmp_path / "taken").write_text("")
    for run_dir in ("taken", "taken/run"):
        refuse(cli, tmp_path, ["--config", config, "--run_dir", tmp_path / run_dir], "run_dir=", "cannot be written")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here")
def test_cuda_where_there_is_none_is_one_line(cli, config, tmp_path):
    refuse(cli, tmp_path, ["--config", config, "--train.device=cuda"], 'train.device="cuda": torch sees no CUDA')


def test_half_an_environment_of_torchrun_is_one_line_of_a_process_that_exits_with_2(config, tmp_path):
    command = [sys.executable, "-m", "minitrain", f"--config={config}"]
    env = {**os.environ, "WORLD_SIZE": "2"}
    bad = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr == "error: WORLD_SIZE=2, but there is no RANK or LOCAL_RANK; use torchrun\n"


def test_a_loss_that_is_no_number_is_one_line(cli, config, monkeypatch):
    monkeypatch.setattr("minitrain.loss.cross_entropy", lambda hidden, *_: (hidden.sum() * float("nan"), {}))
    code, _, err = cli("--config", config)
    assert code == 2 and err.count("\n") == 1 and err.startswith("error: step 1: loss nan")
