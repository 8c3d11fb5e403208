"""Checkpoints: saved beside the training, whole or not there, resumed on any number of ranks in any layout.

    run_dir/checkpoints/
        step-00001000/    a checkpoint (pieces.py has the format)
        latest            a link to the newest, for people; a run looks for the newest itself
        best              a link to the one of the lowest validation loss (checkpoint.keep_best)
        step-N.tmp .old   being written, being deleted: cleared away by the next run
        step-N.damaged    set aside with checkpoint.fallback

A save:  copy to host memory | each rank writes its file | rank 0: manifest, rename, latest | delete what is old
         on a stream beside  | in a thread, while training goes on; all is synced before it is named
Between the parts of a save ranks tell each other how it went: what one of them raises, all raise.
"""

import contextlib
import functools
import json
import logging
import math
import os
import platform
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from minitrain.boxes import part_of
from minitrain.config import Config, UserError
from minitrain.parallel.comm import Lane
from minitrain.parallel.mesh import Mesh
from minitrain.parallel.zero import MasterOptimizer
from minitrain.pieces import Damaged, Piece, Saved, write_manifest, write_pieces
from minitrain.storage import Later, lock_folder, sync_folder

log = logging.getLogger(__name__)

_PATIENCE = timedelta(hours=1)  # of ranks whose disks are fast with those whose are not
_LAST_WAIT_S = 60  # for a save, when the run has failed on several ranks: others may be gone


class Checkpointer:
    """`with Checkpointer(...) as ckpt:` saves and restores weights, optimizer, data and random generators of one run.

    Inside, the run's folder is this run's own; at the end the save that runs is waited for. All ranks call everything
    together. data: with state() and load_state(), its place is stored; any other iterator is advanced step by step on
    resume.
    """

    def __init__(self, cfg: Config, opt: MasterOptimizer, data, mesh: Mesh):
        self.cfg, self.opt, self.data, self.mesh = cfg.checkpoint, opt, data, mesh
        self.run_dir = Path(cfg.run_dir)
        self.folder = self.run_dir / "checkpoints"
        self.about = {
            "config": asdict(cfg),
            "dtype": str(next(iter(opt.params.values())).dtype).removeprefix("torch."),
            "optimizer": type(opt.optimizer).__name__,
            "versions": {"torch": torch.__version__, "python": platform.python_version()},
        }
        self.tensors: dict[str, tuple[torch.dtype, torch.Size]] = {}  # of all ranks, as opt.tensors() has them
        self.group = dist.new_group(backend="gloo", timeout=_PATIENCE) if mesh.size > 1 else None
        self.lock: int | None = None
        self.lane = Lane(mesh.device)
        self.mark = None  # when the copy of the last save is done
        self.host: dict[str, Tensor] = {}  # that copy, which the next save overwrites
        self.thread = ThreadPoolExecutor(1)
        self.running: Future | None = None
        self.best: dict | None = None  # of rank 0: "step" and "loss" of the one of the lowest validation loss

    # ---- the run's folder

    def __enter__(self) -> "Checkpointer":
        self._together(self._begin, only_first=True)
        return self

    def _begin(self) -> None:
        if not self.cfg.resume and (self.find() or (self.run_dir / "metrics.jsonl").exists()):
            raise UserError(
                f"{self.run_dir} holds a run already and checkpoint.resume is false; choose another run_dir"
            )
        self.lock = lock_folder(self.run_dir)
        for leftover in [*self.folder.glob("step-*.tmp"), *self.folder.glob("step-*.old")]:
            shutil.rmtree(leftover)

    def __exit__(self, failed, *_) -> None:
        try:
            self.wait(_LAST_WAIT_S if failed and self.group is not None else None)
        except Exception as error:
            if not failed:
                raise
            log.error("the save that ran did not end well: %r", error)  # beside what ends the run
        finally:
            self.thread.shutdown(wait=not failed)
            if self.lock is not None:
                os.close(self.lock)

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08}"

    def find(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return sorted(p for p in self.folder.glob("step-*") if p.name[5:].isdigit())

    # ---- reading

    def resume(self) -> int:
        """Restore the newest checkpoint, if there is one. -> how many steps are done.

        UserError if it is damaged (with checkpoint.fallback, if all are), or of another model, optimizer or corpus;
        nothing is changed then.
        """
        done = self.find()
        for of_rank in self._together(self.opt.tensors):  # stages of a pipeline have different ones
            self.tensors |= of_rank
        newest = int(done[-1].name[5:]) if done else 0
        if self.mesh.sum(newest) != newest * self.mesh.size:
            raise UserError(f"{self.folder}: not the same on all ranks; run_dir has to be where all nodes see it")
        for path in reversed(done):
            try:
                self._together(functools.partial(self._verify, path))
            except Damaged as error:
                if path == done[0] or not self.cfg.fallback:
                    hint = "; checkpoint.fallback=true goes on from the one before it" if path != done[0] else ""
                    raise Damaged(f"{error}{hint}") from None
                log.warning("%s", error)
                self._together(functools.partial(self._set_aside, path), only_first=True)
            else:
                return self._load(Saved(path))
        return 0

    def _verify(self, path: Path) -> None:
        """That it is whole (each rank reads some of the files) and fits."""
        saved = Saved(path)
        if saved.manifest["step"] != int(path.name[5:]):
            raise Damaged(f"{path}: its manifest is of step {saved.manifest['step']}")
        saved.verify(self.mesh.rank, self.mesh.size)
        self._check_fits(path, saved)

    def _check_fits(self, path: Path, saved: Saved) -> None:
        """UserError if it is of another optimizer, model or kind of data."""
        there, here = saved.manifest["optimizer"], self.about["optimizer"]
        if there != here:
            raise UserError(f"{path}: of another optimizer: {there} there, {here} here")
        there = {name: tensor for name, tensor in saved.tensors.items() if name.startswith("model.")}
        here = self.tensors
        if wrong := [name for name in sorted(there | here) if there.get(name) != here.get(name)]:
            n = wrong[0]
            texts = [f"{tuple(t[n][1])} in {str(t[n][0])[6:]}" if n in t else "absent" for t in (there, here)]
            raise UserError(
                f"{path}: of another model: {n.removeprefix('model.')} is {texts[0]} there and {texts[1]} in the config"
            )
        for name in saved.tensors:
            kind, _, rest = name.partition(".")
            param = rest.rpartition(".")[0]
            if kind == "optimizer" and f"model.{param}" not in here:
                raise UserError(f"{path}: of another model: it has {name}, and the config has no {param}")
        if (saved.manifest["data"] is not None) != hasattr(self.data, "load_state"):
            raise UserError(f"{path}: of a run on another kind of data: one has state() and load_state(), one has not")

    def _set_aside(self, path: Path) -> None:
        aside = path.with_name(path.name + ".damaged")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)

    def _load(self, saved: Saved) -> int:
        manifest = saved.manifest
        best = manifest.get("best")
        self.best = best if best and self._path(best["step"]).exists() else None
        if manifest["data"] is not None:
            self.data.load_state(manifest["data"])
        else:
            for _ in range(manifest["step"]):
                next(self.data)
        for name, (_, set_state) in self._generators().items():
            if name in saved.tensors:  # a rank that was not there keeps what it has
                try:
                    set_state(saved.read(name))
                except (RuntimeError, TypeError) as error:
                    raise Damaged(f"{saved.folder}: {name} is no state of a generator: {error}") from None
        self.opt.load(saved.tensors, saved.read)
        log.info("resumed from %s", saved.folder)
        for change in _changes(manifest["config"], self.about["config"]):
            log.info("    %s", change)
        if manifest["step"] >= (steps := self.about["config"]["train"]["steps"]):
            log.info("train.steps=%s: all of them are done already", steps)
        return manifest["step"]

    def _generators(self) -> dict[str, tuple[Callable, Callable]]:
        """torch's own of this rank, by their names in a checkpoint: how to read and how to set their state."""
        name, device = f"rng.{self.mesh.rank}", self.mesh.device
        generators = {f"{name}.cpu": (torch.get_rng_state, torch.set_rng_state)}
        if device.type == "cuda":
            get, put = torch.cuda.get_rng_state, torch.cuda.set_rng_state
            generators[f"{name}.cuda"] = functools.partial(get, device), functools.partial(put, device=device)
        return generators

    # ---- writing

    def is_due(self, step: int, steps: int, is_last: bool) -> bool:
        """After `step` of `steps` steps; is_last: no more of them will be taken now."""
        return self.cfg.every > 0 and (step % self.cfg.every == 0 or step == steps or is_last)

    def save(self, step: int, validation_loss: float | None = None) -> None:
        """Begin to save the state after `step` steps; with a validation loss it can be the best so far.

        Waits for the save before it, and raises its error unless checkpoint.on_failure is go_on.
        """
        self._settle()
        pieces = self.opt.pieces()
        for name, (get_state, _) in self._generators().items():
            state = get_state()
            pieces[name] = Piece(state, *part_of(state))
        if not self.opt.host:
            with self.lane.beside():
                pieces = {name: replace(p, values=self._copy(name, p.values)) for name, p in pieces.items()}
            self.mark = self.lane.mark()
        data = self.data.state() if hasattr(self.data, "load_state") else None
        about = {"step": step, "data": data, **self.about}
        loss = validation_loss if self.cfg.keep_best else None
        self.running = self.thread.submit(self._save, about, loss, pieces, self.mark)

    def before_step(self) -> None:
        """Weights are about to change: on the device this waits for the copy. Raises the error of a save that ended,
        unless checkpoint.on_failure is go_on.

        Of offloaded states there is no copy, for which the host may have no room: this waits until they are written.
        Once the optimizer has state, memory for copies is made: pinning takes seconds, which the first save need not.
        """
        if self.running and (self.opt.host or self.running.done()):
            self._settle()
        elif self.cfg.every > 0 and self.opt.optimizer.state and not (self.running or self.host or self.opt.host):
            self.running = self.thread.submit(self._make_room, {n: p.values for n, p in self.opt.pieces().items()})
        self.lane.wait(self.mark)

    def _settle(self) -> None:
        """wait(), for a save that is not the last."""
        try:
            self.wait()
        except UserError as error:  # on all ranks, or on none
            if self.cfg.on_failure == "stop":
                raise
            log.warning("%s; training goes on", error)

    def wait(self, timeout_s: float | None = None) -> None:
        """Until the save that runs has ended. Raises its error."""
        if self.running:
            running, self.running = self.running, None
            running.result(timeout_s)

    def _make_room(self, tensors: dict[str, Tensor | Later]) -> None:
        """For their copies in host memory, for a GPU pinned."""
        for name, t in tensors.items():
            if name not in self.host:
                self.host[name] = torch.empty(t.shape, dtype=t.dtype, pin_memory=self.mesh.device.type == "cuda")

    def _copy(self, name: str, values: Tensor | Later) -> Tensor:
        """In host memory, complete after a mark on the lane."""
        self._make_room({name: values})
        values = values.read() if isinstance(values, Later) else values
        self.host[name].copy_(values, non_blocking=True)
        if values.is_cuda:
            values.record_stream(self.lane.stream)
        return self.host[name]

    def _save(self, about: dict, loss: float | None, pieces: dict[str, Piece], mark: torch.cuda.Event | None) -> None:
        """In the thread."""
        if mark is not None:
            mark.synchronize()
        path = self._path(about["step"])
        tmp = path.with_name(path.name + ".tmp")
        try:
            parts = self._together(functools.partial(self._write, tmp, pieces))
            self._together(functools.partial(self._publish, tmp, path, about, loss, parts), only_first=True)
        except OSError as error:
            needed = sum(self._together(functools.partial(self._discard, tmp, pieces)))
            free = shutil.disk_usage(self.run_dir).free
            newest = self.find()[-1].name if self.find() else "none"
            raise UserError(
                f"{path}: saving failed: {error}; it takes {needed:,} bytes and {free:,} are free; "
                f"the newest checkpoint is {newest}"
            ) from None

    def _write(self, tmp: Path, pieces: dict[str, Piece]) -> dict:
        tmp.mkdir(parents=True, exist_ok=True)
        path = tmp / f"rank-{self.mesh.rank:05}.safetensors"
        with _named(path):
            return write_pieces(path, pieces)

    def _discard(self, tmp: Path, pieces: dict[str, Piece]) -> int:
        """-> bytes of this rank."""
        if self.mesh.rank == 0:
            shutil.rmtree(tmp, ignore_errors=True)
        return sum(piece.values.nbytes for piece in pieces.values())

    def _publish(self, tmp: Path, path: Path, about: dict, loss: float | None, parts: list[dict]) -> None:
        best = self.best
        if loss is not None and loss < (best["loss"] if best else math.inf):  # which NaN is not
            best = {"step": about["step"], "loss": loss}
        with _named(tmp / "manifest.json"):
            write_manifest(tmp, {**about, "best": best}, parts)
        sync_folder(tmp)
        tmp.rename(path)
        sync_folder(self.folder)
        self.best = best
        self._link("latest", path)
        if best:
            self._link("best", self._path(best["step"]))
        sync_folder(self.folder)
        log.info("saved %s", path)
        for old in self.find()[: -self.cfg.keep]:
            step = int(old.name[5:])
            if not (self.cfg.keep_every and step % self.cfg.keep_every == 0) and not (best and step == best["step"]):
                gone = old.with_name(old.name + ".old")
                try:
                    old.rename(gone)  # what is half deleted does not look whole
                    shutil.rmtree(gone)
                except OSError as error:  # the new one is whole
                    log.warning("%s is not deleted: %s", old, error)

    def _link(self, name: str, to: Path) -> None:
        link = self.folder / f"{name}.new"
        link.unlink(missing_ok=True)
        link.symlink_to(to.name)
        link.replace(self.folder / name)

    def _together(self, do: Callable, only_first: bool = False) -> list:
        """do() on all ranks, or on rank 0 only. -> of each rank what it returned. What one raises, all raise."""
        result = error = None
        if self.mesh.rank == 0 or not only_first:
            try:
                result = do()
            except Exception as raised:
                error = raised
        outcomes = [(result, error)]
        if self.group is not None:
            outcomes = [None] * self.mesh.size
            dist.all_gather_object(outcomes, (result, error), group=self.group)
        for _, error in outcomes:
            if error is not None:
                raise error
        return [result for result, _ in outcomes]


def _changes(there: dict, here: dict) -> list[str]:
    """A text for each setting of what is trained that was another one; one that there was not yet had its default."""
    return [
        f"{section}.{key} was {there[section][key]!r}, is {value!r}"
        for section in ("model", "data", "optim", "train")
        for key, value in json.loads(json.dumps(here[section])).items()
        if there.get(section, {}).get(key, value) != value
    ]


@contextlib.contextmanager
def _named(path: Path):
    """An error of the disk inside says which file it is about: that of a write does not by itself."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, error.filename or str(path)) from None
