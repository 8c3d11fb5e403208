"""The training loop: read train(), then whatever it calls.

Everything here is a function of modules that you can import; who needs another loop writes their own twenty lines.
"""

import contextlib
import functools
import logging
import platform
import shutil
import subprocess
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from importlib.metadata import distributions
from pathlib import Path

import torch
from torch import Tensor, nn

from minitrain.batch import Batch
from minitrain.checkpoint import Checkpointer
from minitrain.config import Config, UserError, to_toml
from minitrain.data import PackedData
from minitrain.deterministic import deterministic_if_asked
from minitrain.hf import chat_template, find_folder, load_weights, save_pretrained
from minitrain.metrics import Log
from minitrain.models import build_model, init_weights, load_object, materialize
from minitrain.models.layers import DecoderConfig
from minitrain.optim import adamw, lr_at
from minitrain.parallel import compute_dtype, parallelize
from minitrain.parallel.comm import sum_named
from minitrain.parallel.cp import share_tokens
from minitrain.parallel.ddp import parts_of
from minitrain.parallel.mesh import ALONE, Mesh, init_mesh
from minitrain.parallel.pp import link_of
from minitrain.parallel.zero import shard_optimizer
from minitrain.signals import EXIT_CODE, StopSignals
from minitrain.storage import load_tokenizer
from minitrain.validate import mean_loss, validate

log = logging.getLogger(__name__)


@deterministic_if_asked
def train(
    cfg: Config,
    *,
    model: nn.Module | None = None,
    loss_fn: Callable | None = None,
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
    data: Iterator[list[Batch]] | None = None,
    on_step: Callable[[int, nn.Module, dict], None] | None = None,
) -> nn.Module:
    """Train as the config says, and return the model. Each keyword replaces a part by one of your own.

    model: any module of CausalLM's shape, with weights or on meta; its config takes the place of cfg.model.
    loss_fn: (hidden, head, batch) -> (sum, {name: sum}).
    optimizer: list of parameters -> torch.optim.Optimizer; before each step its learning rate is set from cfg.optim.
    data: an iterable of lists of Batch, one list a step.
    on_step: called after each step with (steps done, model, extras of the loss).
    Raises UserError for settings and files that do not fit, FloatingPointError when the loss is no number. SIGTERM and
    SIGUSR1 end it with SystemExit(143) after the step that runs, which is saved; a second one ends the process at once.
    """
    if model and isinstance(model.config, DecoderConfig):  # what is written down is what is trained
        pretrained = cfg.model.pretrained or model.config.pretrained
        cfg = replace(cfg, model=replace(model.config, pretrained=pretrained))
    mesh = init_mesh(cfg.train.device, cfg.parallel, model.config if model else cfg.model)
    loss_fn = loss_fn or load_object(cfg.train.loss)
    model = model or build_model(cfg.model)  # on meta: names and shapes, no bytes
    data = iter(PackedData(cfg.data, mesh, model.config.vocab_size) if data is None else data)
    if cfg.train.validate_every:
        _check_held_out(cfg, data)
    _warn(cfg, model)
    model = parallelize(model, mesh, cfg.train)
    fill = set_weights(model, cfg, mesh)
    opt = shard_optimizer(model, optimizer or adamw(cfg.optim), mesh, cfg.parallel, fill)
    with contextlib.closing(opt), Checkpointer(cfg, opt, data, mesh) as ckpt, StopSignals() as signals:
        first = ckpt.resume()
        with Log(open_run(cfg, mesh), cfg.train, model, mesh, first) as log:
            for step in range(first, cfg.train.steps):
                batches = log.wait_for(data)  # this rank's rows of the step
                # Of all ranks: trained tokens, and how many were asked to stop; all stop after the same step.
                counts = torch.tensor([sum(b.num_targets for b in batches), signals.asked])
                tokens, asked = mesh.sum_host(counts).tolist()
                tokens //= mesh.ranks_of_a_row
                loss, extras = forward_backward(model, batches, loss_fn, 1 / max(1, tokens), mesh, opt.backward)
                norm = opt.clip_grad_norm(cfg.optim.max_norm, loss)  # both stay on the device
                lr = lr_at(step, cfg.optim, cfg.train.steps)
                ckpt.before_step()
                opt.step(lr)
                log.step(step + 1, batches, tokens, loss, norm, lr, extras)
                if on_step:
                    opt.settle()
                    on_step(step + 1, model, extras)
                validated = None
                if _is_validated(step + 1, cfg) and not asked:
                    with log.pause():
                        results = validate(model, data, loss_fn, mesh)
                        log.validation(step + 1, results)
                        validated = mean_loss(results)
                if ckpt.is_due(step + 1, cfg.train.steps, bool(asked)):
                    with log.pause():  # raises if the loss is no number, before anything is saved
                        ckpt.save(step + 1, validated)
                if asked:
                    ckpt.wait()
                    raise SystemExit(EXIT_CODE)
    if cfg.checkpoint.export:
        tokenizer = None if cfg.model.pretrained else cfg.data.tokenizer or None  # None: of where it began from
        template = chat_template(cfg.data.all_sources)
        save_pretrained(model, Path(cfg.run_dir) / "export", tokenizer, overwrite=True, chat_template=template)
    return model


def _check_held_out(cfg: Config, data) -> None:
    """UserError if there is nothing to validate on."""
    if not hasattr(data, "held_out_rows"):
        raise UserError("train.validate_every: data of your own needs held_out_rows(), as PackedData has it")
    if isinstance(data, PackedData) and not data.held_out_rows():
        raise UserError(
            f"train.validate_every={cfg.train.validate_every}: there is nothing to validate on; "
            "set data.held_out, or give a source the weight 0"
        )


def _warn(cfg: Config, model: nn.Module) -> None:
    """Of settings that do less than they say; a trial of some steps may well have them."""
    if cfg.optim.warmup_steps >= cfg.train.steps:
        log.warning("optim.warmup_steps=%s: the learning rate does not reach optim.lr in train.steps=%s",
                    cfg.optim.warmup_steps, cfg.train.steps)  # fmt: skip
    if cfg.data.held_out and not cfg.train.validate_every:
        log.warning("data.held_out=%s: not trained on, and with train.validate_every=0 not validated on either",
                    cfg.data.held_out)  # fmt: skip
    persistent = model.state_dict(keep_vars=True)
    if kept := [name for name, _ in model.named_buffers() if name in persistent]:
        log.warning("buffer %s is persistent, but in no checkpoint or export: after a resume it begins anew", kept[0])


def _is_validated(step: int, cfg: Config) -> bool:
    """After `step` steps."""
    every = cfg.train.validate_every
    return every > 0 and (step % every == 0 or step == cfg.train.steps)


def forward_backward(
    model: nn.Module,
    batches: list[Batch],
    loss_fn: Callable,
    scale: float,
    mesh: Mesh = ALONE,
    backward: Callable[[nn.Module, bool], contextlib.AbstractContextManager] = lambda *_: contextlib.nullcontext(),
) -> tuple[Tensor, dict[str, Tensor]]:
    """Gradients of scale * (sum of the rows' losses), added up row by row. -> scaled loss and extras, detached.

    On several ranks each has its own rows; loss and extras are those of all. backward(model or its part, is the row the
    last) is a context for a row's backward, in which gradients are summed over the ranks. In a pipeline a row's forward
    and backward lie apart, and gradients of weights may be made later still (model.deferred, for which backward is
    called again); without one they follow each other.
    """
    parts = parts_of(model)
    if deferred := getattr(model, "deferred", None):
        deferred.rows.clear()  # forwards that no step has asked for
    sums, rows = {"": 0.0}, {}  # the loss and extras; rows between their forward and backward
    for batch in batches:
        batch.share = mesh.group("pp").size / (len(batches) * mesh.size)  # ranks that share a row add up theirs
    mine = [share_tokens(batch, mesh.group("cp")) for batch in batches]
    for action, i, part in link_of(model).actions(len(batches)):
        batch, link = mine[i], link_of(parts[part])
        if action == "forward":
            x_TD, y = link.forward(parts[part], batch)
            if link.is_last:
                y, named = loss_fn(y, model.lm_head, batch)
                y = y * scale
                sums[""] += y.detach()
                for name, value in named.items():
                    sums[name] = sums.get(name, 0.0) + torch.as_tensor(value, device=y.device).detach() * scale
            rows[i, part] = x_TD, y
        elif action == "backward":
            with backward(parts[part], i == len(batches) - 1):
                link.backward(*rows.pop((i, part)))
        else:
            with backward(deferred, i == len(batches) - 1):
                deferred.run()
    for part in parts:
        link_of(part).finish()
    link = link_of(parts[-1])
    if link.is_last:
        sums = sum_named(sums, mesh.group("data"))
    extras = link.from_last(model, sums)
    return extras.pop(""), extras


@torch.no_grad()
def set_weights(model: nn.Module, cfg: Config, mesh: Mesh) -> Callable[[Collection[str]], None] | None:
    """Put the model on the device in the compute dtype; one that is on meta gets the pretrained or random weights.

    Under ZeRO 3 it does not get them, nor the memory: fill(names) is returned, which gives a part its values.
    """
    is_new = next(model.parameters()).is_meta
    dtype = compute_dtype(mesh, cfg.train)
    if not is_new:
        model.to(mesh.device, dtype)
        return None
    is_cut_first = cfg.parallel.zero == 3 and mesh.size > 1
    materialize(model, mesh.device, dtype, with_memory=not is_cut_first)
    if cfg.model.pretrained:
        folder = find_folder(cfg.model.pretrained)
        if cfg.data.tokenizer:
            _check_tokenizer(folder, cfg)
        fill = functools.partial(load_weights, model, folder)
    else:
        fill = functools.partial(init_weights, model, cfg.train.seed)
    if is_cut_first:
        return fill
    fill()
    return None


def _check_tokenizer(source: Path, cfg: Config) -> None:
    """UserError if the data's ids mean other tokens than the pretrained model's."""
    theirs, ours = source / "tokenizer.json", Path(cfg.data.tokenizer) / "tokenizer.json"
    if not (theirs.exists() and ours.exists()) or theirs.read_bytes() == ours.read_bytes():
        return
    if load_tokenizer(source).get_vocab() != load_tokenizer(cfg.data.tokenizer).get_vocab():
        raise UserError(f"{cfg.data.tokenizer}: made with another tokenizer than {theirs}; prepare it with that one")


def open_run(cfg: Config, mesh: Mesh) -> Path:
    """The run's folder, in which rank 0 writes what is needed to repeat the run: config.toml and environment.txt."""
    folder = Path(cfg.run_dir)
    if mesh.rank > 0:
        return folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.toml").write_text(to_toml(cfg))
        (folder / "environment.txt").write_text(_environment())
    except OSError as error:
        raise UserError(f"run_dir={cfg.run_dir}: cannot be written: {error.strerror}") from None
    return folder


def _environment() -> str:
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    version = subprocess.run(git, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
    packages = sorted({f"{d.name}=={d.version}" for d in distributions()})
    return "\n".join([f"git {version}", f"python {platform.python_version()}", *packages]) + "\n"
