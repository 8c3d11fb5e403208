"""What a run survives: being killed at any instant, asked to stop, a full disk, a second run on its folder."""

import functools
import itertools
import logging
import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
from pathlib import Path
from random import Random
from unittest import mock

import pytest
import torch
from conftest import read_metrics, spawn, tiny_run

from minitrain import UserError, cross_entropy, train
from minitrain import checkpoint as checkpoint_module
from minitrain.pieces import Saved

FILES = ("checkpoints", "step-", "rank-", "manifest.json")  # what is in the name of all that a save touches


def start(fn, *args):
    """fn(*args) in a process of its own, forked from one that has imported torch."""
    process = multiprocessing.get_context("forkserver").Process(target=_with_one_thread, args=(fn, *args))
    process.start()
    return process


def _with_one_thread(fn, *args):
    torch.set_num_threads(1)
    fn(*args)


def end(process):
    process.join(60)
    assert process.exitcode is not None
    return process.exitcode


def checkpoints(cfg):
    """{step: its checkpoint, every byte of it checked}."""
    found = {}
    for path in (Path(cfg.run_dir) / "checkpoints").glob("step-*"):
        if not path.suffix:
            saved = found[int(path.name[5:])] = Saved(path)
            for file in saved.files:
                saved.verify(file)
    return found


def losses(cfg):
    return [(row["step"], row["loss"], row["grad_norm"]) for row in read_metrics(cfg.run_dir)]


def tensors(cfg):
    """Of the newest checkpoint, with their checksums."""
    newest = checkpoints(cfg)[max(checkpoints(cfg))]
    return {name: t for name, t in newest.manifest["tensors"].items() if not name.startswith("rng.")}


def short_run(corpus, run_dir, steps, **settings):
    return tiny_run(corpus, run_dir, train={"steps": steps}, checkpoint={"export": False, **settings})


# ---- kill -9


def train_and_die(cfg, announced, at, after):
    """SIGKILL comes `after` seconds behind the at-th thing that is done to files of checkpoints."""
    count = itertools.count(1)

    def kill():
        time.sleep(after)
        os.kill(os.getpid(), signal.SIGKILL)

    def watch(event, args):
        touches = event == "open" or event.startswith(("os.", "shutil."))
        if touches and args and any(name in str(args[0]) for name in FILES) and next(count) == at:
            threading.Thread(target=kill).start() if after else kill()

    log = logging.getLogger("minitrain.checkpoint")
    log.addHandler(logging.FileHandler(announced))
    log.setLevel(logging.INFO)
    sys.addaudithook(watch)
    train(cfg)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kills", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_at_any_instant_loses_nothing_that_was_announced(corpus, tmp_path, kills):
    """A save touches files 18 times, to write, rename and delete: each of them is a kill's turn."""
    calm, killed = (short_run(corpus, tmp_path / name, 4 * kills, every=1, keep=2) for name in ("calm", "killed"))
    calm.checkpoint.every = 0
    train(calm)
    random, announced = Random(0), tmp_path / "announced"
    announced.touch()
    for i in range(kills):
        instant = 20 + i % 18 + 18 * random.randint(0, 1), random.choice([0, 0.002 * random.random()])
        assert end(start(train_and_die, killed, announced, *instant)) == -signal.SIGKILL
        last = [line for line in announced.read_text().splitlines() if line.startswith("saved ")][-1:]
        whole = checkpoints(killed)
        assert max(whole, default=0) >= max([int(line[-8:]) for line in last], default=0)
    assert 0 < max(whole) < 4 * kills
    train(killed)
    assert losses(killed) == losses(calm)
    left = {path.name for path in (tmp_path / "killed" / "checkpoints").iterdir()}
    assert left == {"latest", *(f"step-{step:08}" for step in (4 * kills - 1, 4 * kills))}
    assert (tmp_path / "killed" / "checkpoints" / "latest").resolve().name == f"step-{4 * kills:08}"


# ---- signals


def train_and_signal(cfg, step, pause, *signals):
    """The process sends itself these after that many steps, with a pause in seconds after each."""

    def send(done, *_):
        for number in signals if done == step else ():
            os.kill(os.getpid(), number)
            time.sleep(pause)

    train(cfg, on_step=send)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_run_that_is_asked_to_stop_saves_and_goes_on_bitwise(corpus, tmp_path, number):
    calm, stopped = (short_run(corpus, tmp_path / name, 8) for name in ("calm", "stopped"))
    train(calm)
    assert end(start(train_and_signal, stopped, 3, 0.5, number)) == 143
    assert list(checkpoints(stopped)) == [4]  # the step that began after it
    train(stopped)
    assert losses(stopped) == losses(calm) and tensors(stopped) == tensors(calm)


def test_a_second_signal_ends_a_run_at_once(corpus, tmp_path):
    cfg = short_run(corpus, tmp_path / "run", 8)
    assert end(start(train_and_signal, cfg, 3, 1.2, signal.SIGUSR1, signal.SIGTERM)) == 143
    assert not checkpoints(cfg)


def test_a_signal_that_comes_twice_at_once_is_one_request(corpus, tmp_path):
    """As when a scheduler signals every process, and torchrun passes it on."""
    cfg = short_run(corpus, tmp_path / "run", 8)
    assert end(start(train_and_signal, cfg, 3, 0.1, signal.SIGTERM, signal.SIGTERM)) == 143
    assert list(checkpoints(cfg)) == [4]


def test_signals_are_as_before_when_a_run_has_ended(corpus, tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    train(short_run(corpus, tmp_path / "run", 2))
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == before
    assert signal.set_wakeup_fd(-1) == -1


def signal_one_rank(cfg):
    rank = torch.distributed.get_rank()
    with pytest.raises(SystemExit) as stop:
        train_and_signal(cfg, 3, 0.5, *[signal.SIGTERM] * rank)
    assert stop.value.code == 143


def test_all_ranks_stop_after_the_same_step_when_one_is_asked(corpus, tmp_path):
    cfg = short_run(corpus, tmp_path / "run", 8)
    cfg.data.rows_per_step, cfg.parallel.zero = 2, 2
    spawn(2, signal_one_rank, cfg)
    assert list(checkpoints(cfg)) == [4]


# ---- in the background


def test_training_goes_on_while_a_checkpoint_of_the_past_is_written(corpus, tmp_path):
    calm, slow = (short_run(corpus, tmp_path / name, 6, every=3) for name in ("calm", "slow"))
    train(calm)
    written, write = threading.Event(), checkpoint_module.write_pieces

    def write_later(path, pieces):
        assert written.wait(30)
        return write(path, pieces)

    def look(step, *_):
        if step == 5:
            assert not checkpoints(slow)
            written.set()

    with mock.patch("minitrain.checkpoint.write_pieces", write_later):
        train(slow, on_step=look)
    sums = [{s: saved.manifest["tensors"] for s, saved in checkpoints(cfg).items()} for cfg in (calm, slow)]
    assert sums[0] == sums[1] and list(sums[0]) == [3, 6]


def test_memory_for_the_copies_is_made_beside_the_first_steps(corpus, tmp_path):
    """All but that of random generators, which is small."""
    make, by_training = checkpoint_module.Checkpointer._make_room, set()

    def record(self, tensors):
        if threading.current_thread() is threading.main_thread():
            by_training.update(tensors.keys() - self.host.keys())
        make(self, tensors)

    cfg = short_run(corpus, tmp_path / "run", 6, every=4)
    with mock.patch.object(checkpoint_module.Checkpointer, "_make_room", record):
        train(cfg)
    assert by_training == {"rng.0.cpu"}


def test_a_save_waits_for_the_one_before(corpus, tmp_path):
    active, write = threading.Lock(), checkpoint_module.write_pieces

    def write_slowly(path, pieces):
        assert active.acquire(blocking=False)
        time.sleep(0.02)
        active.release()
        return write(path, pieces)

    cfg = short_run(corpus, tmp_path / "run", 6, every=1, keep=10)
    with mock.patch("minitrain.checkpoint.write_pieces", write_slowly):
        train(cfg)
    assert sorted(checkpoints(cfg)) == [1, 2, 3, 4, 5, 6]


def test_keep_every_outlives_keep(corpus, tmp_path):
    cfg = short_run(corpus, tmp_path / "run", 11, every=1, keep=2, keep_every=4)
    train(cfg)
    assert sorted(checkpoints(cfg)) == [4, 8, 10, 11]


def test_random_numbers_go_on(corpus, tmp_path):
    calm, stopped = (short_run(corpus, tmp_path / name, 8, every=4) for name in ("calm", "stopped"))

    def noisy(hidden, head, batch):
        loss, named = cross_entropy(hidden, head, batch)
        return loss * (1 + 0.1 * torch.rand(())), named

    def stop(step, *_):
        if step == 6:
            raise KeyboardInterrupt

    for cfg in (calm, stopped):
        torch.manual_seed(3)
        with pytest.raises(KeyboardInterrupt) if cfg is stopped else mock.MagicMock():
            train(cfg, loss_fn=noisy, on_step=stop if cfg is stopped else None)
    torch.manual_seed(4)
    train(stopped, loss_fn=noisy)
    assert losses(stopped) == losses(calm)


# ---- a full disk


def limit_files(size):
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard if size is None else size, hard))


def fill_disk(cfg, step, *_):
    if step == 4:
        while not (Path(cfg.run_dir) / "checkpoints" / "latest").exists():  # that of step 3
            time.sleep(0.01)
        limit_files(20_000)


@pytest.fixture
def whole_disk():
    yield
    limit_files(None)


def test_a_full_disk_ends_the_run_and_keeps_the_last_checkpoint(corpus, tmp_path, whole_disk):
    cfg = short_run(corpus, tmp_path / "run", 9, every=3)
    complaint = "step-00000006: saving failed: .*File too large.*; the newest checkpoint is step-00000003"
    with pytest.raises(UserError, match=complaint):
        train(cfg, on_step=functools.partial(fill_disk, cfg))
    assert list(checkpoints(cfg)) == [3]
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} == {"step-00000003", "latest"}
    limit_files(None)
    train(cfg)
    assert sorted(checkpoints(cfg)) == [6, 9]


def fill_disk_of_one_rank(cfg):
    """What rank 1 cannot write, no rank calls saved."""
    with pytest.raises(UserError, match=r"step-00000006: saving failed: .*File too large"):
        train(cfg, on_step=functools.partial(fill_disk, cfg) if torch.distributed.get_rank() == 1 else None)


def test_what_one_rank_cannot_write_is_no_checkpoint_of_any(corpus, tmp_path):
    cfg = short_run(corpus, tmp_path / "run", 6, every=3)
    cfg.data.rows_per_step, cfg.parallel.zero = 2, 1
    spawn(2, fill_disk_of_one_rank, cfg)
    assert list(checkpoints(cfg)) == [3]


def test_an_error_in_the_background_is_raised_at_the_next_step(corpus, tmp_path):
    failed = threading.Event()

    def fail(path, pieces):
        failed.set()
        raise RuntimeError("out of luck")

    def look(step, *_):
        assert step < 5
        if step == 4:
            assert failed.wait(30)
            time.sleep(0.1)

    cfg = short_run(corpus, tmp_path / "run", 9, every=3)
    with mock.patch("minitrain.checkpoint.write_pieces", fail), pytest.raises(RuntimeError, match="out of luck"):
        train(cfg, on_step=look)


# ---- two runs on one folder


def hold(cfg, ready):
    train(cfg, on_step=lambda *_: (ready.set(), time.sleep(60)))


def test_a_folder_in_use_is_refused_and_free_when_its_run_was_killed(corpus, tmp_path):
    cfg = short_run(corpus, tmp_path / "run", 2)
    ready = multiprocessing.get_context("forkserver").Event()
    process = start(hold, cfg, ready)
    assert ready.wait(60)
    with pytest.raises(UserError, match=r"run_dir=.*run: another run uses it"):
        train(cfg)
    process.kill()
    end(process)
    train(cfg)
    assert list(checkpoints(cfg)) == [2]
