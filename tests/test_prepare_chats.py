"""tools/prepare_data.py on conversations, tables and duplicates: what is kept, what is learnt, what is counted."""

import errno
import importlib
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from minitrain.config import DataConfig, UserError
from minitrain.shards import open_sources
from minitrain.storage import open_safetensors

REPO = Path(__file__).parents[1]
sys.path.insert(0, str(REPO / "tools"))
prepare_data = importlib.import_module("prepare_data")
prepare = prepare_data.prepare

PLAIN = """\
{% for m in messages %}
{{ m.role + ': ' + m.content + eos_token }}
{% endfor %}
{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}
"""
GOOD = [
    {"messages": [{"role": "user", "content": "one é"}, {"role": "assistant", "content": "two"}]},
    {"prompt": "three", "completion": " four"},
    {
        "messages": [
            {"role": "system", "content": "brief"}, {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"},
            {"role": "assistant", "content": "d", "tool_calls": None},
        ],
        "tools": None,
    },
]  # fmt: skip


@pytest.fixture
def options(tmp_path):
    """Of a tokenizer that is trained on the conversations, and a template in a file."""
    (tmp_path / "plain.jinja").write_text(PLAIN)
    return {"train_tokenizer": 300, "workers": 1, "chat": True, "chat_template": tmp_path / "plain.jinja"}


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def shard_of(folder):
    (path,) = folder.glob("*.safetensors")
    reader = open_safetensors(path)
    return {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118


def marked(folder):
    """The documents with [ ] around what is learnt."""
    tokenizer, shard, documents = Tokenizer.from_file(str(folder / "tokenizer.json")), shard_of(folder), []
    for start, end in shard["document_offsets"].unfold(0, 2, 1).tolist():
        ids, trained = shard["tokens"][start:end].tolist(), shard["trained"][start:end].tolist()
        runs = [i for i in range(len(ids)) if i == 0 or trained[i] != trained[i - 1]]
        text = ""
        for begin, stop in zip(runs, [*runs[1:], len(ids)], strict=True):
            piece = tokenizer.decode(ids[begin:stop], skip_special_tokens=False)
            text += f"[{piece}]" if trained[begin] else piece
        documents.append(text)
    return documents


def test_answers_and_completions_are_marked_with_what_ends_them(tmp_path, options):
    source = write_jsonl(tmp_path / "chats.jsonl", GOOD)
    report = prepare([source], tmp_path / "out", **options)
    assert marked(tmp_path / "out") == [
        "user: one é<|endoftext|>\nassistant: [two<|endoftext|>]\n",
        "three[ four<|endoftext|>]",
        "system: brief<|endoftext|>\nuser: a<|endoftext|>\nassistant: [b<|endoftext|>]\nuser: c<|endoftext|>\n"
        "assistant: [d<|endoftext|>]\n",
    ]
    assert int((shard_of(tmp_path / "out")["tokens"] == 0).sum()) == 8  # the special token, not its letters
    assert report["documents_written"] == 3 and report["trained_tokens"] == int(
        shard_of(tmp_path / "out")["trained"].sum()
    )
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == PLAIN  # goes on with the model


LAST_IN_CAPITALS = PLAIN.replace(
    "m.content +", "(m.content | upper if loop.last and m.role == 'assistant' else m.content) +"
)


def test_a_conversation_may_become_several_documents(tmp_path, options):
    options["chat_template"].write_text(LAST_IN_CAPITALS)
    report = prepare([write_jsonl(tmp_path / "chats.jsonl", GOOD[2:])], tmp_path / "out", **options)
    assert marked(tmp_path / "out") == [
        "system: brief<|endoftext|>\nuser: a<|endoftext|>\nassistant: [B<|endoftext|>]\n",
        "system: brief<|endoftext|>\nuser: a<|endoftext|>\nassistant: b<|endoftext|>\nuser: c<|endoftext|>\n"
        "assistant: [D<|endoftext|>]\n",
    ]
    assert (report["documents_kept"], report["documents_written"]) == (1, 2)


@pytest.mark.parametrize("held_out", [1, 5, 12])
def test_a_conversation_is_held_out_with_all_its_documents(tmp_path, options, held_out):
    options["chat_template"].write_text(LAST_IN_CAPITALS)
    chats = [
        {"messages": [{"role": role, "content": f"chat{i}."} for role in ("user", "assistant") * (1 + i % 3)]}
        for i in range(13)
    ]
    prepare([write_jsonl(tmp_path / "chats.jsonl", chats)], tmp_path / "out", shard_tokens=300, **options)
    (source,) = open_sources(DataConfig(str(tmp_path / "out"), held_out=held_out), 300)
    assert len(source.trained.shards) > 2
    tokenizer, sides = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json")), []
    for pieces in (source.trained, source.held_out):
        columns = pieces.shard.tolist(), pieces.start.tolist(), pieces.length.tolist()
        ids = [pieces.shards[i].tokens[start : start + n].tolist() for i, start, n in zip(*columns, strict=True)]
        sides.append([re.search(r"chat\d+", tokenizer.decode(document))[0] for document in ids])
    assert len(set(sides[1])) == held_out and not set(sides[0]) & set(sides[1])
    assert sorted(sides[0] + sides[1]) == sorted(f"chat{i}" for i in range(13) for _ in range(1 + i % 3))


def test_bad_conversations_are_skipped_counted_and_the_first_is_named(tmp_path, options, capsys):
    user, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    lines = [
        GOOD[0],
        {"messages": []},
        {"messages": [user, {"role": "bot", "content": "b"}]},
        {"messages": [user]},
        {"messages": [user, {"role": "assistant", "content": ""}]},
        {"messages": [user, answer | {"content": 3}]},
        {"text": "a"},
        {"prompt": "a", "completion": ""},
        {"messages": [user, answer], "tools": "add"},
        {"messages": "a: b"},
        {"messages": [answer]},
        {"messages": [user, answer | {"content": "\ud800"}]},
    ]
    source = write_jsonl(tmp_path / "chats.jsonl", lines)
    with open(source, "a") as file:
        file.write('{"messages": [\n\n')
    report = prepare([source], tmp_path / "out", **options)
    assert report["documents_kept"] == 1 and report["documents_read"] == 14
    assert report["first_skipped"] == {
        reason: f"{source}:{line}"
        for line, reason in {
            2: "an empty conversation",
            3: "a role that is none of system, user, assistant, tool",
            4: "no assistant turn",
            5: "an assistant turn without content",
            6: "content that is no text",
            7: "missing field",
            8: "empty completion",
            9: "tools that are no list",
            10: "messages is no list of objects",
            11: "it begins with an assistant turn, which takes a template with {% generation %}",
            12: "invalid UTF-8",
            13: "broken JSON",
            14: "empty",
        }.items()
    }
    assert set(report["skipped"].values()) == {1}
    assert len(capsys.readouterr().err.splitlines()) == 13


@pytest.mark.parametrize("workers", [1, 2])
def test_a_template_that_is_no_good_stops_with_its_line_and_the_conversations(tmp_path, options, workers):
    options["chat_template"].write_text("{% for m in messages %}\n{{ m.__class__ }}\n{% endfor %}")
    source = write_jsonl(tmp_path / "chats.jsonl", GOOD)
    complaint = r"chat template, line 2: access to attribute '__class__' .*\(in .*chats.jsonl:1\)"
    with pytest.raises(UserError, match=complaint):
        prepare([source], tmp_path / "out", **options | {"workers": workers})
    assert not (tmp_path / "out").exists()


def test_chats_need_a_template_and_a_template_needs_chats(tmp_path, options):
    source = write_jsonl(tmp_path / "chats.jsonl", GOOD)
    with pytest.raises(UserError, match="has no chat template; give one with --chat-template"):
        prepare([source], tmp_path / "out", **options | {"chat_template": None})
    with pytest.raises(UserError, match="chat_template is given, but chat is not"):
        prepare([source], tmp_path / "out", **options | {"chat": False})
    with pytest.raises(UserError, match=r"absent\.jinja: no such file"):
        prepare([source], tmp_path / "out", **options | {"chat_template": tmp_path / "absent.jinja"})


@pytest.mark.parametrize("content", [None, b"{% for %}", b"\xff"])
@pytest.mark.parametrize("place", ["of a trained tokenizer", "given", "beside"])
def test_a_template_that_cannot_be_read_is_named(tmp_path, options, content, place):
    source = write_jsonl(tmp_path / "chats.jsonl", GOOD)
    prepare([source], tmp_path / "made", **options)
    path = tmp_path / ("made/chat_template.jinja" if place == "beside" else "plain.jinja")
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    if place != "of a trained tokenizer":
        options |= {"tokenizer": tmp_path / "made", "train_tokenizer": None}
        options |= {"chat_template": path if place == "given" else None}
    complaint = "has no chat template" if (place, content) == ("beside", None) else rf"^{path}: [^/]*$"
    with pytest.raises(UserError, match=complaint):
        prepare([source], tmp_path / "out", **options)


def test_a_template_in_tokenizer_config_json_that_cannot_be_read_is_named(tmp_path, options):
    source = write_jsonl(tmp_path / "chats.jsonl", GOOD)
    prepare([source], tmp_path / "made", **options)
    (tmp_path / "made" / "chat_template.jinja").unlink()
    (tmp_path / "made" / "tokenizer_config.json").write_text('{"chat_template": "{% for %}"}')
    with pytest.raises(UserError, match=r"tokenizer_config\.json: chat template, line 1: "):
        prepare([source], tmp_path / "out", tokenizer=tmp_path / "made", chat=True, workers=1)


# ---- tables


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_rows_of_tables_are_as_good_as_lines(tmp_path, options, kind, chat):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [GOOD[0], GOOD[2]] if chat else [{"text": "one é", "n": 1}, {"text": "two", "n": 2}]
    write_jsonl(tmp_path / "a.jsonl", rows)
    table = pa.Table.from_pylist(rows)
    if kind == "parquet":
        parquet.write_table(table, tmp_path / "a.parquet")
    else:
        write_arrow(tmp_path / "a.arrow", table)
    if not chat:
        del options["chat"], options["chat_template"]
    reports = [prepare([tmp_path / name], tmp_path / f"{name}.out", **options) for name in ("a.jsonl", f"a.{kind}")]
    one, other = (shard_of(tmp_path / f"{name}.out") for name in ("a.jsonl", f"a.{kind}"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert reports[0]["bytes"] == reports[1]["bytes"]


def write_arrow(path, table):
    import pyarrow as pa

    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table, max_chunksize=1)


def test_a_saved_dataset_is_what_its_state_lists(tmp_path):
    """As datasets' save_to_disk writes it: shards, their list, and perhaps files of a cache beside them."""
    pa = pytest.importorskip("pyarrow")
    train = tmp_path / "set" / "train"
    train.mkdir(parents=True)
    names = [f"data-0000{i}-of-00002.arrow" for i in range(2)]
    for name, text in zip([*names, "cache-1f2e.arrow"], ["b", "a", "c"], strict=True):
        write_arrow(train / name, pa.table({"text": [text]}))
    (train / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (train / "dataset_info.json").write_text("{}")
    report = prepare([train], tmp_path / "out", train_tokenizer=300, workers=1, end_with=[])
    assert report["documents_read"] == 2
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert tokenizer.decode(shard_of(tmp_path / "out")["tokens"].tolist()) == "ba"

    (tmp_path / "set" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    with pytest.raises(UserError, match="holds several splits; give one of them: train"):
        prepare([tmp_path / "set"], tmp_path / "out2", train_tokenizer=300, workers=1)


def test_a_table_that_is_cut_is_refused(tmp_path):
    pa = pytest.importorskip("pyarrow")
    write_arrow(tmp_path / "a.arrow", pa.table({"text": ["word " * 100] * 100}))
    content = (tmp_path / "a.arrow").read_bytes()
    (tmp_path / "a.arrow").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"a\.arrow: cannot be read"):
        prepare([tmp_path / "a.arrow"], tmp_path / "out", train_tokenizer=300, workers=1)


# ---- special tokens


def test_special_tokens_go_where_they_are_asked_to(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}, {"text": "b"}])
    words = {"train_tokenizer": 300, "workers": 1}

    def tokens(**where):
        prepare([source], tmp_path / "out", overwrite=True, **words, **where)
        tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
        return tokenizer.decode(shard_of(tmp_path / "out")["tokens"].tolist(), skip_special_tokens=False)

    end = "<|endoftext|>"
    assert tokens() == f"a{end}b{end}"
    assert tokens(end_with=[]) == "ab"
    assert tokens(begin_with=[end], end_with=[]) == f"{end}a{end}b"
    assert tokens(begin_with=[end], end_with=[end, "!"]) == f"{end}a{end}!{end}b{end}!"
    with pytest.raises(UserError, match="'<s>' is no token of the tokenizer"):
        tokens(begin_with=["<s>"])


# ---- duplicates


@pytest.mark.parametrize("stop", [0, 1, 2])
def test_duplicates_are_skipped_also_behind_a_stop(tmp_path, monkeypatch, stop):
    texts = ["one", "two", "one ", "two", "three", "one", "four", "three", "two"]
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    options = {"train_tokenizer": 300, "workers": 1, "dedup": True, "shard_tokens": 4}
    real, written = prepare_data.write_safetensors, []

    def write(path, *args):
        if len(written) == stop:
            raise KeyboardInterrupt
        written.append(path)
        return real(path, *args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepare_data, "write_safetensors", write)
        prepare([source], tmp_path / "out", **options)
    report = prepare([source], tmp_path / "out", **options)
    assert report["skipped"] == {"duplicate": 4} and report["first_skipped"] == {"duplicate": f"{source}:4"}
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    paths = sorted((tmp_path / "out").glob("*.safetensors"))
    text = "".join(tokenizer.decode(open_safetensors(path).get_tensor("tokens").tolist()) for path in paths)
    assert text == "onetwoone threefour" and len(paths) > 2


def test_conversations_that_differ_in_what_is_learnt_are_no_duplicates(tmp_path, options):
    rows = [
        {"prompt": "ab", "completion": "cd"},
        {"prompt": "abc", "completion": "d"},
        {"prompt": "ab", "completion": "cd"},
    ]
    report = prepare([write_jsonl(tmp_path / "a.jsonl", rows)], tmp_path / "out", dedup=True, **options)
    assert report["documents_kept"] == 2 and report["skipped"] == {"duplicate": 1}


def test_columns_of_other_records_that_a_table_has_as_null_are_none(tmp_path, options):
    rows = [{"prompt": "ab", "completion": "cd", "messages": None, "tools": None}]
    report = prepare([write_jsonl(tmp_path / "a.jsonl", rows)], tmp_path / "out", **options)
    assert report["documents_kept"] == 1 and not report["skipped"]


# ---- a disk that fills


@pytest.mark.parametrize("shard", [0, 2])
def test_a_full_disk_is_one_line_and_what_was_written_goes_on(tmp_path, monkeypatch, capsys, shard):
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": f"document {i}"} for i in range(50)])
    options = {"train_tokenizer": 300, "workers": 1, "shard_tokens": 40}
    prepare([source], tmp_path / "whole", **options)
    real = prepare_data.write_safetensors

    def write(path, *args):
        if path.name == f"shard-{shard:05d}.safetensors.tmp":
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, *args)

    args = [str(source), "--out", str(tmp_path / "out"), "--train-tokenizer", "300", "--workers", "1"]
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(prepare_data, "write_safetensors", write)
        prepare_data.main([*args, "--shard-tokens", "40"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert f"shard-{shard:05d}.safetensors: No space left on device; what is there is whole" in error
    assert not list((tmp_path / "out").glob("*.tmp")) and not (tmp_path / "out" / "report.json").exists()
    prepare([source], tmp_path / "out", **options)
    for path in (tmp_path / "whole").glob("*.safetensors"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
