"""A checkpoint -> a Hugging Face folder, which transformers and other tools load. Needs no GPU, and memory of a tensor.

    python tools/convert.py runs/mine/checkpoints/latest --out mine [--tokenizer FOLDER] [--dtype float32] [--overwrite]

The weights are those that the optimizer steps, rounded to the dtype: by default the one that the run computes in, so
that the folder is what the run itself would export. --tokenizer: a folder with tokenizer.json; by default what the run
began from, or its data. Every byte is verified before anything is written.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from minitrain.boxes import whole_box
from minitrain.config import DataConfig, SourceConfig, UserError, exit_with
from minitrain.hf import chat_template, save_pretrained
from minitrain.models import build_model, model_class
from minitrain.pieces import Saved


def convert(
    checkpoint: Path, out: Path, tokenizer: str | None = None, dtype: str | None = None, overwrite: bool = False
) -> None:
    """UserError for a damaged checkpoint, and as save_pretrained."""
    saved = Saved(checkpoint.resolve())
    saved.verify()
    config = saved.manifest["config"]
    model = build_model(model_class(config["model"]["type"]).config_class(**config["model"]))
    model.to(getattr(torch, dtype or saved.manifest["dtype"]))
    data = DataConfig(**config["data"] | {"sources": [SourceConfig(**source) for source in config["data"]["sources"]]})
    own = config["model"]["pretrained"] or data.tokenizer
    here = {f"model.{name}": p.shape for name, p in model.named_parameters()}
    there = {name: shape for name, (_, shape) in saved.tensors.items() if name.startswith("model.")}
    if wrong := [name for name in sorted(here | there) if here.get(name) != there.get(name)]:
        raise UserError(f"{checkpoint}: {wrong[0].removeprefix('model.')} is not in the model of its own config")

    def read(name: str, expert: int | None) -> Tensor:
        shape = here[f"model.{name}"]
        box = whole_box(shape)
        if expert is not None:
            shape, box = shape[1:], (range(expert, expert + 1), *box[1:])
        return saved.read(f"model.{name}", box).view(shape).to(next(model.parameters()).dtype)

    template = None if tokenizer else chat_template(data.all_sources)
    save_pretrained(model, out, tokenizer or own or None, overwrite, read, template)


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Make a Hugging Face folder of a checkpoint.")
    parser.add_argument("checkpoint", type=Path, help="a folder step-N, or the link latest")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--tokenizer", metavar="FOLDER", help="default: what the run began from, or its data")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: the run's")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder, if it holds a model")
    try:
        convert(**vars(parser.parse_args(args)))
    except (UserError, OSError) as error:
        exit_with(error)


if __name__ == "__main__":
    main()
