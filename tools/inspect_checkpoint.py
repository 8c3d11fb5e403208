"""What is in a checkpoint, and whether every byte of it is what was written.

    python tools/inspect_checkpoint.py runs/mine/checkpoints/latest [--tensors]

Prints the run's place, the files and, with --tensors, each tensor with its pieces. Exit code 2 if it is damaged, with
the name of each file that is. minitrain/pieces.py has the format.
"""

import argparse
from pathlib import Path

from minitrain.config import UserError, exit_with
from minitrain.pieces import Saved


def describe(saved: Saved, tensors: bool = False) -> str:
    """The text that is printed."""
    about, elements = saved.manifest, {"model": 0, "optimizer": 0, "rng": 0}
    for name, (_, shape) in saved.tensors.items():
        elements[name.split(".")[0]] += shape.numel()
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    lines = [
        f"{saved.folder}: after step {about['step']}, format {about['format']}, written with {versions}",
        f"{about['config']['model']['type']} in {about['dtype']}: {elements['model']:,} weights, "
        f"{elements['optimizer']:,} elements of {about['optimizer']}'s state",
    ]
    lines += [f"{file}: {saved.manifest['files'][file]['bytes']:,} bytes" for file in saved.files]
    for name, (dtype, shape) in saved.tensors.items() if tensors else ():
        pieces = saved.manifest["tensors"][name]["pieces"]
        places = ", ".join(map(_place, pieces))
        lines.append(f"{name}: {str(dtype).removeprefix('torch.')} {tuple(shape)} = {places}")
    return "\n".join(lines)


def _place(piece: dict) -> str:
    """[rows, columns] first:end file; of a whole tensor without the first."""
    sides = ", ".join(f"{start}:{stop}" for start, stop in piece.get("box", ()))
    return f"{f'[{sides}] ' * bool(sides)}{piece['first']}:{piece['end']} {piece['file'].removesuffix('.safetensors')}"


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Print a checkpoint and verify it.")
    parser.add_argument("checkpoint", type=Path, help="a folder step-N, or the link latest")
    parser.add_argument("--tensors", action="store_true", help="each tensor, too")
    flags = parser.parse_args(args)
    try:
        saved = Saved(flags.checkpoint.resolve())
        print(describe(saved, flags.tensors))
        saved.verify()
    except (UserError, OSError) as error:
        exit_with(error)
    print("whole: every byte is what was written")


if __name__ == "__main__":
    main()
