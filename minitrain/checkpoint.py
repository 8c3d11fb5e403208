"""Checkpoints: a folder a step, whole or not there, no pickle.

    run_dir/checkpoints/step-00001000/
        model.safetensors        master weights by parameter name, fp32
        optimizer.safetensors    the optimizer's tensors, "parameter's name.key"
        manifest.json            step, place in the data, sha256 of both files; written last

The folder is filled under a temporary name, synced, and renamed: what bears the final name is complete.
"""

import shutil
from pathlib import Path

import torch

from minitrain.config import CheckpointConfig, UserError
from minitrain.parallel.zero import ShardedOptimizer
from minitrain.storage import NewFolder, open_safetensors, read_json, sha256, write_json, write_safetensors

FORMAT = 1


class Checkpointer:
    """Saves and restores weights, optimizer and data of one run.

    data: with state() and load_state(), its place is stored; any other iterator is advanced step by step on resume.
    """

    def __init__(self, cfg: CheckpointConfig, run_dir: Path, opt: ShardedOptimizer, data):
        self.cfg, self.opt, self.data = cfg, opt, data
        self.folder = run_dir / "checkpoints"
        if self.find() and not cfg.resume:
            raise UserError(f"{run_dir} holds a run already and checkpoint.resume is false; choose another run_dir")

    def find(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return sorted(p for p in self.folder.glob("step-*") if p.name[5:].isdigit())

    def resume(self) -> int:
        """Restore the newest checkpoint, if there is one. -> how many steps are done."""
        if not self.find():
            return 0
        path = self.find()[-1]
        manifest = read_json(path / "manifest.json")
        if manifest.get("format") != FORMAT:
            raise UserError(f"{path}: format {manifest.get('format')}, this version reads {FORMAT}")
        step = manifest["step"]
        for file, digest in manifest["sha256"].items():
            if sha256(path / file) != digest:
                raise UserError(f"{path / file}: damaged: its sha256 is not the one in manifest.json")
        weights = open_safetensors(path / "model.safetensors")
        shapes = {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
        wanted = {name: tuple(master.shape) for name, master in self.opt.masters.items()}
        if wrong := [n for n in sorted(shapes | wanted) if shapes.get(n) != wanted.get(n)]:
            n = wrong[0]
            raise UserError(f"{path}: of another model: {n} is {shapes.get(n)} there and {wanted.get(n)} in the config")
        with torch.no_grad():
            for name, master in self.opt.masters.items():
                master.copy_(weights.get_tensor(name))
        self.opt.write_weights()
        state = open_safetensors(path / "optimizer.safetensors")
        self.opt.load_state({name: state.get_tensor(name) for name in state.keys()})  # noqa: SIM118
        if manifest["data"] is not None:
            self.data.load_state(manifest["data"])
        else:
            for _ in range(step):
                next(self.data)
        return step

    def is_due(self, step: int, steps: int) -> bool:
        """After `step` of `steps` steps."""
        return step % self.cfg.every == 0 or step == steps

    def save(self, step: int) -> None:
        """Write the state after `step` steps, then delete what is older than the newest cfg.keep."""
        path = self.folder / f"step-{step:08}"
        with NewFolder(path, replace=True) as tmp:
            digests = {
                "model.safetensors": write_safetensors(tmp / "model.safetensors", self.opt.masters),
                "optimizer.safetensors": write_safetensors(tmp / "optimizer.safetensors", self.opt.state()),
            }
            place = self.data.state() if hasattr(self.data, "state") else None
            write_json(tmp / "manifest.json", {"format": FORMAT, "step": step, "data": place, "sha256": digests})
        for old in self.find()[: -self.cfg.keep]:
            shutil.rmtree(old)
