"""Ranks as torchrun starts them: what they find, who prints, and that none outlives an end of any kind."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from conftest import read_metrics, spawn, tiny_run

from minitrain.config import ParallelConfig, UserError, to_toml
from minitrain.parallel import mesh as ranks_of_a_run
from minitrain.parallel.mesh import init_mesh

ROOT = Path(__file__).parents[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]

LOSS = """
import os, signal, sys, time, torch.distributed as dist
from minitrain import cross_entropy
calls = []
def loss(hidden, head, batch):
    calls.append(1)
    if len(calls) == 5 and dist.get_rank() == 1:
        {act}
    return cross_entropy(hidden, head, batch)
"""


@pytest.fixture
def launch(corpus, tmp_path):
    """launch(act) starts 2 ranks of a long run; rank 1 does `act`, a line of Python, in the fifth loss."""
    started = []

    def start(act="pass", *flags):
        (tmp_path / "acting.py").write_text(LOSS.format(act=act))
        cfg = tiny_run(
            corpus, tmp_path / "run", train={"steps": 100_000, "loss": "acting:loss"}, data={"rows_per_step": 2}
        )
        (tmp_path / "run.toml").write_text(to_toml(cfg))
        path = os.pathsep.join([str(tmp_path), str(ROOT)])
        process = subprocess.Popen(
            [*TORCHRUN, "-m", "minitrain", "--config", tmp_path / "run.toml", *flags],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        if alive(process.pid):
            os.killpg(process.pid, signal.SIGKILL)


def alive(session):
    """Processes of a session that are not zombies."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, group = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:  # it has just ended
            continue
        if int(group) == session and state != "Z":
            found.append(stat.parent.name)
    return found


def end(process):
    """-> what it printed, to stdout and to stderr. It ends within 60 s, not well, and nobody is left."""
    out, err = process.communicate(timeout=60)
    assert process.returncode != 0 and not alive(process.pid)
    return out, err


def wait_for_steps(run_dir):
    for _ in range(600):
        if (run_dir / "metrics.jsonl").exists() and read_metrics(run_dir):
            return
        time.sleep(0.1)
    raise AssertionError("no step was taken")


@pytest.mark.slow
def test_a_rank_that_raises_ends_all_and_says_so_once(launch):
    _, err = end(launch("raise ValueError('rank one is unwell')"))
    assert err.count("ValueError: rank one is unwell") == 1
    assert err.count("run(sys.argv[1:])") == 1  # one traceback of ours; torchrun adds its own


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_all(launch):
    end(launch("os.kill(os.getpid(), signal.SIGKILL)"))


@pytest.mark.slow
def test_ctrl_c_leaves_no_process(launch, tmp_path):
    process = launch()
    wait_for_steps(tmp_path / "run")
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does, to all at once
    _, err = end(process)
    assert err.count("stopped; the same command goes on from the newest checkpoint") == 1


@pytest.mark.slow
def test_a_scheduler_that_ends_torchrun_finds_the_run_saved(launch, tmp_path):
    process = launch()
    wait_for_steps(tmp_path / "run")
    os.killpg(process.pid, signal.SIGTERM)  # all at once, as scancel does; torchrun passes it on to the ranks
    out, _ = end(process)
    assert out.count("stopped by a signal; the same command goes on from the newest checkpoint") == 1
    step = int((tmp_path / "run" / "checkpoints" / "latest").readlink().name[5:])
    assert len(read_metrics(tmp_path / "run")) == step


@pytest.mark.slow
def test_a_mistake_in_the_config_is_shown_once(launch):
    _, err = end(launch("pass", "--data.rows_per_step=3"))
    assert err.count("error: ") == 1
    assert "error: data.rows_per_step=3 is not divisible by the 2 ranks that share them\n" in err


# ---- who is there


def wait_in_vain():
    here = init_mesh("cpu", ParallelConfig(timeout_s=1))
    assert here.sum(here.rank + 1) == 6
    if here.rank == 1:
        time.sleep(4)
    else:
        with pytest.raises(TimeoutError, match=r"^rank 1 of 3 ended or did not arrive \(parallel\.timeout_s=1\)$"):
            here.sum(1)


def test_a_rank_that_does_not_come_to_the_sum_is_named():
    spawn(3, wait_in_vain)


def test_ranks_that_never_start_are_named(monkeypatch):
    as_torchrun(monkeypatch, rank=0, size=3)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(s.getsockname()[1]))
    with pytest.raises(TimeoutError, match=r"^ranks 1, 2 of 3 did not arrive \(parallel\.timeout_s=1\)$"):
        init_mesh("cpu", ParallelConfig(timeout_s=1))
    with pytest.raises(TimeoutError, match=r"^rank 2 cannot reach rank 0 at 127\.0\.0\.1:"):
        as_torchrun(monkeypatch, rank=2, size=3)
        init_mesh("cpu", ParallelConfig(timeout_s=1))


def as_torchrun(monkeypatch, rank, size):
    for name, value in {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, str(value))


def test_shards_that_do_not_divide_the_ranks_are_refused(monkeypatch):
    as_torchrun(monkeypatch, rank=0, size=4)
    with pytest.raises(UserError, match=r"parallel\.shard_within=3 does not divide WORLD_SIZE=4"):
        init_mesh("cpu", ParallelConfig(zero=1, shard_within=3))


def look_at_groups():
    mesh = init_mesh("cpu", ParallelConfig(zero=1, shard_within=2))
    ranks = {name: dist.get_process_group_ranks(group.handle) for name, group in mesh.groups.items() if group.size > 1}
    row = mesh.rank // 2 * 2
    assert ranks == {name: [0, 1, 2, 3] for name in ("world", "stage", "data", "dp")}
    shardings = [dist.get_process_group_ranks(group.handle) for group in mesh.sharding(("dp", "cp"))]
    assert shardings == [[row, row + 1], [mesh.rank % 2, mesh.rank % 2 + 2]]
    assert (mesh.dp_rank, mesh.dp_size) == (mesh.rank, 4)
    for name, group in [(name, mesh.group(name)) for name in ranks]:
        assert ranks[name][group.rank] == mesh.rank and group.size == len(ranks[name])
    assert mesh.group("tp").size == 1


def test_a_node_shares_what_nodes_repeat():
    spawn(4, look_at_groups)


def test_srun_places_ranks_too(monkeypatch):
    step = {"SLURM_PROCID": 5, "SLURM_STEP_NUM_TASKS": 16, "SLURM_LOCALID": 1, "SLURM_JOB_ID": 70_123,
            "SLURM_STEP_NODELIST": "gpu[07-09,11],big2"}  # fmt: skip
    for name, value in step.items():
        monkeypatch.setenv(name, str(value))
    assert ranks_of_a_run._place() == (5, 16, 1)
    assert ranks_of_a_run._address() == ("gpu07", 20_123)
    assert [ranks_of_a_run.first_node(nodes) for nodes in ("n1", "n-a3,n-a4", "a[1,3-5]b")] == ["n1", "n-a3", "a1"]
    as_torchrun(monkeypatch, rank=3, size=4)  # under srun, torchrun's word counts
    assert ranks_of_a_run._place() == (3, 4, 3)
