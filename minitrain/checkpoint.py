"""Checkpoints: a folder a step, whole or not there, no pickle.

    run_dir/checkpoints/step-00001000/
        model.safetensors        master weights by parameter name, fp32
        optimizer.safetensors    the optimizer's tensors, "parameter's name.key"
        manifest.json            step, place in the data, sha256 of both files; written last

The folder is filled under a temporary name, synced, and renamed: what bears the final name is complete.
"""

import logging
import shutil
from pathlib import Path

from minitrain.config import CheckpointConfig, UserError
from minitrain.parallel.mesh import Mesh
from minitrain.parallel.zero import MasterOptimizer
from minitrain.storage import NewFolder, open_safetensors, read_json, send_pieces, sha256, write_json, write_safetensors

log = logging.getLogger(__name__)

FORMAT = 1
FILES = ("model.safetensors", "optimizer.safetensors")


class Checkpointer:
    """Saves and restores weights, optimizer and data of one run.

    data: with state() and load_state(), its place is stored; any other iterator is advanced step by step on resume.
    """

    def __init__(self, cfg: CheckpointConfig, run_dir: Path, opt: MasterOptimizer, data, mesh: Mesh):
        self.cfg, self.opt, self.data, self.mesh = cfg, opt, data, mesh
        self.folder = run_dir / "checkpoints"
        if not cfg.resume and (self.find() or (run_dir / "metrics.jsonl").exists()):
            raise UserError(f"{run_dir} holds a run already and checkpoint.resume is false; choose another run_dir")

    def find(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return sorted(p for p in self.folder.glob("step-*") if p.name[5:].isdigit())

    def resume(self) -> int:
        """Restore the newest checkpoint, if there is one. -> how many steps are done.

        UserError if it is damaged, or of another model, optimizer or corpus; nothing is changed then.
        """
        done = self.find()
        newest = int(done[-1].name[5:]) if done else 0
        if self.mesh.sum(newest) != newest * self.mesh.size:
            raise UserError(f"{self.folder}: not the same on all ranks; run_dir has to be where all nodes see it")
        if not done:
            return 0
        path = done[-1]
        manifest = _read_manifest(path)
        if manifest["optimizer"] != self._optimizer:
            raise UserError(f"{path}: of another optimizer: {manifest['optimizer']} there, {self._optimizer} here")
        weights, state = (open_safetensors(path / file) for file in FILES)
        shapes = {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
        wanted = {name: tuple(master.shape) for name, master in self.opt.weights().items()}
        if wrong := [n for n in sorted(shapes | wanted) if shapes.get(n) != wanted.get(n)]:
            n = wrong[0]
            there, here = shapes.get(n, "absent"), wanted.get(n, "absent")
            raise UserError(f"{path}: of another model: {n} is {there} there and {here} in the config")
        if (manifest["data"] is not None) != hasattr(self.data, "load_state"):
            raise UserError(f"{path}: of a run on another kind of data: one has state() and load_state(), one has not")
        if manifest["data"] is not None:
            self.data.load_state(manifest["data"])
        else:
            for _ in range(manifest["step"]):
                next(self.data)
        self.opt.load_weights(weights.get_tensor)
        self.opt.load_state({name: state.get_tensor(name) for name in state.keys()})  # noqa: SIM118
        log.info("resumed from %s", path)
        return manifest["step"]

    @property
    def _optimizer(self) -> str:
        return type(self.opt.optimizer).__name__

    def is_due(self, step: int, steps: int) -> bool:
        """After `step` of `steps` steps."""
        return self.cfg.every > 0 and (step % self.cfg.every == 0 or step == steps)

    def save(self, step: int) -> None:
        """Write the state after `step` steps, then delete what is older than the newest cfg.keep.

        Called by all ranks: rank 0 writes, the others send it their pieces.
        """
        path, contents = self.folder / f"step-{step:08}", (self.opt.weights(), self.opt.state())
        if self.mesh.rank > 0:
            for tensors in contents:
                send_pieces(dict(sorted(tensors.items())))
            return
        with NewFolder(path, replace=True) as tmp:
            tensors = zip(FILES, contents, strict=True)
            manifest = {
                "format": FORMAT,
                "step": step,
                "optimizer": self._optimizer,
                "data": self.data.state() if hasattr(self.data, "load_state") else None,
                "sha256": {file: write_safetensors(tmp / file, dict(sorted(of.items()))) for file, of in tensors},
            }
            write_json(tmp / "manifest.json", manifest)
        for old in self.find()[: -self.cfg.keep]:
            shutil.rmtree(old)


def _read_manifest(path: Path) -> dict:
    """manifest.json of a checkpoint, checked against the folder's name and its files' bytes."""
    manifest = read_json(path / "manifest.json")
    if manifest.get("format") != FORMAT:
        raise UserError(f"{path}: format {manifest.get('format')}, this version reads {FORMAT}")
    if not manifest.keys() >= {"optimizer", "data", "sha256"} or manifest.get("step") != int(path.name[5:]):
        raise UserError(f"{path / 'manifest.json'}: damaged: it is not this checkpoint's")
    for file in FILES:
        if not (path / file).exists():
            raise UserError(f"{path / file}: no such file")
        if sha256(path / file) != manifest["sha256"].get(file):
            raise UserError(
                f"{path / file}: damaged: its sha256 is not the one in manifest.json; "
                "without that folder the run goes on from the checkpoint before it"
            )
    return manifest
