"""Every setting of a run: one dataclass a section, one line and one sentence a setting.

A TOML file and the command line are one thing here: the file's keys become flags, and the flags after it win. tyro
checks types and makes --help from the sentences. Sizes of the model are in minitrain/models/, beside the model.
"""

import argparse
import contextlib
import dataclasses
import difflib
import io
import itertools
import json
import math
import re
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import tyro


class UserError(ValueError):
    """Something a person set or gave is wrong: its text says what, the rule, and the fix, in one line, whatever a file
    has for names. The program exits with 2."""

    def __str__(self) -> str:
        return super().__str__().replace("\n", "\\n")


@dataclass
class SourceConfig:
    path: str = ""
    """Folder of token shards, made by tools/prepare_data.py."""
    weight: float = 1.0
    """Share of the tokens, relative to the weights of the other sources; 0: for validation only."""


@dataclass
class DataConfig:
    path: str = ""
    """Folder of token shards, made by tools/prepare_data.py; for several, [[data.sources]] with a path and a weight."""
    sources: list[SourceConfig] = field(default_factory=list)
    """Several folders, in the place of path."""
    tokens_per_row: int = 8192
    """T: tokens in one packed row; a row is what one forward and backward sees."""
    max_seqlen: int = 4096
    """Longest document in tokens. No more than tokens_per_row."""
    long_documents: Literal["split", "cut", "drop"] = "split"
    """Of a document longer than max_seqlen: train on all its parts, on the first one, or on none."""
    packing: Literal["concat", "best_fit"] = "concat"
    """concat: documents end to end, cut where a row is full; best_fit: whole documents only, and some padding."""
    look_ahead: int = 256
    """With best_fit: documents from which the ones that fill a row best are chosen."""
    rows_per_step: int = 1
    """Rows in one optimizer step, of all ranks; more than one on a rank accumulate their gradients."""
    held_out: int = 0
    """Documents of each source, or conversations, that are not trained but validated on."""
    seed: int = 0
    """Seed of the order of documents."""

    def __post_init__(self):
        if self.path and self.sources:
            raise UserError(f"data.path={self.path} and data.sources: give one of them")
        for i, source in enumerate(self.sources):
            if not 0 <= source.weight < math.inf:
                raise UserError(f"data.sources.{i}.weight={source.weight}: must be a number, at least 0")
        if self.sources and not any(source.weight for source in self.sources):
            raise UserError("data.sources: all weights are 0; nothing is left to train on")
        if self.tokens_per_row < 2:
            raise UserError(f"data.tokens_per_row={self.tokens_per_row}: must be at least 2")
        if not 2 <= self.max_seqlen <= self.tokens_per_row:
            raise UserError(f"data.max_seqlen={self.max_seqlen}: must be in 2 .. tokens_per_row={self.tokens_per_row}")
        _at_least(1, data__rows_per_step=self.rows_per_step, data__look_ahead=self.look_ahead)
        _at_least(0, data__held_out=self.held_out)

    @property
    def all_sources(self) -> list[SourceConfig]:
        """One path is one source."""
        return self.sources or [SourceConfig(self.path)]

    @property
    def tokenizer(self) -> str:
        """Folder of the tokenizer, which all sources share; empty: there are none."""
        return self.all_sources[0].path


@dataclass
class OptimConfig:
    lr: float = 3e-4
    """Highest learning rate."""
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """After the warm-up: falls along a cosine or a line, stays, or stays and then falls over decay_steps (wsd)."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises from 0 to lr."""
    decay_steps: int = 0
    """With schedule wsd: how many of the last steps fall."""
    min_lr_ratio: float = 0.1
    """Learning rate at the end, as a fraction of lr."""
    beta1: float = 0.9
    """AdamW: decay of the mean of gradients."""
    beta2: float = 0.95
    """AdamW: decay of the mean of squared gradients."""
    eps: float = 1e-8
    """AdamW: added to the root of the mean square."""
    moments: Literal["float32", "bfloat16"] = "float32"
    """AdamW: dtype of the two means; bfloat16 saves 4 bytes a parameter, rounds at random, and needs a GPU."""
    weight_decay: float = 0.1
    """AdamW: decoupled decay of matrices and embeddings; norms and biases have none."""
    max_norm: float = 1.0
    """Gradients are scaled down to this global norm; 0 turns clipping off."""

    def __post_init__(self):
        for name in ("lr", "warmup_steps", "decay_steps", "weight_decay", "max_norm"):
            _at_least(0, **{f"optim__{name}": getattr(self, name)})
        if not 0 <= self.min_lr_ratio <= 1:
            raise UserError(f"optim.min_lr_ratio={self.min_lr_ratio}: must be between 0 and 1")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"optim.{name}={getattr(self, name)}: must be at least 0 and less than 1")
        if not self.eps > 0:
            raise UserError(f"optim.eps={self.eps}: must be more than 0")
        if (self.schedule == "wsd") != (self.decay_steps > 0):
            raise UserError(f"optim.decay_steps={self.decay_steps}: needed with schedule wsd, and only there")


@dataclass
class TrainConfig:
    steps: int = 1000
    """Optimizer steps in all."""
    seed: int = 0
    """Seed of random weights."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto: the GPU if there is one."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Of weights and activations; auto: bfloat16 on the GPU, float32 on the CPU. Master weights are always float32."""
    attention: str = "auto"
    """Backend: auto, native (our kernels), sdpa, flash_attn, varlen, flex, xformers or reference; auto says which."""
    loss: str = "minitrain.loss:cross_entropy"
    """Loss as "module:function": (hidden, head, batch) -> (sum over trained tokens, {name: sum})."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile every block; auto: on the GPU."""
    recompute: Literal["none", "cheap", "block", "full"] = "none"
    """What backward computes again, to keep less: nothing, pointwise work and norms, all but attention, or all."""
    deterministic: bool = False
    """Only algorithms that give the same bits in every run on the same machine; slower."""
    log_every: int = 10
    """Steps between lines on the console."""
    validate_every: int = 0
    """Steps between validations, and one after the last step; 0: none. On data.held_out and sources of weight 0."""
    sample: str = ""
    """Text that the trained model goes on with when `python -m minitrain` ends; empty: none."""

    def __post_init__(self):
        _at_least(1, train__steps=self.steps, train__log_every=self.log_every)
        _at_least(0, train__validate_every=self.validate_every)
        if not -(1 << 63) <= self.seed < 1 << 63:
            raise UserError(f"train.seed={self.seed}: must be in -2**63 .. 2**63 - 1")


@dataclass
class ParallelConfig:
    zero: Literal[0, 1, 2, 3] = 0
    """What data-parallel ranks share out: 0 nothing, 1 the optimizer, 2 also gradients, 3 also weights."""
    shard_within: int = 0
    """Ranks that share one copy, such as those of a node; groups of them hold the same. 0: all ranks."""
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of sums of gradients over ranks, on their way and as ZeRO 2 and 3 keep them of one row; of more rows float32."""
    offload: Literal["", "optimizer"] = ""
    """optimizer: master weights and the optimizer's state stay in host memory and pass through the GPU in each step."""
    offload_share: float = 1.0
    """Of parameters, at most, whose masters and state are in host memory; those of the others stay on the GPU."""
    timeout_s: int = 600
    """Seconds that a rank waits for the others, at the start and in each step, before the run ends."""
    pp: int = 1
    """Stages among which the layers are dealt (pipeline parallel); rows of a step follow each other through them."""
    pp_schedule: Literal["1f1b", "gpipe", "zb-h1"] = "1f1b"
    """1f1b: a row's backward as soon as it can be, so that few rows are under way; gpipe: after all forwards; zb-h1: as
    1f1b, with the gradients of weights made later, where a stage would wait."""
    pp_parts: int = 1
    """Parts of a stage, from as many places (interleaved 1F1B): with more of them stages wait less, and send more."""
    tp: int = 1
    """Ranks that share each matrix (tensor parallel), and the tokens between them: neighbours, on one node."""
    cp: int = 1
    """Ranks that share the tokens of a row (context parallel)."""
    ep: int = 1
    """Ranks that share the experts of a layer (expert parallel), among those that have other tokens."""

    def __post_init__(self):
        _at_least(0, parallel__shard_within=self.shard_within)
        _at_least(1, parallel__timeout_s=self.timeout_s, parallel__pp=self.pp, parallel__tp=self.tp)
        _at_least(1, parallel__pp_parts=self.pp_parts, parallel__cp=self.cp, parallel__ep=self.ep)
        if self.shard_within and not self.zero:
            raise UserError(f"parallel.shard_within={self.shard_within}: with parallel.zero=0 nothing is shared out")
        if not 0 < self.offload_share <= 1:
            raise UserError(f"parallel.offload_share={self.offload_share}: must be more than 0 and at most 1")
        if self.offload_share < 1 and not self.offload:
            raise UserError(f'parallel.offload_share={self.offload_share}: only with parallel.offload="optimizer"')


@dataclass
class CheckpointConfig:
    every: int = 1000
    """Steps between checkpoints, and one after the last step; 0: none at all."""
    keep: int = 2
    """Newest checkpoints that are kept."""
    keep_every: int = 0
    """Those after a multiple of so many steps, which is one of every, are kept, too; 0: none of them."""
    keep_best: bool = False
    """The one of the lowest validation loss so far, over the tokens of all sources, is kept, too: the link best."""
    on_failure: Literal["stop", "go_on"] = "stop"
    """When a save fails, as on a full disk: end the run, or say so and go on; the last save has to succeed."""
    resume: bool = True
    """Go on from the newest checkpoint in run_dir; False: refuse a run_dir that has one."""
    fallback: bool = False
    """If the newest one is damaged, go on from the one before it; False: stop and say what is damaged."""
    export: bool = True
    """At the end, write run_dir/export: a Hugging Face folder that transformers and other tools load."""

    def __post_init__(self):
        _at_least(0, checkpoint__every=self.every, checkpoint__keep_every=self.keep_every)
        _at_least(1, checkpoint__keep=self.keep)
        if self.every and self.keep_every % self.every:
            raise UserError(
                f"checkpoint.keep_every={self.keep_every}: must be a multiple of checkpoint.every={self.every}"
            )


@dataclass
class Config:
    model: Any
    """The architecture's own config, for example minitrain.Qwen3Config(...)."""
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    run_dir: str = "runs/default"
    """Folder of this run: config.toml, metrics.jsonl, checkpoints, export."""

    def __post_init__(self):
        for name in ("optim", "train", "parallel", "checkpoint"):
            for key, value in vars(getattr(self, name)).items():
                if value == math.inf and key != "max_norm":  # of which inf is no clipping, as 0
                    raise UserError(f"{name}.{key}={value}: must be a finite number")
        if self.optim.warmup_steps + self.optim.decay_steps > self.train.steps and self.optim.decay_steps:
            raise UserError(
                f"optim.warmup_steps={self.optim.warmup_steps} and decay_steps={self.optim.decay_steps} "
                f"are together more than train.steps={self.train.steps}"
            )
        if self.data.tokens_per_row % self.parallel.cp:
            raise UserError(
                f"data.tokens_per_row={self.data.tokens_per_row} is not divisible by parallel.cp={self.parallel.cp}"
            )
        every, validate_every = self.checkpoint.every, self.train.validate_every
        if self.checkpoint.keep_best and not (every and validate_every and every % validate_every == 0):
            raise UserError(
                "checkpoint.keep_best: every checkpoint has to be validated, "
                f"and checkpoint.every={every} is no multiple of train.validate_every={validate_every}"
            )
        if self.data.max_seqlen > self.model.max_position_embeddings:
            raise UserError(
                f"data.max_seqlen={self.data.max_seqlen} is more than "
                f"model.max_position_embeddings={self.model.max_position_embeddings}"
            )


def _at_least(least, **settings):
    for name, value in settings.items():
        if not value >= least:
            raise UserError(f"{name.replace('__', '.')}={value}: must be at least {least}")


# ---- file and command line


def take_config(argv: list[str]) -> tuple[str | None, list[str]]:
    """-> the value of --config, and the other words, which begin with a flag."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config")
    try:
        known, others = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise UserError(f"--config: {error.message}") from None
    if others and not others[0].startswith("-"):
        raise UserError(f"{others[0]}: settings are given as --section.key value, a file as --config {others[0]}")
    return known.config, others


def load_config(path: str | Path | None, flags: list[str], model_config: Callable[[str, str], Any]) -> Config:
    """A TOML file (or none) and flags such as ["--train.steps", "100"] -> Config. UserError in one line.

    model_config(type, pretrained) -> the model's config with its defaults (minitrain.hf.default_config).
    """
    settings = _read_toml(path) if path else {}
    if (sources := settings.pop("data.sources", [])) != []:
        raise UserError(f"{path}: data.sources={sources!r}: must be tables [[data.sources]] with path and weight")
    given = {}
    for flag, after in zip(flags, [*flags[1:], ""], strict=False):
        if flag.startswith("--"):
            key, has_value, value = flag[2:].partition("=")
            given[key] = value if has_value else after
    early = {key: str(value) for key, value in (settings | given).items()}  # what decides which settings there are
    try:
        model = model_config(early.get("model.type", ""), early.get("model.pretrained", ""))
    except ValueError as error:
        raise UserError(str(error)) from None
    numbers = {match[1] for key in settings | given if (match := re.match(r"data\.sources\.(\d+)\.", key))}
    sources = [SourceConfig() for _ in numbers or given.keys() & {"help"}]  # --help shows one
    own = {"model": model, "data": DataConfig(sources=sources)}
    schema = dataclasses.make_dataclass(
        "Config", [(name, type(v), field(default_factory=lambda v=v: v)) for name, v in own.items()], bases=(Config,)
    )
    sections = {f.name: f.default_factory() if callable(f.default_factory) else "" for f in fields(schema)}
    known = [key for name, section in sections.items() for key in _keys(section, name)]
    for key in settings:
        _check_known(key, known, f"{path}: ")
    for key in given.keys() - {"help"}:
        _check_known(key, known, "--")
    merged = [word for key, value in settings.items() if key not in given for word in _as_flag(key, value)]
    return _run_tyro(schema, merged + [_TRUTH.sub(lambda m: m[0].capitalize(), flag) for flag in flags])


_TRUTH = re.compile(r"(?<==)(true|false)$|^(true|false)$")  # TOML's spelling; tyro knows Python's


def _read_toml(path) -> dict[str, Any]:
    """{"section.key": value}, of a list of tables {"section.key.0.key": value}; another table is one value."""
    try:
        with open(path, "rb") as file:
            table = tomllib.load(file)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path}: no TOML: {error}") from None
    flat = {}
    for section, value in table.items():
        flat |= {f"{section}.{key}": v for key, v in value.items()} if isinstance(value, dict) else {section: value}
    for name, value in list(flat.items()):
        if isinstance(value, list) and value and all(isinstance(inner, dict) for inner in value):
            del flat[name]
            flat |= {f"{name}.{i}.{key}": v for i, inner in enumerate(value) for key, v in inner.items()}
    return flat


def _keys(default, name: str) -> list[str]:
    """Of a setting, or of all that are in a section or in a list of sections."""
    if dataclasses.is_dataclass(default):
        inner = {f.name: getattr(default, f.name) for f in fields(default)}
    elif isinstance(default, list):
        inner = dict(enumerate(default))
    else:
        return [name]
    return [key for i, value in inner.items() for key in _keys(value, f"{name}.{i}")]


def _check_known(key, known, prefix):
    if key not in known:
        near = difflib.get_close_matches(key, known, 1) or [k for k in known if k.split(".")[-1] == key.split(".")[-1]]
        raise UserError(f"{prefix}{key}: no such setting" + (f"; did you mean {near[0]}?" if near else ""))


def _as_flag(key, value) -> list[str]:
    if isinstance(value, dict):
        return [f"--{key}", *(str(word) for pair in value.items() for word in pair)]
    return [f"--{key}={value}"]


def _run_tyro(schema, flags) -> Config:
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(
                schema,
                args=flags,
                prog="python -m minitrain [--config FILE.toml]",
                description="Train a model, or with --prove compare its layout on these ranks with one process. "
                "Settings of the file and of the command line are the same; the latter win. "
                "Other architectures have settings of their own: to see them, name one as model.type.",
                config=(tyro.conf.FlagConversionOff,),
                use_underscores=True,
            )
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
    # A title, rules of dashes, and between the first two of these what is wrong; in a box where the terminal has one.
    lines = [line.strip("│ ") for line in complaint.getvalue().splitlines()[1:]]
    start = itertools.dropwhile(_is_rule, lines)
    text = " ".join(itertools.takewhile(lambda line: not _is_rule(line), start))
    text = text or " ".join(complaint.getvalue().split())  # of a tyro that lays it out otherwise
    raise UserError(re.sub(r"^Error parsing ((?!--)[^:]*: )?", "", text))  # a section's own checks name the setting


def _is_rule(line) -> bool:
    return set(line) <= set("─-╰╯")


# ---- the way back


def to_toml(cfg: Config) -> str:
    """The whole config as TOML that load_config reads."""
    top, sections = [], []
    for f in fields(cfg):
        value = getattr(cfg, f.name)
        if dataclasses.is_dataclass(value):
            sections += _toml_tables(f.name, value)
        else:
            top.append(_toml_row(f.name, value))
    return "\n".join(top) + "\n\n" + "\n\n".join(sections) + "\n"


def _toml_tables(name, section, title="[{}]") -> list[str]:
    """The section, and behind it the lists of sections that are in it."""
    rows, tables = [], []
    for f in fields(section):
        value = getattr(section, f.name)
        if isinstance(value, list):
            tables += [table for inner in value for table in _toml_tables(f"{name}.{f.name}", inner, "[[{}]]")]
        else:
            rows.append(_toml_row(f.name, value))
    return ["\n".join([title.format(name), *filter(None, rows)]), *tables]


def _toml_row(key, value) -> str | None:
    if value is None:  # TOML has no null; None is a default everywhere
        return None
    if isinstance(value, dict):
        return f"{key} = {{ {', '.join(_toml_row(k, v) for k, v in value.items())} }}"
    if isinstance(value, float):
        return f"{key} = {value!r}"  # inf, which JSON spells otherwise
    return f"{key} = {json.dumps(value, ensure_ascii=False)}".replace("\x7f", "\\u007f")


def exit_with(error: Exception) -> None:
    """One line on stderr, exit code 2."""
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
