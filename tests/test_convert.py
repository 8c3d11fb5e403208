"""tools/convert.py and tools/inspect_checkpoint.py, on checkpoints of one process and of several."""

import json
import sys
from pathlib import Path

import pytest
from conftest import TINY, spawn, tiny_run, write_corpus
from test_storage import LiveBytes

from minitrain import Qwen3Config, Qwen3MoeConfig, build_model, save_pretrained, train
from minitrain.config import SourceConfig

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import convert  # noqa: E402
import inspect_checkpoint  # noqa: E402

MOE = Qwen3MoeConfig(**TINY, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2)
TIED = Qwen3Config(**TINY, tie_word_embeddings=True)


def run(corpus, run_dir, model=TIED, **sections):
    return tiny_run(corpus, run_dir, model, **{"train": {"steps": 2, "dtype": "bfloat16"}, **sections})


def newest(cfg):
    return Path(cfg.run_dir) / "checkpoints" / "latest"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("model, ranks", [(TIED, 1), (MOE, 2)], ids=["tied", "moe, two ranks"])
def test_a_checkpoint_becomes_the_folder_that_its_run_exports(corpus, tmp_path, model, ranks):
    cfg = run(corpus, tmp_path / "run", model, data={"rows_per_step": 2}, parallel={"zero": 3 if ranks > 1 else 0})
    spawn(ranks, train, cfg) if ranks > 1 else train(cfg)
    with LiveBytes() as memory:
        convert.main([str(newest(cfg)), "--out", str(tmp_path / "out")])
    assert contents(tmp_path / "out") == contents(tmp_path / "run" / "export")
    assert memory.peak <= 2 * 101 * 32 * 4  # the embedding in fp32, and rounded


@pytest.mark.parametrize("pretrained", [True, False])
def test_the_template_of_the_conversations_goes_with_the_model(corpus, tmp_path, pretrained):
    (corpus / "chat_template.jinja").write_text("of the first source, which is text")
    save_pretrained(build_model(TIED, "cpu"), tmp_path / "base", tokenizer=corpus)
    chats = write_corpus(tmp_path / "chats", [[1, 2, 3]] * 9)
    (chats / "report.json").write_text('{"chat": true}')
    (chats / "tokenizer_config.json").write_text('{"chat_template": "of the conversations"}')
    model = Qwen3Config(**TINY, tie_word_embeddings=True, pretrained=str(tmp_path / "base") if pretrained else "")
    sources = [SourceConfig(str(corpus)), SourceConfig(str(chats))]
    cfg = run("", tmp_path / "run", model, data={"sources": sources})
    train(cfg)
    assert (tmp_path / "run" / "export" / "chat_template.jinja").read_text() == "of the conversations"
    convert.main([str(newest(cfg)), "--out", str(tmp_path / "out")])
    assert contents(tmp_path / "out") == contents(tmp_path / "run" / "export")


def test_convert_takes_another_dtype_and_names_what_is_wrong(corpus, tmp_path, capsys):
    cfg = run(corpus, tmp_path / "run")
    train(cfg)
    arguments = [str(newest(cfg)), "--out", str(tmp_path / "out"), "--dtype", "float32"]
    convert.main(arguments)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "float32"
    refused(convert, arguments, capsys, "out exists already")
    file = newest(cfg) / "rank-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    refused(convert, [*arguments, "--overwrite"], capsys, "rank-00000.safetensors: damaged: rng.0.cpu")
    refused(convert, [str(tmp_path), "--out", "out"], capsys, "manifest.json: no such file")


def refused(tool, arguments, capsys, complaint):
    with pytest.raises(SystemExit) as stop:
        tool.main(arguments)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("error: ") and complaint in err


def test_inspect_prints_and_verifies(corpus, tmp_path, capsys):
    cfg = run(corpus, tmp_path / "run", parallel={"tp": 2})
    spawn(2, train, cfg)
    inspect_checkpoint.main([str(newest(cfg)), "--tensors"])
    out = capsys.readouterr().out
    for text in ("after step 2, format 2", "qwen3 in bfloat16", "AdamW's state", "rank-00001.safetensors: ",
                 "model.norm.weight: float32 (32,) = 0:32 rank-0000",
                 "0.mlp.down_proj.weight: float32 (32, 48) = [0:32, 0:24] 0:768 rank-00000, [0:32, 24:48] 0:768 rank-",
                 "whole: every byte"):  # fmt: skip
        assert text in out
    for file in sorted(newest(cfg).resolve().glob("rank-*")):
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    files = [newest(cfg).resolve() / f"rank-0000{i}.safetensors" for i in (0, 1)]
    damages = "; ".join(f"{file}: damaged: rng.{i}.cpu is not what was written" for i, file in enumerate(files))
    refused(inspect_checkpoint, [str(newest(cfg))], capsys, damages)
