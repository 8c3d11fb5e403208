"""What a run survives: being killed at any instant, asked to stop, a second run on its folder."""

import contextlib
import itertools
import logging
import math
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from random import Random
from unittest import mock

import pytest
import torch
from conftest import _rank, read_metrics, spawn, tiny_run

from minitrain import UserError, cross_entropy, train
from minitrain import checkpoint as checkpoint_module
from minitrain.__main__ import main
from minitrain.config import to_toml
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


def wait_for(path):
    for _ in range(3000):
        if path.exists():
            return
        time.sleep(0.01)
    raise AssertionError(f"{path} did not come")


def checkpoints(cfg):
    """{step: its checkpoint, every byte of it checked}."""
    found = {}
    for path in (Path(cfg.run_dir) / "checkpoints").glob("step-*"):
        if not path.suffix:
            saved = found[int(path.name[5:])] = Saved(path)
            saved.verify()
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


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kills", [20, 200])
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


def run_rank(rank, n, attempt, port, folder, victims, at, after):
    """As torchrun starts it. The first of the victims sends SIGKILL to all of them, `after` seconds behind the at-th
    thing that it does to files of checkpoints, counted from the beginning of a save."""
    count = itertools.count(1)
    (folder / f"pid-{rank}").write_text(str(os.getpid()))
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{name}-{rank}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)

    def kill():
        time.sleep(after)
        for victim in reversed(victims):
            os.kill(int((folder / f"pid-{victim}").read_text()), signal.SIGKILL)

    def watch(event, args):
        nonlocal is_saving
        if event == "open" or event.startswith(("os.", "shutil.")):
            is_saving = is_saving or ".tmp" in str(args[0])
            if is_saving and any(name in str(args[0]) for name in FILES) and next(count) == at:
                threading.Thread(target=kill).start() if after else kill()

    is_saving = False
    if rank == victims[0]:
        sys.addaudithook(watch)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": n, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    place |= {"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": attempt}
    os.environ.update({name: str(value) for name, value in place.items()})
    sys.argv = ["minitrain", "--config", str(folder / "run.toml")]
    main()


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "ranks, kills", [(2, 3), pytest.param(2, 60, marks=pytest.mark.slow), pytest.param(4, 60, marks=pytest.mark.slow)]
)
def test_ranks_that_are_killed_in_a_save_end_the_others_and_lose_nothing(corpus, tmp_path, ranks, kills):
    """One rank or all, while rank 0 or another one writes; then all are started again."""
    calm, killed = (short_run(corpus, tmp_path / name, 2 * kills + 2, every=1, keep=2) for name in ("calm", "killed"))
    for cfg in (calm, killed):
        cfg.data.rows_per_step, cfg.parallel.zero, cfg.train.log_every = ranks, 1, 1
    calm.checkpoint.every = 0
    spawn(ranks, train, calm)
    (tmp_path / "run.toml").write_text(to_toml(killed))
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    random, announced = Random(0), 0
    for attempt in range(kills):
        first = random.randrange(1, ranks) if attempt % 2 else 0
        others = [rank for rank in range(ranks) if rank != first]
        victims = [first, *random.choice([[], others])]
        at = random.randint(1, 4) if first else 1 + (attempt // 2 * 5 + random.randint(0, 4)) % 36
        instant = victims, at, random.choice([0, 0.003 * random.random()])
        started = [start(run_rank, rank, ranks, attempt, store.port, tmp_path, *instant) for rank in range(ranks)]
        started[first].join(120)
        since = time.monotonic()
        codes = [end(process) for process in started]
        seconds = time.monotonic() - since
        assert [rank for rank in range(ranks) if codes[rank] == -signal.SIGKILL] == sorted(victims), codes
        errors = "".join((tmp_path / f"err-{rank}").read_text() for rank in range(ranks))
        assert seconds < 10 and "Traceback" not in errors
        assert errors.count("error: ") == (len(victims) < ranks), errors
        lines = (tmp_path / "out-0").read_text().splitlines()
        announced = max([announced, *(int(line[-8:]) for line in lines if line.startswith("saved "))])
        assert max(checkpoints(killed), default=0) >= announced
    assert 0 < announced < killed.train.steps
    spawn(ranks, train, killed)
    assert losses(killed) == losses(calm)
    left = {path.name for path in (tmp_path / "killed" / "checkpoints").iterdir()}
    assert left == {"latest", *(f"step-{killed.train.steps - ago:08}" for ago in (0, 1))}


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


def save_forever(cfg):
    with mock.patch("minitrain.checkpoint.write_pieces", lambda *_: time.sleep(60)):
        train(cfg)


def test_a_second_signal_ends_all_ranks_at_once_while_they_save(corpus, tmp_path):
    cfg = short_run(corpus, tmp_path / "run", 100_000, every=3)
    cfg.data.rows_per_step, cfg.parallel.zero = 2, 1
    ranks = [start(_rank, rank, 2, str(tmp_path / "store"), "cpu", save_forever, (cfg,)) for rank in range(2)]
    wait_for(tmp_path / "run" / "checkpoints" / "step-00000003.tmp")
    for rank in ranks:
        os.kill(rank.pid, signal.SIGUSR1)  # as SLURM's --signal: the save of the step that runs waits for this one
    time.sleep(1.5)
    assert all(rank.is_alive() for rank in ranks)
    for rank in ranks:
        os.kill(rank.pid, signal.SIGTERM)
    since = time.monotonic()
    assert [end(rank) for rank in ranks] == [143, 143]
    assert time.monotonic() - since < 5 and not checkpoints(cfg)


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


def validated_run(corpus, run_dir):
    return tiny_run(
        corpus, run_dir, data={"held_out": 10}, train={"steps": 12, "validate_every": 1},
        checkpoint={"every": 2, "keep": 1, "keep_best": True, "export": False},
    )  # fmt: skip


def best_of(cfg, monkeypatch, losses, stop_after=None):
    """The step of the link best, and the steps of all checkpoints, when validations give these losses."""
    given = [{"source": "s", "loss": loss, "perplexity": 1.0, "trained_tokens": 5} for loss in losses]

    def stop(step, *_):
        if step == stop_after:
            raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["minitrain.train"], "validate", lambda *_: [given.pop(0)])
    with contextlib.suppress(KeyboardInterrupt):
        train(cfg, on_step=stop)
    link = Path(cfg.run_dir) / "checkpoints" / "best"
    return link.exists() and int(link.resolve().name[5:]), sorted(checkpoints(cfg))


def test_the_checkpoint_of_the_lowest_validation_loss_is_kept(corpus, tmp_path, monkeypatch):
    cfg = validated_run(corpus, tmp_path / "run")
    losses = [9.0, 5.0, 1.0, 4.0, 1.0, 6.0, 1.0, 4.0, 1.0, 6.0, 1.0, 6.0]  # those of odd steps are never saved
    assert best_of(cfg, monkeypatch, losses) == (4, [4, 12])


def test_which_checkpoint_is_the_best_is_known_after_a_restart(corpus, tmp_path, monkeypatch):
    cfg = validated_run(corpus, tmp_path / "run")
    assert best_of(cfg, monkeypatch, [5.0] * 3 + [4.0] + [6.0] * 8, stop_after=9) == (4, [4, 8])
    assert best_of(cfg, monkeypatch, [4.5] * 4) == (4, [4, 12])
    cfg.train.steps = 14
    assert best_of(cfg, monkeypatch, [3.0] * 2) == (14, [14])


def test_a_validation_loss_that_is_no_number_is_never_the_best(corpus, tmp_path, monkeypatch):
    losses = [math.nan] * 5 + [5.0] * 2 + [math.nan] * 5
    assert best_of(validated_run(corpus, tmp_path / "run"), monkeypatch, losses) == (6, [6, 12])


def test_a_best_checkpoint_that_is_gone_is_none(corpus, tmp_path, monkeypatch):
    cfg = validated_run(corpus, tmp_path / "run")
    best_of(cfg, monkeypatch, [5.0] * 3 + [4.0] + [6.0] * 8, stop_after=9)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000004")
    assert best_of(cfg, monkeypatch, [7.0, 8.0, 8.0, 9.0]) == (10, [10, 12])


@pytest.mark.parametrize("every, validate_every", [(5, 2), (5, 0), (0, 5), (2, 4)])
def test_the_best_is_chosen_among_checkpoints_that_are_all_validated(corpus, tmp_path, every, validate_every):
    with pytest.raises(UserError, match=f"every={every} is no multiple of train.validate_every={validate_every}$"):
        tiny_run(
            corpus, tmp_path, data={"held_out": 10}, train={"validate_every": validate_every},
            checkpoint={"every": every, "keep_best": True},
        )  # fmt: skip


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
