"""The worked examples, run as the first lines of their configs say."""

import json
import math
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import read_metrics
from tokenizers import Tokenizer

from minitrain import Qwen3ForCausalLM, generate

ROOT = Path(__file__).parents[1]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture
def tree(tmp_path):
    """A folder with the project in it, for what the examples leave behind."""
    for name in ("configs", "examples", "minitrain", "tests", "tools"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def commands(config):
    """The lines "#   python ..." of a config, each as words."""
    text = (ROOT / "configs" / config).read_text().replace("\\\n#", " ")
    return [line.split() for line in re.findall(r"^#   python (.*)", text, re.M)]


def run(tree, command):
    env = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, *command], cwd=tree, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def mean_loss(folder, steps):
    """Of the last steps, or of the first if negative."""
    losses = [row["loss"] for row in read_metrics(folder)]
    chosen = losses[-steps:] if steps > 0 else losses[:-steps]
    return sum(chosen) / len(chosen)


def test_fine_tuning_on_conversations_ends_in_a_model_that_answers_in_their_format(tree):
    start = time.perf_counter()
    prepare, train = commands("sft.toml")
    run(tree, prepare)
    said = run(tree, train)
    assert time.perf_counter() - start < 120
    assert mean_loss(tree / "runs/sft/run", 20) < 0.2
    assert "assistant: [colour] yellow" in said

    export = tree / "runs/sft/run/export"
    assert (export / "chat_template.jinja").read_text() == (ROOT / "examples/chat.jinja").read_text()
    tokenizer = Tokenizer.from_file(str(export / "tokenizer.json"))
    model = Qwen3ForCausalLM.from_pretrained(export)
    end = tokenizer.token_to_id("<|endoftext|>")
    for line in (ROOT / "examples/chats.jsonl").read_text().splitlines()[:38:5]:
        question, answer = json.loads(line)["messages"]
        prompt = torch.tensor(tokenizer.encode(f"user: {question['content']}\nassistant: ").ids)
        out = generate(model, prompt, 30, temperature=0, eos_token_id=end)
        assert tokenizer.decode(out[len(prompt) :].tolist()) == answer["content"] and out[-1] == end


def test_pretraining_from_a_folder_of_text_and_going_on_from_its_export(tree):
    """The first half is the quickstart in small: `make quickstart` takes Python's own library."""
    data = ["--suffixes", ".py", "--train-tokenizer", "4096", "--out", "runs/quickstart/data"]
    run(tree, ["tools/prepare_data.py", "tests", *data])
    smaller = ["--data.tokens_per_row", "512", "--train.steps", "40", "--optim.warmup_steps", "5"]
    one_layer = ["--model.num_hidden_layers", "1", "--checkpoint.every", "0"]
    run(tree, ["-m", "minitrain", "--config", "configs/quickstart.toml", *smaller, *one_layer])
    pretrained = tree / "runs/quickstart/run"
    assert mean_loss(pretrained, 10) < math.log(4096) - 1

    prepare, train = commands("continue.toml")
    run(tree, prepare)
    said = run(tree, [*train, *smaller, "--train.validate_every", "20"])
    continued = tree / "runs/continue/run"
    assert mean_loss(continued, -3) < math.log(4096) - 0.5  # not from random weights
    assert "validation loss" in said
    rows = [json.loads(line) for line in (continued / "validation.jsonl").read_text().splitlines()]
    assert [(row["step"], row["source"]) for row in rows] == [
        (step, f"runs/{name}/data") for step in (20, 40) for name in ("continue", "quickstart")
    ]
    assert rows[2]["loss"] < rows[0]["loss"]  # of the new text
    assert Qwen3ForCausalLM.from_pretrained(continued / "export").config.num_hidden_layers == 1
