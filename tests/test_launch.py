"""Ranks as torchrun starts them: what they find, who prints, and that none outlives an end of any kind."""

import contextlib
import itertools
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from conftest import read_metrics, spawn, tiny_run

from minitrain import train
from minitrain.config import ParallelConfig, UserError, to_toml
from minitrain.parallel import mesh as ranks_of_a_run
from minitrain.parallel.mesh import init_mesh

ROOT = Path(__file__).parents[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]

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
    launches = itertools.count()

    def start(act="pass", *flags, ranks=2, torchrun=("--standalone", "--nproc-per-node=2"), **sections):
        (tmp_path / "acting.py").write_text(LOSS.format(act=act))
        sections = {"train": {"steps": 100_000, "loss": "acting:loss"}, "data": {"rows_per_step": ranks}} | sections
        (tmp_path / "run.toml").write_text(to_toml(tiny_run(corpus, tmp_path / "run", **sections)))
        mark = f"{tmp_path} {next(launches)}"
        path = os.pathsep.join([str(tmp_path), str(ROOT)])
        process = subprocess.Popen(
            [*TORCHRUN, *torchrun, "-m", "minitrain", "--config", tmp_path / "run.toml", *flags],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "LAUNCH": mark},
        )  # fmt: skip
        process.mark = mark
        return process

    yield start
    for process in processes(str(tmp_path)):
        os.kill(process, signal.SIGKILL)


def processes(mark):
    """{process: its environment} of all that a launch has started; ranks are in sessions of their own."""
    found = {}
    for file in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # it has just ended
            environment = dict(line.partition("=")[::2] for line in file.read_text().split("\0"))
            if environment.get("LAUNCH", "").startswith(mark):
                found[int(file.parent.name)] = environment
    return found


def end(process):
    """-> what it printed, to stdout and to stderr. It ends within 60 s, not well, and nobody is left."""
    out, err = process.communicate(timeout=60)
    assert process.returncode != 0 and not processes(process.mark)
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


# ---- torchrun starts the ranks again

STEPPED = "pass\n    if len(calls) == 2 and dist.get_rank() == 0:\n        open('{}', 'w').write(str(os.getpid()))"


def wait_for_a_step(nodes, ranks, stepped, old=()):
    """Until so many ranks on these nodes, no old ones, have taken a step together. -> their processes."""
    for _ in range(1200):
        started = [item for node in nodes for item in processes(node.mark).items()]
        found = {pid for pid, environment in started if "RANK" in environment and pid not in old}
        if len(found) == ranks and stepped.exists() and int(stepped.read_text() or 0) in found:
            return found
        time.sleep(0.1)
    raise AssertionError(f"{ranks} ranks took no step within 120 s")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kills", [1, 20])
def test_ranks_that_are_killed_are_started_again_and_go_on(launch, corpus, tmp_path, kills):
    """kill -9 of one rank of four at a random time; the losses are those of a run that nobody touched."""
    stepped, moment = tmp_path / "stepped", random.Random(0)
    sections = {"optim": {"schedule": "constant"}, "checkpoint": {"every": 2, "export": False}, "parallel": {"zero": 1}}
    torchrun = "--standalone", "--nproc-per-node=4", f"--max-restarts={kills}"
    process = launch(STEPPED.format(stepped), ranks=4, torchrun=torchrun, **sections)
    ranks, seconds = wait_for_a_step([process], 4, stepped), []
    for _ in range(kills):
        time.sleep(2 * moment.random())
        os.kill(moment.choice(sorted(ranks)), signal.SIGKILL)
        since = time.monotonic()
        ranks = wait_for_a_step([process], 4, stepped, ranks)
        seconds.append(time.monotonic() - since)
    process.terminate()
    _, err = end(process)
    assert err.count("error: another rank ended") <= kills and err.count("Traceback") <= 1  # torchrun's own, of SIGTERM
    print(f"{kills} kills: seconds to the first new step {sorted(seconds)}, median {statistics.median(seconds):.1f}")
    killed = losses(tmp_path / "run")
    sections |= {"train": {"steps": len(killed)}, "data": {"rows_per_step": 4}}
    spawn(4, train, tiny_run(corpus, tmp_path / "calm", **sections))
    assert killed == losses(tmp_path / "calm")


def losses(run_dir):
    return [(row["step"], row["loss"], row["grad_norm"]) for row in read_metrics(run_dir)]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_node_that_ends_leaves_the_run_to_the_other_until_it_comes_back(launch, tmp_path, monkeypatch):
    """As docs/ranks.md says for several nodes: one of two is killed, two ranks go on, and then four again."""
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        at = f"--rdzv-endpoint=localhost:{s.getsockname()[1]}"
    quick = "--rdzv-conf=last_call_timeout=3,keep_alive_interval=1,keep_alive_max_attempt=3"
    torchrun = "--nnodes=1:2", "--nproc-per-node=2", "--rdzv-backend=c10d", at, quick, "--max-restarts=3"
    stepped = tmp_path / "stepped"

    def node():
        return launch(STEPPED.format(stepped), ranks=4, torchrun=torchrun, parallel={"zero": 1})

    first = node()
    time.sleep(2)  # the first hosts the table through which nodes meet
    second = node()
    ranks = wait_for_a_step([first, second], 4, stepped)
    for pid in processes(second.mark):
        os.kill(pid, signal.SIGKILL)
    ranks |= wait_for_a_step([first], 2, stepped, ranks)
    wait_for_a_step([first, node()], 4, stepped, ranks)


# ---- who is there


def wait_in_vain():
    here = init_mesh("cpu", ParallelConfig(timeout_s=1))
    assert here.sum(here.rank + 1) == 6
    if here.rank == 1:
        time.sleep(4)
    else:
        with pytest.raises(TimeoutError, match=r"^rank 1 of 3 ended or did not arrive \(parallel\.timeout_s=1\)$"):
            here.sum(1)


@pytest.mark.slow
def test_a_rank_that_does_not_come_to_the_sum_is_named():
    spawn(3, wait_in_vain)


@pytest.mark.slow
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
