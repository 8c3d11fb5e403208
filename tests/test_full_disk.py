"""A full disk costs a run one checkpoint at most, or stops it; what was saved before stays."""

import contextlib
import re
import resource
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import spawn
from test_survival import checkpoints, losses, short_run, tensors, wait_for

from minitrain import UserError, train


@pytest.fixture
def small_disk(tmp_path):
    """A folder with room for seven checkpoints."""
    (tmp_path / "disk").mkdir()
    command = ["sh", "-c", 'mount -t tmpfs -o size=2300k tmpfs "$0"', tmp_path / "disk"]
    mounted = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    if mounted.returncode:
        pytest.skip(f"no disk to fill: {mounted.stderr.strip()}")
    yield tmp_path / "disk"
    subprocess.run(["umount", "--lazy", tmp_path / "disk"], check=True)


def train_on_a_full_disk(cfg, full_from, full_until=None):
    """Rank 0 leaves no byte on the disk after the one step, once its checkpoint is there, until after the other."""

    def fill(step, *_):
        ballast = Path(cfg.run_dir).with_name("ballast")
        if step == full_from:
            wait_for(Path(cfg.run_dir) / "checkpoints" / f"step-{step - 1:08}")
            with open(ballast, "wb", buffering=0) as file, contextlib.suppress(OSError):
                while True:
                    file.write(bytes(4096))
        if step == full_until:
            ballast.unlink()

    is_first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    train(cfg, on_step=fill if is_first else None)


def run_of_two_rows(corpus, run_dir, **settings):
    cfg = short_run(corpus, run_dir, 24, every=6, keep=9, **settings)
    cfg.data.rows_per_step, cfg.parallel.zero, cfg.train.log_every = 2, 1, 1
    return cfg


def test_a_full_disk_ends_a_run_and_keeps_the_last_checkpoint(corpus, small_disk, tmp_path):
    calm, stopped = (run_of_two_rows(corpus, folder) for folder in (tmp_path / "calm", small_disk / "run"))
    complaint = (
        r"step-00000012: saving failed: \[Errno 28\] No space left on device: '.*/rank-00000\.safetensors'; "
        r"it takes \d{3},\d{3} bytes and 0 are free; the newest checkpoint is step-00000006$"
    )
    with pytest.raises(UserError, match=complaint):
        train_on_a_full_disk(stopped, 7)
    assert {path.name for path in (small_disk / "run" / "checkpoints").iterdir()} == {"step-00000006", "latest"}
    (small_disk / "ballast").unlink()
    train(stopped)
    assert sorted(checkpoints(stopped)) == [6, 12, 18, 24]
    train(calm)
    assert losses(stopped) == losses(calm) and tensors(stopped) == tensors(calm)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_that_may_go_on_loses_a_checkpoint_and_nothing_else(corpus, small_disk, tmp_path, ranks, caplog):
    """The save after step 12 fails, that after 18 may, since the disk is emptied beside it."""
    calm = run_of_two_rows(corpus, tmp_path / "calm")
    going = run_of_two_rows(corpus, small_disk / "run", on_failure="go_on")
    if ranks == 1:
        train(calm)
        train_on_a_full_disk(going, 7, 19)
        assert re.search(r"step-00000012: saving failed: .*; training goes on", caplog.text)
        assert "metrics.jsonl: No space left on device; its lines wait for room" in caplog.text
    else:
        spawn(2, train, calm)
        spawn(2, train_on_a_full_disk, going, 7, 19)
    kept = sorted(checkpoints(going))
    assert kept in ([6, 24], [6, 18, 24])
    left = {path.name for path in (small_disk / "run" / "checkpoints").iterdir()}
    assert left == {"latest", *(f"step-{step:08}" for step in kept)}
    assert losses(going) == losses(calm) and tensors(going) == tensors(calm)


def test_the_last_checkpoint_has_to_be_saved(corpus, small_disk):
    cfg = short_run(corpus, small_disk / "run", 6, every=3, on_failure="go_on")
    with pytest.raises(UserError, match=r"step-00000006: saving failed: .*No space left"):
        train_on_a_full_disk(cfg, 4)


# ---- where nothing may be mounted: files that may not grow


def limit_files(size):
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard if size is None else size, hard))


@pytest.fixture
def whole_files():
    yield
    limit_files(None)


def train_with_small_files(cfg, from_step):
    """Files end at 20,000 bytes once the checkpoint before this step is there; None: they do not."""

    def limit(step, *_):
        if step == from_step:
            wait_for(Path(cfg.run_dir) / "checkpoints" / "latest")
            limit_files(20_000)

    train(cfg, on_step=limit)


def test_a_save_that_fails_ends_the_run_and_keeps_the_last_checkpoint(corpus, tmp_path, whole_files):
    cfg = short_run(corpus, tmp_path / "run", 9, every=3)
    complaint = "step-00000006: saving failed: .*File too large.*; the newest checkpoint is step-00000003"
    with pytest.raises(UserError, match=complaint):
        train_with_small_files(cfg, 4)
    assert list(checkpoints(cfg)) == [3]
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} == {"step-00000003", "latest"}
    limit_files(None)
    train(cfg)
    assert sorted(checkpoints(cfg)) == [6, 9]


def limit_files_of_one_rank(cfg):
    """What rank 1 cannot write, no rank calls saved."""
    with pytest.raises(UserError, match=r"step-00000006: saving failed: .*File too large.*rank-00001.safetensors"):
        train_with_small_files(cfg, 4 if torch.distributed.get_rank() == 1 else None)


def test_what_one_rank_cannot_write_is_no_checkpoint_of_any(corpus, tmp_path):
    cfg = short_run(corpus, tmp_path / "run", 6, every=3)
    cfg.data.rows_per_step, cfg.parallel.zero = 2, 1
    spawn(2, limit_files_of_one_rank, cfg)
    assert list(checkpoints(cfg)) == [3]
