"""Hugging Face folders in and out: config.json, safetensors, tokenizer files. A tensor at a time, nothing unpickled.

hub_names() is the whole mapping: of a parameter, the names on the Hub that it stands for. Loading copies what is there
into the parts that a rank has, saving puts whole tensors together of them. Two dialects of config.json are read
(rope_theta and rope_scaling, or transformers 5's rope_parameters); the older one is written, which every tool knows.
"""

import difflib
import functools
import itertools
import re
import typing
from collections.abc import Callable, Collection, Sequence
from dataclasses import fields
from pathlib import Path

import huggingface_hub
import torch
from safetensors import safe_open
from torch import Tensor, nn

from minitrain.boxes import Box, Part, part_of, take
from minitrain.chat import find_template
from minitrain.config import SourceConfig, UserError
from minitrain.models import MODELS, build_model, materialize, model_class
from minitrain.models.layers import DecoderConfig
from minitrain.parallel.comm import Group, everyone, gather_objects, receive, send
from minitrain.parallel.gather import read_whole
from minitrain.parallel.mesh import is_first
from minitrain.storage import (
    Later,
    NewFolder,
    copy_file,
    load_tokenizer,
    open_safetensors,
    read_json,
    send_pieces,
    write_json,
    write_safetensors,
    write_text,
)

CARRIED = (  # files of a model's folder that go along with its weights, where they exist
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "generation_config.json",
)
_MODEL_FILES = ("config.json", "*.safetensors", "*.safetensors.index.json", *CARRIED)
_RENAMED = {"num_local_experts": "num_experts"}  # keys of transformers 5's config.json
_SHARD_BYTES = 5 << 30


def from_pretrained(
    path_or_hub_id: str | Path,
    model_class: type[nn.Module] | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str | None = None,
) -> nn.Module:
    """The model of a Hugging Face folder or hub id, weights loaded.

    dtype, also by name; None: as config.json says. Host memory: the model plus one tensor.
    UserError names what is missing, extra, of a wrong shape or damaged, and refuses pickle files and an architecture
    other than model_class.
    """
    folder = find_folder(path_or_hub_id)
    cfg = read_config(folder, model_class and f"{model_class.__module__}:{model_class.__qualname__}")
    model = build_model(cfg)
    if model_class is not None and not isinstance(model, model_class):
        raise UserError(f"{folder}: holds a {type(model).__name__}, not a {model_class.__name__}")
    if not isinstance(dtype, torch.dtype):
        raw = read_json(folder / "config.json")
        name = dtype or raw.get("dtype") or raw.get("torch_dtype") or "float32"
        dtype = getattr(torch, str(name), None)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise UserError(f"{folder / 'config.json'}: dtype={name!r} is no floating-point dtype of torch")
    materialize(model, device, dtype)
    load_weights(model, folder)
    return model


def find_folder(path_or_hub_id: str | Path, files: Sequence[str] = _MODEL_FILES) -> Path:
    """The folder itself, or where huggingface_hub put (or had) these files of that repository."""
    folder = Path(path_or_hub_id)
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path_or_hub_id)):
        raise UserError(f"{path_or_hub_id}: no such folder")
    try:
        return Path(huggingface_hub.snapshot_download(str(path_or_hub_id), allow_patterns=list(files)))
    except Exception as error:  # the library raises its own, httpx's and OSError
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{path_or_hub_id}: no such folder, and the hub could not be read ({reason}); "
            "put config.json, the *.safetensors files and tokenizer.json in a folder and give its path"
        ) from None


# ---- config.json


def default_config(type: str, pretrained: str) -> DecoderConfig:
    """The config that a run starts from: of the pretrained folder, or the defaults of an architecture."""
    if not pretrained:
        return model_class(type or "qwen3").config_class()
    cfg = read_config(find_folder(pretrained, ["config.json"]), type)
    if type and type != cfg.type:
        raise UserError(f"model.type={type!r}, but {pretrained} holds a {cfg.type!r}")
    cfg.pretrained = pretrained
    return cfg


def read_config(folder: Path, own_type: str | None = None) -> DecoderConfig:
    """config.json -> the architecture's config. UserError for what this trainer does not have.

    own_type: a "module:Class" that the file may name; a downloaded file has no other module imported.
    """
    raw = read_json(folder / "config.json")
    where = folder / "config.json"
    kind = raw.get("model_type")
    if kind not in [*MODELS, own_type] or not kind:
        own = "; a class of your own loads by its from_pretrained" if ":" in str(kind) else ""
        raise UserError(f"{where}: model_type={kind!r} is unknown; there are {', '.join(MODELS)}{own}")
    config_class = model_class(kind).config_class
    unsupported = {
        "hidden_act": raw.get("hidden_act", "silu") != "silu",
        "attention_dropout": bool(raw.get("attention_dropout")),
        "mlp_bias": bool(raw.get("mlp_bias")),
        "use_sliding_window": bool(raw.get("use_sliding_window")),
        "is_causal": raw.get("is_causal") is False,
        "decoder_sparse_step": raw.get("decoder_sparse_step", 1) != 1,
        "mlp_only_layers": bool(raw.get("mlp_only_layers")),
    }
    if bad := [f"{key}={raw[key]}" for key, is_bad in unsupported.items() if is_bad]:
        raise UserError(f"{where}: not supported: {', '.join(bad)}")
    for key in ("rope_parameters", "rope_scaling"):
        if not isinstance(raw.get(key), dict | None):
            raise UserError(f"{where}: {key}={raw[key]!r} is no JSON object")
    rope = {"rope_theta": raw.get("rope_theta")} | (raw.get("rope_scaling") or raw.get("rope_parameters") or {})
    stretched = rope.get("rope_type", rope.get("type", "default")) != "default"
    raw = {_RENAMED.get(key, key): value for key, value in raw.items()}
    known = {
        "num_key_value_heads": raw.get("num_attention_heads"),  # what transformers takes where they are absent
        "tie_word_embeddings": False,
        "head_dim": None,
        "initializer_range": 0.02,
        **{key: value for key, value in raw.items() if value is not None},
        "type": kind,
        "rope_theta": rope.get("rope_theta") or 10_000.0,
        "rope_scaling": {k: v for k, v in rope.items() if k != "rope_theta"} if stretched else None,
    }
    optional = {"pretrained", "attention_bias", "router_aux_loss_coef", "router_z_loss_coef"}
    names = [f.name for f in fields(config_class)]
    if missing := [n for n in names if n not in known and n not in optional]:
        raise UserError(f"{where}: lacks {', '.join(missing)}")
    for f in fields(config_class):
        kind, value = (typing.get_args(f.type) or [f.type])[0], known.get(f.name)
        if value is None or kind not in (int, float, bool):
            continue
        if type(value) is not kind and (type(value), kind) != (int, float):
            raise UserError(f"{where}: {f.name}={value!r} is no {kind.__name__}")
    try:
        return config_class(**{n: known[n] for n in names if n in known})
    except (ValueError, TypeError) as error:
        raise UserError(f"{where}: {error}") from None


def hub_config(model: nn.Module) -> dict:
    """config.json of a model, in the dialect that all versions of transformers read."""
    cfg = {f.name: getattr(model.config, f.name) for f in fields(model.config)}
    kind = cfg.pop("type")
    del cfg["pretrained"]
    if cfg["rope_scaling"]:  # TOML and flags make all its numbers floats; this one counts tokens
        whole = "original_max_position_embeddings"
        cfg["rope_scaling"] = {k: int(v) if k == whole else v for k, v in cfg["rope_scaling"].items()}
    return {
        "architectures": [type(model).__name__],
        "model_type": kind,
        "hidden_act": "silu",
        "torch_dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        **cfg,
    }


# ---- weights


def hub_names(name: str, shape: Sequence[int]) -> dict[str, int | None]:
    """{name on the Hub: number of the expert if our parameter is a stack of them, else None}.

    layers.0.mlp.experts.up_proj (E, F, D) -> model.layers.0.mlp.experts.7.up_proj.weight (F, D), and the others.
    """
    hub = name if name.startswith("lm_head.") else f"model.{name}"
    if len(shape) != 3:
        return {hub: None}
    prefix, _, matrix = hub.rpartition(".")
    return {f"{prefix}.{e}.{matrix}.weight": e for e in range(shape[0])}


def hub_parts(model) -> dict[str, tuple[str, nn.Parameter, int | None]]:
    """{name on the Hub: (name here, parameter, number of the expert if it is a stack)}. Tied heads appear once."""
    parts = {}
    for name, p in model.named_parameters():
        parts |= {hub: (name, p, expert) for hub, expert in hub_names(name, part_of(p).shape).items()}
    return parts


def _hub_part(part: Part, expert: int | None) -> Part | None:
    """What a part of a stack has of one expert, None if nothing; of other parameters it is the same."""
    if expert is None:
        return part
    return Part(part.shape[1:], part.box[1:]) if expert in part.box[0] else None


def _values(p: nn.Parameter, expert: int | None) -> Tensor:
    return p.detach() if expert is None else p.detach()[part_of(p).box[0].index(expert)]


def load_weights(model: nn.Module, folder: Path, names: Collection[str] | None = None) -> None:
    """Copy a folder's safetensors into the model's parameters; an error names what does not fit.

    names: into these parameters only. model.source remembers the folder, so that its tokenizer can go with the model.
    """
    parts = hub_parts(model)
    held = _open_weights(folder)
    ignored = {name for name in held if name.endswith("rotary_emb.inv_freq")}  # old Llama files store this buffer
    if model.config.tie_word_embeddings:
        ignored.add("lm_head.weight")  # some tied models on the Hub store it twice
    ignored |= {name for name in held if _is_of_another_stage(name, model)}
    if missing := sorted(parts.keys() - held.keys()):
        raise UserError(f"{folder}: lacks {_listed(missing, sorted(held.keys() - parts.keys()))}")
    if extra := sorted(held.keys() - parts.keys() - ignored):
        raise UserError(f"{folder}: holds tensors that the model has not: {_listed(extra, sorted(parts))}")
    wanted = {hub: (p, e) for hub, (name, p, e) in parts.items() if names is None or name in names}
    for name, (p, expert) in wanted.items():
        file, reader = held[name]
        shape = tuple(reader.get_slice(name).get_shape())
        whole = tuple(part_of(p).shape)[0 if expert is None else 1 :]
        if shape != whole:
            raise UserError(f"{folder / file}: {name} has shape {shape}, the model's is {whole}")
        tensor = reader.get_tensor(name)
        if not tensor.is_floating_point():
            raise UserError(f"{folder / file}: {name} is {tensor.dtype}, not a floating-point tensor")
        if (part := _hub_part(part_of(p), expert)) is not None:
            _values(p, expert).copy_(take(tensor, part.box))
    model.source = folder


def _is_of_another_stage(hub: str, model: nn.Module) -> bool:
    """Of a pipeline: of a block, or of an end, that this part of the model has not."""
    child, _, rest = hub.removeprefix("model.").partition(".")
    i = rest.partition(".")[0]
    if child == "layers":
        return i not in model.layers and i in map(str, range(model.config.num_hidden_layers))
    return child in ("embed_tokens", "norm", "lm_head") and getattr(model, child) is None


def _open_weights(folder: Path) -> dict[str, tuple[str, safe_open]]:
    """{tensor: (file, its reader)}, as the files' own headers say, checked against the index where there is one."""
    index, weight_map, files = folder / "model.safetensors.index.json", {}, ["model.safetensors"]
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise UserError(f"{index}: has no weight_map")
        for name, file in weight_map.items():
            if not isinstance(file, str) or not re.fullmatch(r"[\w.-]+\.safetensors", file):
                raise UserError(f"{index}: {name} points to {file!r}, which is no safetensors file in this folder")
        files = sorted(set(weight_map.values()))
    elif not (folder / "model.safetensors").exists():
        if pickles := sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth")):
            raise UserError(
                f"{folder}: {pickles[0]} is a pickle file, which can run code when read; convert it, for example with "
                "transformers' save_pretrained, to model.safetensors"
            )
        raise UserError(f"{folder}: has neither model.safetensors nor model.safetensors.index.json")
    held = {}
    for file in files:
        reader = open_safetensors(folder / file)
        held |= dict.fromkeys(reader.keys(), (file, reader))
    if wrong := [name for name, file in weight_map.items() if name not in held or held[name][0] != file]:
        raise UserError(f"{index}: {wrong[0]} is not in {weight_map[wrong[0]]}")
    return held


def _listed(names: list[str], others: list[str]) -> str:
    """The first ten names, each with the nearest of the others."""
    shown = []
    for name in names[:10]:
        near = difflib.get_close_matches(name, others, 1, 0.8)
        shown.append(f"{name} (there is {near[0]})" if near else name)
    return ", ".join(shown) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def save_pretrained(
    model: nn.Module,
    folder: str | Path,
    tokenizer: str | Path | None = None,
    overwrite: bool = False,
    read: Callable[[str, int | None], Tensor] | None = None,
    chat_template: str | None = None,
) -> None:
    """Write a folder that transformers' AutoModelForCausalLM loads, weights bit for bit; host memory: one tensor, and
    what comes of it from another rank.

    tokenizer: a folder whose tokenizer files, generation_config.json and token ids in config.json come along; None:
    the folder that the weights were loaded from, if they were.
    The folder appears whole or not at all. UserError if it exists; overwrite replaces it if it holds a model.
    read: (parameter's name, number of an expert if it is a stack) -> values, of a model on meta whose values are
    elsewhere. After training on several ranks all of them call this, and rank 0 writes.
    chat_template: jinja2, in the place of the tokenizer's.
    """
    params = dict(model.named_parameters())
    tensors = _whole_tensors(model, read or (lambda name, e: _values(read_whole(params[name]), e)))
    if not is_first():
        return send_pieces(tensors)
    config, folder = hub_config(model), Path(folder)
    source = find_folder(tokenizer) if tokenizer is not None else getattr(model, "source", None)
    if tokenizer is not None and not (source / "tokenizer.json").exists():
        raise UserError(f"{source}: holds no tokenizer.json")
    if overwrite and folder.is_dir() and any(folder.iterdir()) and not (folder / "config.json").exists():
        raise UserError(f"{folder}: is not overwritten, since it holds no config.json and so no model")
    if source is not None:
        older = read_json(source / "config.json") if (source / "config.json").exists() else end_of_text(source)
        config = {**{k: v for k, v in older.items() if k.endswith("_token_id")}, **config}
    with NewFolder(folder, replace=overwrite) as tmp:
        write_json(tmp / "config.json", config)
        shards = _shards(tensors)
        for i, shard in enumerate(shards, 1):
            write_safetensors(tmp / _shard_name(i, len(shards)), shard)
        if len(shards) > 1:
            weight_map = {name: _shard_name(i, len(shards)) for i, shard in enumerate(shards, 1) for name in shard}
            total = sum(_bytes(t) for shard in shards for t in shard.values())
            write_json(
                tmp / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
            )
        if source is not None:
            for name in CARRIED:
                if (source / name).exists():
                    copy_file(source / name, tmp / name)
        if chat_template is not None:
            write_text(tmp / "chat_template.jinja", chat_template)  # comes before one in tokenizer_config.json
        if not (tmp / "generation_config.json").exists():
            ids = {key: config[key] for key in ("bos_token_id", "eos_token_id") if config.get(key) is not None}
            write_json(tmp / "generation_config.json", ids)


def _whole_tensors(model: nn.Module, read: Callable[[str, int | None], Tensor]) -> dict[str, Later]:
    """On the first rank whole tensors, put together as they are read; other ranks read theirs and send them there.

    Where several ranks have the same part it is taken from the first of them.
    """
    params = dict(model.named_parameters())
    is_split = hasattr(model, "link") or any(hasattr(p, "part") for p in params.values())
    ranks = everyone() if is_split else Group()
    of_ranks = gather_objects({name: (p.dtype, part_of(p)) for name, p in params.items()}, ranks)
    tensors = {}
    for name in dict.fromkeys(itertools.chain(*of_ranks)):  # in the same order on all ranks
        holders = {}
        for i, of_rank in enumerate(of_ranks):
            if name in of_rank:
                holders.setdefault(of_rank[name], i)
        dtype, (shape, _) = next(iter(holders))
        for hub, expert in hub_names(name, shape).items():
            hub_shape = shape if expert is None else shape[1:]
            boxes = {part.box: i for (_, of_p), i in holders.items() if (part := _hub_part(of_p, expert))}
            has_part = name in params and _hub_part(part_of(params[name]), expert)
            own = functools.partial(read, name, expert) if has_part else None
            tensors[hub] = Later(dtype, hub_shape, functools.partial(_gather, own, boxes, hub_shape, dtype, ranks))
    return tensors


def _gather(
    read: Callable[[], Tensor] | None, boxes: dict[Box, int], shape: torch.Size, dtype: torch.dtype, ranks: Group
) -> Tensor | None:
    """read: this rank's part, if it has one; boxes: of all parts, from which rank. -> on the first the whole tensor.

    By way of the hosts, where rank 0 needs it.
    """
    own = read() if read else None  # also where it is not sent: under ZeRO 3 several ranks read together
    if ranks.rank > 0:
        if ranks.rank in boxes.values():
            send(own.cpu().contiguous(), 0, ranks).wait()
        return own
    if list(boxes.values()) == [0]:
        return own
    whole = torch.empty(shape, dtype=dtype)
    for box, i in boxes.items():
        part = torch.empty(list(map(len, box)), dtype=dtype) if i else own
        if i:
            receive(part, i, ranks)
        take(whole, box).copy_(part)
    return whole


def _shards(tensors: dict[str, Later]) -> list[dict[str, Later]]:
    shards, size = [{}], 0
    for name, t in tensors.items():
        if shards[-1] and size + _bytes(t) > _SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = t
        size += _bytes(t)
    return shards


def _bytes(t: Later) -> int:
    return t.shape.numel() * t.dtype.itemsize


def _shard_name(i: int, n: int) -> str:
    return "model.safetensors" if n == 1 else f"model-{i:05}-of-{n:05}.safetensors"


# ---- tokenizers


def read_chat_template(folder: str | Path) -> str | None:
    """Of a tokenizer's folder: chat_template.jinja, or what is in tokenizer_config.json."""
    config, jinja = Path(folder) / "tokenizer_config.json", Path(folder) / "chat_template.jinja"
    return find_template(read_json(config) if config.exists() else {}, jinja.read_text() if jinja.exists() else None)


def chat_template(sources: list[SourceConfig]) -> str | None:
    """Of the first source of conversations that has one: what a model that is trained on them has to be asked by."""
    for folder in (Path(source.path) for source in sources if source.path):
        report = folder / "report.json"
        if report.exists() and read_json(report).get("chat") and (template := read_chat_template(folder)) is not None:
            return template
    return None


def end_of_text(folder: Path) -> dict[str, int]:
    """{"eos_token_id": id} as tokenizer_config.json names it, or {} where there is none."""
    path = Path(folder) / "tokenizer_config.json"
    token = read_json(path).get("eos_token") if path.exists() else None
    token = token["content"] if isinstance(token, dict) else token
    id = load_tokenizer(folder).token_to_id(token) if token else None
    return {} if id is None else {"eos_token_id": id}
