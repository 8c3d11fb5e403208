"""Shared by the tests: a tiny corpus, tiny models, and one seed."""

import ctypes
import json
import math
import multiprocessing
import os
import shutil
import subprocess
import tempfile
from datetime import timedelta
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test reaches the network

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from tokenizers import Tokenizer, models

from minitrain.masters import round_weights, set_value, value_of
from minitrain.storage import sha256, write_json, write_safetensors

ROOT = Path(__file__).resolve().parent.parent
TINY = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# Ranks are forked from a process that has imported torch, and nothing else: spawning them anew takes seconds each.
multiprocessing.set_forkserver_preload(["torch", "torch.distributed", "minitrain.train", "minitrain.attention"])


def spawn(n, fn, *args, device="cpu"):
    """fn(*args) on n ranks, over gloo, or on GPUs over NCCL; raises what one of them raised."""
    with tempfile.TemporaryDirectory() as folder:
        args = (n, f"{folder}/store", device, fn, args)
        torch.multiprocessing.start_processes(_rank, args, nprocs=n, start_method="forkserver")


def _rank(rank, n, store, device, fn, args):
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    store = dist.FileStore(store, n)
    dist.init_process_group(backend, store=store, rank=rank, world_size=n, timeout=timedelta(seconds=60))
    fn(*args)
    dist.destroy_process_group()


def compile_for_the_host(folder, sources, *options):
    """{file's name: text}, C++ for which cuda_on_the_host.h is CUDA -> the library; skips where no compiler is."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    headers = dict.fromkeys(("cuda_runtime.h", "cuda_runtime_api.h", "cuda_bf16.h"), '#include "cuda_on_the_host.h"\n')
    for name, text in (headers | sources).items():
        (folder / name).write_text(text)
    command = [compiler, "-std=c++17", "-O1", "-w", "-shared", "-fPIC", "-U_FORTIFY_SOURCE", *options]  # fibers jump
    command += [f"-I{path}" for path in (folder, ROOT / "tests", ROOT / "kernels")]
    command += [*map(str, folder.glob("*.cpp")), "-o", str(folder / "host.so")]
    done = subprocess.run(command, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(folder / "host.so"))


def raise_errors(*functions):
    """Of such a library, whose results are those of cuda_on_the_host.h's error_of: a text is an AssertionError."""

    def check(error, *_):
        assert error is None, error.decode()

    for function in functions:
        function.restype, function.errcheck = ctypes.c_char_p, check


class Rooms:
    """Memory for tensors, which begins as NaN (as int32: -1), and what lies around it is to stay so."""

    def __init__(self):
        self.around = []

    def __call__(self, *shape, dtype=torch.bfloat16):
        memory = torch.full((math.prod(shape) * dtype.itemsize + 8192,), 0xFF, dtype=torch.uint8)
        self.around += memory[:4096], memory[-4096:]
        return memory[4096:-4096].view(dtype).view(shape)

    def assert_nothing_else_was_written(self):
        assert all((memory == 0xFF).all() for memory in self.around), "written outside of the results"


def fill_free_memory_with_nan():
    """What the next calls on the GPU are given."""
    blocks = [torch.full((1 << size,), torch.nan, device="cuda") for size in range(6, 26)]
    del blocks


def write_corpus(folder, documents, vocab_size=101, shards=1, trained=None):
    """A finished folder of token shards, as tools/prepare_data.py leaves it, with these lists of ids as documents.
    trained: the ids that are to be learnt; None: all."""
    folder.mkdir(parents=True, exist_ok=True)
    words = {str(i): i for i in range(vocab_size)}
    Tokenizer(models.WordLevel(words, unk_token="0")).save(str(folder / "tokenizer.json"))
    metadata = {"tokenizer_sha256": sha256(folder / "tokenizer.json"), "vocab_size": str(vocab_size)}
    for i in range(shards):
        mine = documents[i::shards]
        offsets = torch.tensor([0, *(len(d) for d in mine)]).cumsum(0)
        tokens = torch.tensor([t for d in mine for t in d], dtype=torch.int64).to(torch.uint16)
        tensors = {"tokens": tokens, "document_offsets": offsets}
        if trained is not None:
            tensors["trained"] = torch.isin(tokens.long(), torch.tensor(sorted(trained)))
        write_safetensors(folder / f"shard-{i:05}.safetensors", tensors, metadata)
    write_json(folder / "report.json", {"shards": shards, "tokens": sum(map(len, documents))})
    return folder


@pytest.fixture
def corpus(tmp_path):
    return learnable_corpus(tmp_path / "corpus")


def learnable_corpus(folder):
    """300 documents of 1 to 60 tokens that count upwards: learnable in a few steps."""
    generator = torch.Generator().manual_seed(0)
    begins = torch.randint(0, 97, (300,), generator=generator).tolist()
    lengths = torch.randint(1, 61, (300,), generator=generator).tolist()
    documents = [[(b + i) % 97 for i in range(n)] for b, n in zip(begins, lengths, strict=True)]
    return write_corpus(folder, documents)


def tiny_run(corpus, run_dir, model=None, **sections):
    """The config of a short run of a tiny model on the CPU; sections such as train={"steps": 5} change it."""
    from minitrain import CheckpointConfig, Config, DataConfig, OptimConfig, ParallelConfig, Qwen3Config, TrainConfig

    def section(kind, **defaults):
        return kind(**defaults | sections.pop(kind.__name__.removesuffix("Config").lower(), {}))

    cfg = Config(
        model or Qwen3Config(**TINY),
        section(DataConfig, path=str(corpus), tokens_per_row=64, max_seqlen=32),
        section(OptimConfig, lr=1e-2, warmup_steps=2),
        section(TrainConfig, steps=20, device="cpu"),
        section(ParallelConfig),
        section(CheckpointConfig),
        str(run_dir),
    )
    assert not sections, sections
    return cfg


class RoundingSGD(torch.optim.Optimizer):
    """As AdamW with its kernel: it takes gradients of any dtype and split masters, and rounds new weights itself."""

    rounds = True

    def __init__(self, params, lr=0.01):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            mean = self.state[p].setdefault("mean", torch.zeros_like(p, dtype=torch.float32))
            mean.lerp_(p.grad.float(), 0.5)
            set_value(p, value_of(p) - self.param_groups[0]["lr"] * mean)
            round_weights([p])


def read_metrics(run_dir):
    """The rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
