"""tools/prepare_data.py: what goes in comes out, in order, once; bad input is counted or refused in one line."""

import gzip
import importlib
import json
import multiprocessing
import os
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models

from minitrain.config import UserError
from minitrain.storage import open_safetensors, sha256

REPO = Path(__file__).parents[1]
sys.path.insert(0, str(REPO / "tools"))
prepare_data = importlib.import_module("prepare_data")
prepare = prepare_data.prepare

TEXTS = [f"document {i}: " + "to be or not to be, " * (i % 7) + "é 中 🙂"[: i % 4] for i in range(40)]
OPTIONS = {"train_tokenizer": 300, "workers": 1}


def write_jsonl(path, texts, open=open):
    with open(path, "wb") as file:
        file.writelines(json.dumps({"text": text}).encode() + b"\n" for text in texts)
    return path


def shards_of(folder):
    """What a reader sees: [(tokens, document_offsets, metadata)]."""
    readers = [open_safetensors(path) for path in sorted(folder.glob("*.safetensors"))]
    return [(r.get_tensor("tokens"), r.get_tensor("document_offsets"), r.metadata()) for r in readers]


def documents_of(folder):
    """The texts in the shards; each must end with the end-of-text token and have it nowhere else."""
    tokenizer, documents = Tokenizer.from_file(str(folder / "tokenizer.json")), []
    end_of_text = tokenizer.token_to_id("<|endoftext|>")
    for tokens, offsets, _ in shards_of(folder):
        assert offsets[0] == 0 and offsets[-1] == len(tokens)
        for start, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
            ids = tokens[start:end].tolist()
            assert ids.index(end_of_text) == len(ids) - 1
            ids.pop()
            documents.append(tokenizer.decode(ids, skip_special_tokens=False))
    return documents


def bytes_of(folder):
    """{name: content} of all that must not depend on how the run went."""
    assert not list(folder.glob("*.tmp")) and not (folder / "progress.json").exists()
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "report.json"}


def write_tokenizer(folder, tokens, size=0, config=None):
    """A word-level tokenizer of these tokens, filled up to a vocabulary of `size`."""
    folder.mkdir()
    vocab = {token: i for i, token in enumerate([*tokens, *(f"<{i}>" for i in range(len(tokens), size))])}
    Tokenizer(models.WordLevel(vocab, unk_token=tokens[0])).save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_documents_come_out_whole_and_in_order_of_the_inputs(tmp_path):
    write_jsonl(tmp_path / "b.jsonl", TEXTS[:20])
    write_jsonl(tmp_path / "a.jsonl.gz", TEXTS[20:], gzip.open)
    (tmp_path / "c.txt").write_text("one\n\ndocument\n")
    inputs = [tmp_path / "b.jsonl", tmp_path / "a.jsonl.gz", tmp_path / "c.txt"]
    report = prepare(inputs, tmp_path / "out", shard_tokens=200, **OPTIONS)
    assert documents_of(tmp_path / "out") == [*TEXTS, "one\n\ndocument\n"]
    shards = shards_of(tmp_path / "out")
    assert report["shards"] == len(shards) > 3
    assert report["tokens"] == sum(len(tokens) for tokens, _, _ in shards)
    assert report["documents_read"] == report["documents_kept"] == 41
    assert report["bytes"] == sum(len(text.encode()) for text in TEXTS) + 14
    assert report == json.loads((tmp_path / "out" / "report.json").read_text())
    for tokens, offsets, metadata in shards:
        assert tokens.dtype == torch.uint16 and offsets.dtype == torch.int64
        assert metadata["tokenizer_sha256"] == sha256(tmp_path / "out" / "tokenizer.json")
        assert metadata["vocab_size"] == str(report["vocab_size"])
        assert offsets[-2] < 200  # the document that fills a shard is its last


def test_two_workers_write_the_same_bytes_as_one_and_no_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_data, "BATCH_BYTES", 300)
    source = write_jsonl(tmp_path / "a.jsonl", [*TEXTS, "a<|endoftext|>"] * 5)
    command = [sys.executable, REPO / "tools" / "prepare_data.py", source, "--out", tmp_path / "two"]
    command += ["--train-tokenizer", "300", "--workers", "2", "--shard-tokens", "999"]
    env = os.environ | {"PYTHONPATH": str(REPO)}
    env.pop("TOKENIZERS_PARALLELISM", None)
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    prepare([source], tmp_path / "one", shard_tokens=999, **OPTIONS)
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "two")
    assert len(shards_of(tmp_path / "one")) > 2


@pytest.mark.parametrize("name", ["write_safetensors", "write_json"])
@pytest.mark.parametrize("call", range(1, 6))
def test_a_run_stopped_anywhere_goes_on_to_the_same_bytes(tmp_path, monkeypatch, name, call):
    (tmp_path / "in").mkdir()
    write_jsonl(tmp_path / "in" / "a.jsonl", ["", *TEXTS[:20], "", *TEXTS[20:]])
    (tmp_path / "in" / "b.txt").write_bytes(b"\xff")
    write_jsonl(tmp_path / "in" / "c.jsonl.gz", [*TEXTS[:15], ""], gzip.open)
    monkeypatch.setattr(prepare_data, "BATCH_BYTES", 1500)
    expected = prepare([tmp_path / "in"], tmp_path / "whole", shard_tokens=250, **OPTIONS)
    real, calls = getattr(prepare_data, name), []

    def stop(*args):
        calls.append(args)
        if len(calls) == call:
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepare_data, name, stop)
        prepare([tmp_path / "in"], tmp_path / "out", shard_tokens=250, **OPTIONS)
    assert not (tmp_path / "out" / "report.json").exists()
    report = prepare([tmp_path / "in"], tmp_path / "out", shard_tokens=250, **OPTIONS)
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")
    for timing in ("seconds", "MB/s"):
        del report[timing], expected[timing]
    assert report == expected


def die(batch):
    os._exit(1)


def encode_slowly(batch):
    time.sleep(0.02)
    return prepare_data._encoder.encode(batch)


def test_a_killed_run_takes_its_workers_along_and_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_data, "BATCH_BYTES", 300)
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS * 5)
    prepare([source], tmp_path / "whole", shard_tokens=300, **OPTIONS)
    options = {"tokenizer": tmp_path / "whole", "shard_tokens": 300, "workers": 2}
    monkeypatch.setattr(prepare_data, "_encode", encode_slowly)
    fork = multiprocessing.get_context("fork")
    end, held_by_all = os.pipe()
    run = fork.Process(target=prepare, args=([source], tmp_path / "out"), kwargs=options)
    run.start()
    os.close(held_by_all)
    while not (tmp_path / "out" / "shard-00001.safetensors").exists():
        time.sleep(0.01)
    run.kill()
    assert select.select([end], [], [], 10)[0] and os.read(end, 1) == b""  # nobody is left to write
    os.close(end)
    assert not (tmp_path / "out" / "report.json").exists()
    prepare([source], tmp_path / "out", **options)
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


def test_a_killed_worker_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_data, "_encode", die)
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    with pytest.raises(UserError, match="a worker process was killed, perhaps for its memory"):
        prepare([source], tmp_path / "out", **OPTIONS | {"workers": 2})


def test_workers_do_without_the_tokenizers_threads_and_leave_those_of_their_caller(tmp_path, monkeypatch, capfd):
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    prepare([source], tmp_path / "threads", **OPTIONS)  # now the library warns of forks
    prepare([source], tmp_path / "unset", **OPTIONS | {"workers": 2})
    assert "TOKENIZERS_PARALLELISM" not in os.environ and capfd.readouterr().err == ""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    prepare([source], tmp_path / "set", **OPTIONS | {"workers": 2})
    assert os.environ["TOKENIZERS_PARALLELISM"] == "true"


def test_whole_shards_of_a_stopped_run_are_not_written_again(tmp_path, monkeypatch):
    source, real, written = write_jsonl(tmp_path / "a.jsonl", TEXTS), prepare_data.write_safetensors, []

    def write(path, *args):
        if len(written) == 2 and stop:
            raise KeyboardInterrupt
        written.append(path.name)
        return real(path, *args)

    monkeypatch.setattr(prepare_data, "write_safetensors", write)
    stop = True
    with pytest.raises(KeyboardInterrupt):
        prepare([source], tmp_path / "out", shard_tokens=400, **OPTIONS)
    stop = False
    prepare([source], tmp_path / "out", shard_tokens=400, **OPTIONS)
    assert len(written) == len(set(written)) > 2


def test_another_job_does_not_go_on_from_a_stopped_run(tmp_path, monkeypatch):
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepare_data.ShardWriter, "finish", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        prepare([source], tmp_path / "out", shard_tokens=400, **OPTIONS)
    with pytest.raises(UserError, match="a run of other shard_tokens was stopped here"):
        prepare([source], tmp_path / "out", shard_tokens=300, **OPTIONS)
    write_jsonl(source, TEXTS[1:])
    with pytest.raises(UserError, match="a run of other inputs, files_sha256 was stopped here"):
        prepare([source], tmp_path / "out", shard_tokens=400, **OPTIONS)
    prepare([source], tmp_path / "out", shard_tokens=400, overwrite=True, **OPTIONS)
    assert documents_of(tmp_path / "out") == TEXTS[1:]


def test_bad_documents_are_skipped_counted_and_the_first_is_named(tmp_path, capsys):
    lines = [
        b'{"text": "good"}',
        b'{"text": ""}',
        b"",
        b'{"text": "a',
        b'{"text": 1}',
        b'{"body": "a"}',
        b'["text"]',
        b'{"text": "\xff"}',
        b'{"text": "\\ud800"}',
        b"[" * 100_000,
        b'{"text": ' + b"1" * 5000 + b"}",
        b'{"text": "fine", "n": null}\r',
    ]
    source = tmp_path / "a.jsonl"
    source.write_bytes(b"\n".join(lines))
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    (tmp_path / "c.txt").write_bytes(b"")
    report = prepare([source, tmp_path / "b.txt", tmp_path / "c.txt"], tmp_path / "out", **OPTIONS)
    assert documents_of(tmp_path / "out") == ["good", "fine"]
    assert report["skipped"] == {"empty": 3, "broken JSON": 3, "missing field": 3, "invalid UTF-8": 3}
    firsts = {"empty": 2, "broken JSON": 4, "missing field": 5, "invalid UTF-8": 8}
    assert report["first_skipped"] == {problem: f"{source}:{line}" for problem, line in firsts.items()}
    messages = capsys.readouterr().err.splitlines()
    assert [line.split(" (")[0] for line in messages] == [f"skipped, {p}: {source}:{n}" for p, n in firsts.items()]


def test_bom_is_dropped_and_crlf_kept(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "\\ufeffthree\\r\\n"}\r\n')
    prepare([tmp_path], tmp_path / "out", **OPTIONS)
    assert documents_of(tmp_path / "out") == ["one\r\ntwo\r\n", "three\r\n"]


def test_folders_are_read_sorted_by_suffix_and_without_the_excluded(tmp_path):
    source = tmp_path / "in"
    for name in ("b.py", "a/z.py", "a/y.md", "a/x.txt", "a/tests/t.py", "setup.py", "c/deep/er.py"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    prepare([source], tmp_path / "out", suffixes=[".py", ".md"], exclude=["tests", "setup.py"], **OPTIONS)
    assert documents_of(tmp_path / "out") == ["b.py", "a/y.md", "a/z.py", "c/deep/er.py"]


def test_text_that_spells_a_special_token_stays_text(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", ["a<|endoftext|>b", "<|endoftext|>"])
    prepare([source], tmp_path / "out", **OPTIONS)
    assert documents_of(tmp_path / "out") == ["a<|endoftext|>b", "<|endoftext|>"]


def test_a_trained_tokenizer_encodes_what_it_never_saw(tmp_path):
    prepare([write_jsonl(tmp_path / "a.jsonl", ["aaa"])], tmp_path / "trained", **OPTIONS)
    texts = ["\x00\x01\x7f", "Привет", "   \t\n 中文 🙂"]
    prepare([write_jsonl(tmp_path / "b.jsonl", texts)], tmp_path / "out", tokenizer=tmp_path / "trained", workers=1)
    assert documents_of(tmp_path / "out") == texts
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "trained" / name).read_bytes()
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["eos_token"] == "<|endoftext|>"


def test_a_tokenizer_is_trained_on_a_sample_spread_over_the_files(tmp_path, monkeypatch):
    files = [write_jsonl(tmp_path / f"{i}.jsonl", [f"{i} {j:04d}" for j in range(100)]) for i in range(4)]
    sizes = [(str(path), path.stat().st_size) for path in files]
    monkeypatch.setattr(prepare_data, "SAMPLE_BYTES", 240)
    texts = list(prepare_data.sample_texts(sizes, ["text"]))
    assert texts == [f"{i} {j:04d}" for i in range(4) for j in range(10)]
    monkeypatch.setattr(prepare_data, "SAMPLE_BYTES", 10**6)
    assert len(list(prepare_data.sample_texts(sizes, ["text"]))) == 400


@pytest.mark.parametrize(("size", "dtype"), [(65536, torch.uint16), (65537, torch.int32)])
def test_ids_take_two_bytes_where_they_fit(tmp_path, size, dtype):
    words = write_tokenizer(tmp_path / "words", ["[UNK]", "</s>"], size)
    source = write_jsonl(tmp_path / "a.jsonl", ["<7>", f"<{size - 1}>"])
    prepare([source], tmp_path / "out", tokenizer=words / "tokenizer.json", workers=1)
    ((tokens, offsets, metadata),) = shards_of(tmp_path / "out")
    assert tokens.dtype == dtype and tokens.tolist() == [7, 1, size - 1, 1] and offsets.tolist() == [0, 2, 4]
    assert metadata["vocab_size"] == str(size)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"eos_token": "<end>"}, 1),
        ({"eos_token": {"content": "<end>"}}, 1),
        ({"eos_token": None}, 2),
        ({}, 2),
        (None, 2),
    ],
)
def test_end_of_text_is_what_the_config_names_or_a_usual_one(tmp_path, config, expected):
    words = write_tokenizer(tmp_path / "words", ["a", "<end>", "<|end_of_text|>", "</s>"], config=config)
    prepare([write_jsonl(tmp_path / "a.jsonl", ["a"])], tmp_path / "out", tokenizer=words, workers=1)
    ((tokens, *_),) = shards_of(tmp_path / "out")
    assert tokens.tolist() == [0, expected]


def test_a_tokenizer_without_end_of_text_is_said_and_one_that_lies_refused(tmp_path, capsys):
    source = write_jsonl(tmp_path / "a.jsonl", ["a"])
    words = write_tokenizer(tmp_path / "words", ["a"])
    prepare([source], tmp_path / "out", tokenizer=words, workers=1)
    ((tokens, *_),) = shards_of(tmp_path / "out")
    assert tokens.tolist() == [0]
    assert "no end-of-text token" in capsys.readouterr().err
    liar = write_tokenizer(tmp_path / "liar", ["a"], config={"eos_token": "<end>"})
    with pytest.raises(UserError, match=r"eos_token '<end>' is not in tokenizer\.json"):
        prepare([source], tmp_path / "out2", tokenizer=liar, workers=1)


def test_truncation_and_padding_in_tokenizer_json_are_ignored(tmp_path):
    prepare([write_jsonl(tmp_path / "a.jsonl", TEXTS)], tmp_path / "trained", **OPTIONS)
    tokenizer = Tokenizer.from_file(str(tmp_path / "trained" / "tokenizer.json"))
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=50)
    tokenizer.save(str(tmp_path / "cut.json"))
    prepare([tmp_path / "a.jsonl"], tmp_path / "out", tokenizer=tmp_path / "cut.json", workers=1)
    assert documents_of(tmp_path / "out") == TEXTS


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("absent.txt", "absent.txt: no such file or folder"),
        ("a.pdf", "a.pdf: unknown suffix; --suffixes takes it for text"),
        ("empty_folder", "empty_folder: no file with a suffix of .txt"),
        ("empty.txt", "no document to keep: 1 read, skipped {'empty': 1}"),
        ("cut.jsonl.gz", "cut.jsonl.gz: cannot be read: Compressed file ended before"),
        ("a.txt --suffixes txt", "suffix 'txt': must be"),
        ("a.txt --suffixes .txt .txt.gz", "suffix '.txt.gz': must be"),
        ("a.txt --shard-tokens 0", "shard_tokens=0, workers=1: must be at least 1"),
        ("a.txt --train-tokenizer 256", "train_tokenizer=256: must be at least 257"),
        (
            "a.txt --tokenizer absent/tokenizer",
            "absent/tokenizer: no such folder, and the hub",
        ),
        ("a.txt --tokenizer empty_folder", "tokenizer.json: no such file"),
        ("a.txt --tokenizer a.txt", "a.txt: cannot be read as a tokenizer"),
        ("a.txt --out empty.txt", "empty.txt: is not a folder"),
    ],
)
def test_what_a_person_got_wrong_is_one_line_exit_2_and_no_folder(tmp_path, monkeypatch, capsys, args, message):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("text")
    Path("a.pdf").write_text("text")
    Path("empty.txt").touch()
    Path("empty_folder").mkdir()
    Path("cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 1000)[:40])
    args = [*args.split(), "--workers", "1"]
    args += [] if "--out" in args else ["--out", "out"]
    args += [] if {"--tokenizer", "--train-tokenizer"} & set(args) else ["--train-tokenizer", "300"]
    with pytest.raises(SystemExit) as stop:
        prepare_data.main(args)
    error = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("skipped")]
    assert stop.value.code == 2 and len(error) == 1 and message in error[0]
    assert not Path("out").exists()


def test_a_finished_dataset_is_only_replaced_with_overwrite_and_then_whole(tmp_path):
    long, short = write_jsonl(tmp_path / "a.jsonl", TEXTS), write_jsonl(tmp_path / "b.jsonl", TEXTS[:3])
    empty = write_jsonl(tmp_path / "c.jsonl", [""])
    out = tmp_path / "out"
    prepare([long], out, shard_tokens=300, **OPTIONS)
    before = bytes_of(out)
    with pytest.raises(UserError, match="holds a dataset; choose another folder or --overwrite"):
        prepare([long], out, shard_tokens=300, **OPTIONS)
    with pytest.raises(UserError, match="no document to keep"):
        prepare([empty], out, overwrite=True, **OPTIONS)
    assert bytes_of(out) == before and (out / "report.json").exists()
    prepare([short], out, overwrite=True, **OPTIONS)
    assert documents_of(out) == TEXTS[:3]


def test_a_folder_with_another_tokenizer_is_refused(tmp_path):
    source, out = write_jsonl(tmp_path / "a.jsonl", ["a"]), write_tokenizer(tmp_path / "out", ["b", "</s>"])
    words = write_tokenizer(tmp_path / "words", ["a", "</s>"])
    with pytest.raises(UserError, match=r"out/tokenizer\.json: another tokenizer"):
        prepare([source], out, tokenizer=words, workers=1)
    assert [path.name for path in out.iterdir()] == ["tokenizer.json"]
    prepare([source], out, tokenizer=words, workers=1, overwrite=True)
    assert [tokens.tolist() for tokens, *_ in shards_of(out)] == [[0, 1]]


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl.zst"])
def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch, name):
    for package in ("pyarrow", "zstandard"):
        monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / name).write_bytes(b"anything")
    with pytest.raises(UserError, match=r"needs a package: pip install (pyarrow|zstandard), or minitrain\[data\]"):
        prepare([tmp_path / name], tmp_path / "out", **OPTIONS)


def test_zst_is_read_over_frames_and_refused_when_cut(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    lines = [json.dumps({"text": text}).encode() + b"\n" for text in TEXTS * 50]
    frames = [zstandard.compress(b"".join(lines[:7])), zstandard.compress(b"".join(lines[7:]).rstrip())]
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(b"".join(frames))
    prepare([path], tmp_path / "out", **OPTIONS)
    assert documents_of(tmp_path / "out") == TEXTS * 50
    path.write_bytes(b"".join(frames)[:-3])
    with pytest.raises(UserError, match=r"a\.jsonl\.zst: cannot be read: it ends inside a frame"):
        prepare([path], tmp_path / "cut", **OPTIONS)


def test_parquet_rows_are_documents(tmp_path):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    for kind in (pa.string(), pa.large_string()):
        raw = pa.array([*(text.encode() for text in TEXTS), b"\xff", None, b""], pa.large_binary())
        parquet.write_table(pa.table({"body": raw.cast(kind, safe=False)}), tmp_path / "a.parquet", row_group_size=7)
        report = prepare([tmp_path / "a.parquet"], tmp_path / "out", text_field="body", overwrite=True, **OPTIONS)
        assert documents_of(tmp_path / "out") == TEXTS
        assert report["skipped"] == {"invalid UTF-8": 1, "missing field": 1, "empty": 1}
        assert report["first_skipped"]["missing field"] == f"{tmp_path}/a.parquet:42"
    with pytest.raises(UserError, match="no column 'text' but body"):
        prepare([tmp_path / "a.parquet"], tmp_path / "out", overwrite=True, **OPTIONS)
