"""Stopping and going on. The claim is exact: an interrupted run ends with the bits of one that never stopped."""

import ast
import dataclasses
import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from random import Random

import pytest
import torch
from conftest import TINY, read_metrics, tiny_run, write_corpus

from minitrain import PackedData, Qwen3Config, Qwen3MoeConfig, UserError, build_model, train
from minitrain.boxes import whole_box
from minitrain.checkpoint import Checkpointer
from minitrain.config import to_toml
from minitrain.models import init_weights
from minitrain.parallel.mesh import Mesh
from minitrain.parallel.zero import ShardedOptimizer
from minitrain.pieces import Piece, Saved, write_manifest, write_pieces

ROOT = Path(__file__).parents[1]
TIED = Qwen3Config(**TINY)
MOE = Qwen3MoeConfig(**TINY, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2)
LARGER = Qwen3Config(**{**TINY, "num_hidden_layers": 3})
WIDER = Qwen3Config(**{**TINY, "intermediate_size": 64})


class Interrupted(Exception):
    """Stands for whatever ends a process."""


def stop_after(step):
    def on_step(done, model, extras):
        if done == step:
            raise Interrupted

    return on_step


def run_until(step, cfg, **parts):
    with pytest.raises(Interrupted):
        train(cfg, on_step=stop_after(step), **parts)


def results(cfg):
    """What has to be equal: every step's loss and gradient norm, and the bytes of weights and moments."""
    rows = [(row["step"], row["loss"], row["grad_norm"], row["lr"]) for row in read_metrics(cfg.run_dir)]
    assert [step for step, *_ in rows] == list(range(1, cfg.train.steps + 1))  # each step exactly once
    tensors = {name: t for name, t in manifest(cfg)["tensors"].items() if not name.startswith("rng.")}
    return rows, tensors


def manifest(cfg):
    return json.loads((newest(cfg) / "manifest.json").read_text())


def newest(cfg):
    return max(checkpoints(cfg))


def checkpoints(cfg):
    return sorted(path for path in (Path(cfg.run_dir) / "checkpoints").glob("step-*") if not path.suffix)


def pair(corpus, tmp_path, **options):
    """The same run twice: one to be left alone, one to be disturbed."""
    return (tiny_run(corpus, tmp_path / name, checkpoint={"every": 10}, **options) for name in ("calm", "disturbed"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", [TIED, MOE], ids=["tied", "moe"])
def test_resume_is_bitwise(corpus, tmp_path, model, dtype):
    options = {"model": model, "data": {"rows_per_step": 2}, "train": {"dtype": dtype}}
    calm, disturbed = pair(corpus, tmp_path, **options)
    expected = dict(train(calm).named_parameters())
    run_until(13, disturbed)
    assert manifest(disturbed)["step"] == 10
    for name, p in train(disturbed).named_parameters():
        assert p.dtype == getattr(torch, dtype) and torch.equal(p, expected[name]), name
    assert results(disturbed) == results(calm)


@pytest.mark.gpu
def test_resume_is_bitwise_on_the_gpu_where_masters_are_split(corpus, tmp_path):
    calm, disturbed = pair(corpus, tmp_path, train={"device": "cuda", "deterministic": True, "compile": "off"})
    expected = dict(train(calm).named_parameters())
    run_until(13, disturbed)
    for name, p in train(disturbed).named_parameters():
        assert p.dtype == torch.bfloat16 and torch.equal(p, expected[name]), name
    assert results(disturbed) == results(calm)
    for name, p in expected.items():
        saved = Saved(newest(calm)).read(f"model.{name}")
        assert saved.dtype == torch.float32 and not saved.bfloat16().float().equal(saved), name
        torch.testing.assert_close(saved, p.detach().cpu().float().flatten(), rtol=2**-8, atol=0)


@pytest.mark.slow
def test_a_killed_process_goes_on_bitwise(corpus, tmp_path):
    calm, killed = pair(corpus, tmp_path)
    train(calm)
    (tmp_path / "killed.toml").write_text(to_toml(killed))
    script = (
        "import os, signal, sys, minitrain as mt\n"
        "from minitrain.config import load_config\n"
        "from minitrain.hf import default_config\n"
        "def kill(step, *_):\n"
        "    if step == 13: os.kill(os.getpid(), signal.SIGKILL)\n"
        "mt.train(load_config(sys.argv[1], [], default_config), on_step=kill)\n"
    )
    process = subprocess.run([sys.executable, "-c", script, tmp_path / "killed.toml"], cwd=ROOT, stderr=subprocess.PIPE)
    assert process.returncode == -signal.SIGKILL, process.stderr
    with open(Path(killed.run_dir) / "metrics.jsonl", "a") as file:
        file.write('{"step": 11, "loss": 4.')  # a line that was being written
    train(killed)
    assert results(killed) == results(calm)


def test_metrics_hold_each_step_once_however_often_a_run_stops(corpus, tmp_path):
    calm, disturbed = pair(corpus, tmp_path, train={"log_every": 5})
    train(calm)
    run_until(18, disturbed)
    assert len(read_metrics(disturbed.run_dir)) == 15
    run_until(12, disturbed)
    assert [row["step"] for row in read_metrics(disturbed.run_dir)] == list(range(1, 11))
    train(disturbed)
    assert results(disturbed) == results(calm)


def test_metrics_are_cut_at_a_damaged_line(corpus, tmp_path):
    cfg = tiny_run(corpus, tmp_path / "run", train={"steps": 8}, checkpoint={"every": 4})
    for damage in (b"\0" * 9, b"{}", b"3", b"\xff"):
        run_until(6, cfg)
        lines = (tmp_path / "run" / "metrics.jsonl").read_bytes().splitlines()
        (tmp_path / "run" / "metrics.jsonl").write_bytes(b"\n".join([*lines[:2], damage, *lines[3:], b""]))
        run_until(6, cfg)
        assert [row["step"] for row in read_metrics(cfg.run_dir)] == [1, 2]


def test_an_iterator_without_state_is_advanced(corpus, tmp_path):
    calm, disturbed = pair(corpus, tmp_path)

    def plain(cfg):
        yield from PackedData(cfg.data, Mesh(torch.device("cpu")), 101)

    train(calm)
    run_until(13, disturbed, data=plain(disturbed))
    assert manifest(disturbed)["data"] is None
    train(disturbed, data=plain(disturbed))
    assert results(disturbed) == results(calm)


def test_a_finished_run_stays_as_it_is(corpus, tmp_path):
    cfg, _ = pair(corpus, tmp_path)
    train(cfg)
    before = results(cfg)
    train(cfg)
    assert results(cfg) == before


def test_a_run_that_goes_on_says_what_was_set_otherwise_and_when_nothing_is_left(stopped, caplog):
    caplog.set_level("INFO")
    other = {"optim": dataclasses.replace(stopped.optim, lr=0.5), "train": dataclasses.replace(stopped.train, seed=7)}
    train(dataclasses.replace(stopped, **other))
    said = [record.getMessage().strip() for record in caplog.records]
    assert [line for line in said if " was " in line] == ["optim.lr was 0.01, is 0.5", "train.seed was 0, is 7"]
    assert not any("done already" in line for line in said)
    caplog.clear()
    train(stopped)
    said = [record.getMessage().strip() for record in caplog.records]
    assert "optim.lr was 0.5, is 0.01" in said and "train.steps=6: all of them are done already" in said


# ---- which folders there are


def test_a_checkpoint_that_was_being_written_is_ignored(corpus, tmp_path):
    calm, disturbed = pair(corpus, tmp_path)
    train(calm)
    run_until(13, disturbed)
    for step in (20, 99):
        leftover = Path(disturbed.run_dir) / "checkpoints" / f"step-{step:08}.tmp"
        leftover.mkdir()
        (leftover / "manifest.json").write_text("{")
    train(disturbed)
    assert results(disturbed) == results(calm)


def test_the_newest_checkpoints_are_kept(corpus, tmp_path):
    cfg = tiny_run(corpus, tmp_path / "run", checkpoint={"every": 3, "keep": 2}, train={"steps": 10})
    train(cfg)
    assert [path.name for path in checkpoints(cfg)] == ["step-00000009", "step-00000010"]


def test_an_old_checkpoint_that_cannot_be_deleted_ends_no_run(corpus, tmp_path, monkeypatch, caplog):
    def refuse_to_delete(path, *args, **options):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("minitrain.checkpoint.shutil.rmtree", refuse_to_delete)
    cfg = tiny_run(corpus, tmp_path, train={"steps": 4}, checkpoint={"every": 1, "keep": 1, "export": False})
    train(cfg)
    assert newest(cfg).name == "step-00000004" and "step-00000003 is not deleted: [Errno 13]" in caplog.text


def test_every_0_writes_none(corpus, tmp_path):
    cfg = tiny_run(corpus, tmp_path / "run", checkpoint={"every": 0}, train={"steps": 3})
    train(cfg)
    assert not (tmp_path / "run" / "checkpoints").exists() and len(read_metrics(cfg.run_dir)) == 3


def test_a_run_without_checkpoints_that_begins_anew_keeps_the_lines_of_the_one_before(corpus, tmp_path, caplog):
    caplog.set_level("INFO")
    cfg = tiny_run(corpus, tmp_path / "run", checkpoint={"every": 0, "export": False}, train={"steps": 3})
    train(cfg)
    assert "no checkpoint" not in caplog.text
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    run_until(1, cfg)
    assert (tmp_path / "run" / "metrics.jsonl.old").read_text() == before and not read_metrics(cfg.run_dir)
    assert "metrics.jsonl: of a run that left no checkpoint; it is metrics.jsonl.old now" in caplog.text


def test_resume_false_refuses_a_run_that_has_begun(corpus, tmp_path):
    cfg = tiny_run(corpus, tmp_path / "run", checkpoint={"resume": False}, train={"steps": 3})
    train(cfg)
    with pytest.raises(UserError, match=r"holds a run already and checkpoint\.resume is false"):
        train(cfg)


# ---- what is refused


@pytest.fixture
def stopped(corpus, tmp_path):
    """A run with a checkpoint after step 4 of 6."""
    cfg = tiny_run(corpus, tmp_path / "run", train={"steps": 6}, checkpoint={"every": 4})
    run_until(5, cfg)
    return cfg


def refuse(cfg, complaint, **parts):
    """Resuming fails in one line that says where and why, and has changed nothing."""
    model = build_model(cfg.model, "cpu")
    init_weights(model, seed=9)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(UserError, match=complaint) as error:
        train(cfg, model=model, **parts)
    assert "\n" not in str(error.value)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize(
    "file, place, complaint",
    [
        ("rank-00000.safetensors", 20, r"its header, which tells where model\.embed_tokens\.weight and \d+ more are"),
        ("rank-00000.safetensors", 20_000, r"model\.embed_tokens\.weight is not what was written"),
        ("rank-00000.safetensors", -1, r"rng\.0\.cpu is not what was written"),
        ("manifest.json", -30, "its text and its sha256 do not belong together"),
    ],
)
def test_a_flipped_bit_is_refused(stopped, file, place, complaint):
    path = newest(stopped) / file
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    refuse(stopped, f"{file}: damaged: {complaint}")


@pytest.mark.slow
def test_a_thousand_flipped_bits_are_refused(stopped):
    """One at a time, anywhere in the checkpoint; the message names the file, and in a file of pieces a tensor."""
    random, folder = Random(0), newest(stopped)
    contents = {path: path.read_bytes() for path in sorted(folder.iterdir())}

    def read_all():
        Saved(folder).verify()

    read_all()
    for path in random.choices(list(contents), [len(content) for content in contents.values()], k=1000):
        content = bytearray(contents[path])
        bit = random.randrange(8 * len(content))
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        named = r"(model|optimizer|rng)\.\S+" if path.suffix == ".safetensors" else ""
        with pytest.raises(UserError, match=f"{path.name}.*{named}"):
            read_all()
        path.write_bytes(contents[path])
    read_all()


@pytest.mark.parametrize("file", ["rank-00000.safetensors", "manifest.json"])
def test_a_missing_file_is_refused(stopped, file):
    (newest(stopped) / file).unlink()
    refuse(stopped, f"{file}: no such file")


@pytest.mark.parametrize("size", [0, 4, 3000, -1])
def test_a_truncated_file_is_refused(stopped, size):
    path = newest(stopped) / "rank-00000.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    refuse(stopped, r"rank-00000.safetensors: damaged: .*(model|rng)\.")


def test_a_longer_file_is_refused(stopped):
    with open(newest(stopped) / "rank-00000.safetensors", "ab") as file:
        file.write(b"1")
    refuse(stopped, "rank-00000.safetensors: damaged: holds more or less than the manifest says")


def seal(path, change):
    """A manifest with another content and the right checksum."""
    manifest = json.loads(path.read_text())
    del manifest["sha256"]
    change(manifest)
    about = {key: value for key, value in manifest.items() if key not in ("format", "files", "tensors")}
    write_manifest(path.parent, about, [{"files": manifest["files"], "tensors": manifest["tensors"]}])


def first_piece(manifest):
    return next(iter(manifest["tensors"].values()))["pieces"][0]


@pytest.mark.parametrize(
    "change, complaint",
    [
        (lambda m: m.pop("optimizer"), "lacks 'optimizer'"),
        (lambda m: m.update(step="4"), "step is '4'"),
        (lambda m: m.update(step=5), "its manifest is of step 5"),
        (
            lambda m: m["files"].update({"../rank-00000.safetensors": m["files"].popitem()[1]}),
            "is no name",
        ),
        (lambda m: first_piece(m).update(file="rank-00009.safetensors"), "none of its files"),
        (lambda m: first_piece(m).update(first=1), "overlap or leave a hole at element 0"),
        (lambda m: first_piece(m).update(end=3), "end at element 3 of 3232"),
        (lambda m: first_piece(m).update(end=1.5), "overlap"),
        (lambda m: m["tensors"].pop("rng.0.cpu"), "rng.0.cpu is not what was written"),
        (lambda m: m["tensors"]["rng.0.cpu"].update(dtype="F00"), "rng.0.cpu is 'F00'"),
        (lambda m: m["tensors"]["rng.0.cpu"].update(dtype="I8"), "rng.0.cpu is not what was written"),
        (lambda m: first_piece(m).pop("sha256"), "lacks 'sha256'"),
        (lambda m: m["files"]["rank-00000.safetensors"].pop("header_sha256"), "lacks 'header_sha256'"),
        (lambda m: m.update(best={"step": 9, "loss": 1.0}), "best is {'step': 9, 'loss': 1.0}"),
        (lambda m: m["data"].update(step=None), "what the checkpoint holds is no place in the data"),
        (lambda m: m["data"]["place"].update(pieces=["4"]), "what the checkpoint holds is no place in the data"),
        (lambda m: m.update(tensors=3), "manifest.json: not a manifest"),
        (lambda m: m["config"].update(train=3), r"manifest.json: not a manifest of a checkpoint: config\.train is 3"),
        (lambda m: m["files"].update({"rank-00000.safetensors": 3}), "manifest.json: not a manifest"),
    ],
)
def test_a_foreign_manifest_is_refused(stopped, change, complaint):
    path = newest(stopped) / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    if isinstance(manifest.get("tensors"), dict):
        seal(path, change)
    else:
        text = json.dumps(manifest | {"sha256": ""}, indent=2)
        body = text.removesuffix(',\n  "sha256": ""\n}')
        path.write_text(f'{body},\n  "sha256": "{hashlib.sha256(body.encode()).hexdigest()}"\n}}\n')
    refuse(stopped, complaint)


def test_other_formats_are_refused(stopped):
    path = newest(stopped) / "manifest.json"
    for number in (1, 3):
        path.write_text(path.read_text().replace('"format": 2', f'"format": {number}'))
        refuse(stopped, f"of checkpoint format {number}, this version reads 2")
        path.write_text(path.read_text().replace(f'"format": {number}', '"format": 2'))
    path.write_text("{")
    refuse(stopped, "manifest.json: cannot be read as JSON")


def test_fallback_goes_on_from_the_checkpoint_before(corpus, tmp_path):
    calm, disturbed = pair(corpus, tmp_path)
    train(calm)
    disturbed.checkpoint.every = 5
    run_until(13, disturbed)
    bad = newest(disturbed)
    (bad / "rank-00000.safetensors").unlink()
    refuse(disturbed, "no such file; .*; checkpoint.fallback=true goes on from the one before it")
    disturbed.checkpoint.fallback = True
    train(disturbed)
    assert results(disturbed) == results(calm)
    assert bad.with_name("step-00000010.damaged").exists()
    for path in checkpoints(disturbed):
        (path / "manifest.json").unlink()
    refuse(disturbed, "manifest.json: no such file")


@pytest.mark.parametrize("text", ["{}", '{"format": null}'])
def test_fallback_goes_on_when_a_manifest_has_no_format(corpus, tmp_path, text):
    cfg = tiny_run(corpus, tmp_path / "run", train={"steps": 4}, checkpoint={"every": 2, "export": False})
    train(cfg)
    (newest(cfg) / "manifest.json").write_text(text)
    refuse(cfg, r"manifest\.json: damaged: has no format; checkpoint\.fallback=true goes on")
    cfg.checkpoint.fallback = True
    train(cfg)
    assert newest(cfg).with_name("step-00000004.damaged").exists()


def test_fallback_goes_on_when_the_newest_one_cannot_be_read(corpus, tmp_path, monkeypatch):
    cfg = tiny_run(corpus, tmp_path / "run", train={"steps": 4}, checkpoint={"every": 2, "export": False})
    train(cfg)
    bad, preadv = newest(cfg) / "rank-00000.safetensors", os.preadv

    def fail(file, *args):
        if os.path.sameopenfile(file, bad_file.fileno()):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(file, *args)

    monkeypatch.setattr(os, "preadv", fail)
    with open(bad, "rb") as bad_file:
        refuse(cfg, f"{bad}: cannot be read: Input/output error; checkpoint.fallback=true goes on from the one before")
        cfg.checkpoint.fallback = True
        train(cfg)
    assert [path.name for path in checkpoints(cfg)] == ["step-00000002", "step-00000004"]
    assert bad.parent.with_name("step-00000004.damaged").exists()


@pytest.mark.parametrize("other", [LARGER, WIDER, MOE], ids=["layers", "width", "moe"])
def test_another_model_is_refused(stopped, other):
    refuse(dataclasses.replace(stopped, model=other), r"of another model: layers\..* is .* there and .* in the config")


def rewrite(folder, change):
    """A checkpoint with other tensors: change({name: values}) in place."""
    saved = Saved(folder)
    tensors = {name: saved.read(name).clone().view(shape) for name, (_, shape) in saved.tensors.items()}
    change(tensors)
    about = {key: saved.manifest[key] for key in ("step", "data", "config", "dtype", "optimizer", "versions")}
    pieces = {name: Piece(t, t.shape, whole_box(t.shape)) for name, t in tensors.items()}
    write_manifest(folder, about, [write_pieces(folder / "rank-00000.safetensors", pieces)])


@pytest.mark.parametrize("offload", ["", "optimizer"])
def test_a_run_goes_on_from_moments_of_another_dtype_in_its_own(corpus, tmp_path, offload):
    """As from a checkpoint that was written on a GPU; also in what it saves."""
    cfg = tiny_run(corpus, tmp_path / "run", train={"steps": 6}, checkpoint={"every": 4}, parallel={"offload": offload})
    run_until(5, cfg)

    def narrow(tensors):
        tensors.update({name: t.bfloat16() for name, t in tensors.items() if ".exp_avg" in name})

    rewrite(newest(cfg), narrow)
    train(cfg)
    saved = Saved(newest(cfg))
    assert {dtype for name, (dtype, _) in saved.tensors.items() if ".exp_avg" in name} == {torch.float32}
    moments = saved.read("optimizer.embed_tokens.weight.exp_avg")
    assert not moments.equal(moments.bfloat16().float())


def test_state_of_a_parameter_that_the_model_has_not_is_refused(stopped):
    rewrite(newest(stopped), lambda tensors: tensors.update({"optimizer.tail.weight.exp_avg": torch.ones(2)}))
    refuse(stopped, r"another model: it has optimizer\.tail\.weight\.exp_avg, and the config has no tail\.weight")


def test_another_corpus_is_refused(stopped, tmp_path):
    write_corpus(tmp_path / "other", [[1, 2, 3]] * 50)
    stopped.data.path = str(tmp_path / "other")
    refuse(stopped, "not the corpus")


def test_another_optimizer_is_refused(stopped):
    refuse(stopped, "of another optimizer: AdamW there, SGD here", optimizer=torch.optim.SGD)


def test_another_kind_of_data_is_refused(stopped):
    refuse(stopped, "another kind of data", data=iter([]))


def test_nothing_unpickles():
    """No file of the project imports pickle or its kin, or calls what unpickles in torch."""
    kin = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    for path in [*(ROOT / "minitrain").rglob("*.py"), *(ROOT / "tools").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not kin & {module.split(".")[0] for module in modules}, path
            assert not (isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.load", "torch.save")), path


@pytest.mark.parametrize("setting", ["seed", "rows_per_step", "tokens_per_row", "max_seqlen"])
def test_a_run_goes_on_with_the_same_tokens_or_not_at_all(corpus, tmp_path, setting):
    train(tiny_run(corpus, tmp_path / "run", train={"steps": 2}))
    changed = {"seed": 5, "rows_per_step": 2, "tokens_per_row": 128, "max_seqlen": 16}[setting]
    with pytest.raises(UserError, match=f"not the corpus and order that this run began with: .*{setting} was"):
        train(tiny_run(corpus, tmp_path / "run", train={"steps": 4}, data={setting: changed}))


@pytest.mark.slow
def test_offloaded_states_are_written_as_they_lie_before_the_next_step(corpus, tmp_path, monkeypatch):
    events, begun, step = [], threading.Event(), ShardedOptimizer.step

    def write(*args):
        if "written" not in events:
            begun.clear()
            begun.wait(5)  # for the second step, if it comes
        written = write_pieces(*args)
        events.append("written")
        return written

    def note_and_step(opt, lr):
        events.append("step")
        begun.set()
        step(opt, lr)

    monkeypatch.setattr("minitrain.checkpoint.write_pieces", write)
    monkeypatch.setattr(ShardedOptimizer, "step", note_and_step)
    monkeypatch.setattr(Checkpointer, "_make_room", None)
    sections = {"train": {"steps": 2}, "checkpoint": {"every": 1}, "parallel": {"offload": "optimizer"}}
    train(tiny_run(corpus, tmp_path / "run", **sections))
    assert events == ["step", "written"] * 2


def test_resume_false_refuses_a_run_without_checkpoints_too(corpus, tmp_path):
    train(tiny_run(corpus, tmp_path / "run", train={"steps": 2}, checkpoint={"every": 0}))
    with pytest.raises(UserError, match="holds a run already"):
        train(tiny_run(corpus, tmp_path / "run", checkpoint={"resume": False}))
