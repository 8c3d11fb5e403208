"""python -m minitrain --config FILE.toml [--section.key value ...] [--prove] [--help]

torchrun --nproc-per-node 8 -m minitrain --config FILE.toml ...

Trains, and prints the sample that the config asks for. With --prove it trains a small twin of the model instead, on
these ranks and in one process, and compares them (prove.py): exit code 0 if they are the same, 1 if not. What a person
got wrong is one line and exit code 2; a traceback is a bug of ours.
"""

import json
import logging
import sys
import traceback
from pathlib import Path

import torch

from minitrain.config import Config, UserError, load_config, take_config
from minitrain.generate import generate
from minitrain.hf import default_config, end_of_text
from minitrain.parallel import mesh
from minitrain.prove import prove
from minitrain.signals import EXIT_CODE
from minitrain.storage import load_tokenizer
from minitrain.train import train


def main() -> None:
    """On several ranks the first that fails says why, and all end."""
    level = logging.INFO if mesh.is_first() else logging.ERROR
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stdout)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        run(sys.argv[1:])
    except (UserError, FloatingPointError, OSError) as error:  # settings and files, a loss that is no number, the disk
        fail(f"error: {error}", 2)
    except torch.OutOfMemoryError as error:
        fail(f"error: {str(error).splitlines()[0]} Lower data.tokens_per_row, or set train.recompute to full.", 2)
    except SystemExit as stop:  # --help, and being asked to stop
        if stop.code == EXIT_CODE and mesh.is_first():
            print("stopped by a signal; the same command goes on from the newest checkpoint, if there is one")
        mesh.leave()
        raise
    except KeyboardInterrupt:
        fail("\nstopped; the same command goes on from the newest checkpoint, if there is one", 130)
    except Exception as error:
        fail(f"error: {text}" if (text := mesh.lost(error)) else traceback.format_exc(), 1)
    mesh.leave()


def fail(text: str, code: int) -> None:
    if mesh.is_first_to_fail():
        print(text, file=sys.stderr)
    mesh.abandon(code)


def run(argv: list[str]) -> None:
    cfg = load_config(*take_config([word for word in argv if word != "--prove"]), default_config)
    if "--prove" not in argv:
        finish(cfg, train(cfg))
    elif not prove(cfg):
        raise SystemExit(1)


def finish(cfg: Config, model) -> None:
    """The sample, and the line that sums the run up."""
    prompt = cfg.train.sample
    text = sample(prompt, model, Path(cfg.data.tokenizer)) if prompt else ""  # by all ranks together
    if not mesh.is_first():
        return
    if text:
        print(text)
    run_dir = Path(cfg.run_dir)
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    summary = "no step was left"
    if rows:  # the first is not of step 1 where checkpoints were moved to another folder
        last = [row["loss"] for row in rows[-cfg.train.log_every :]]
        begin = f"loss {rows[0]['loss']:.3f} at step {rows[0]['step']}"
        summary = f"{begin} -> {sum(last) / len(last):.3f}, mean of the last {len(last)} steps"
    written = f"; Hugging Face folder: {run_dir / 'export'}" if cfg.checkpoint.export else ""
    print(f"{summary}{written}")


def sample(prompt: str, model, tokenizer_folder: Path, max_new_tokens: int = 120) -> str:
    """What the model makes of a prompt, with the prompt."""
    tokenizer = load_tokenizer(tokenizer_folder)
    device = next(model.parameters()).device
    ids = torch.tensor(tokenizer.encode(prompt).ids, device=device)
    out = generate(model, ids, max_new_tokens, temperature=0.7, top_p=0.95, **end_of_text(tokenizer_folder))
    return tokenizer.decode(out.tolist())


if __name__ == "__main__":
    main()
