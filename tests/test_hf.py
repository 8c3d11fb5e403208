"""Folders of the Hub: what transformers writes we read, what we write it reads, and what is wrong is named."""

import json
import shutil
import sys

import pytest
import safetensors.torch
import torch
from conftest import ROOT, TINY
from reference import CASES, LLAMA3_ROPE, hub_model
from test_storage import LiveBytes
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM

from minitrain import hf
from minitrain.config import UserError, load_config
from minitrain.hf import default_config, from_pretrained, hub_config, read_config, save_pretrained
from minitrain.models import build_model, init_weights, materialize, model_class
from minitrain.models.layers import CausalLM
from minitrain.models.llama import LlamaForCausalLM
from minitrain.models.qwen3 import Qwen3ForCausalLM
from minitrain.storage import open_safetensors


@pytest.fixture
def folder(tmp_path):
    """A tiny Qwen3 as transformers saves it."""
    hub_model("qwen3").save_pretrained(tmp_path / "qwen3")
    return tmp_path / "qwen3"


def refused(what, call, *args, **options):
    """call(...) raises a UserError of one line that matches each of `what`."""
    with pytest.raises(UserError) as error:
        call(*args, **options)
    text = str(error.value)
    assert "\n" not in text and len(text) < 1000, text
    for piece in [what] if isinstance(what, str) else what:
        assert piece in text, text


def edit_config(folder, drop=(), **changes):
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in config.items() if k not in drop}))


def edit_weights(folder, change):
    path = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path, {"format": "pt"})


def load_with_transformers(folder, **options):
    """The model, after a look that nothing was missing, unexpected or of another shape."""
    options = {"dtype": "auto", "attn_implementation": "eager", **options}
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(report.values()), report
    return model


def tiny(type, dtype=torch.float32, **settings):
    experts = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24} if type == "qwen3_moe" else {}
    model = build_model(model_class(type).config_class(**{"type": type, **TINY, **experts, **settings}))
    materialize(model, "cpu", dtype)
    init_weights(model, 0)
    return model


# ---- there and back


@pytest.mark.parametrize("shard_bytes", [None, 20_000])
@pytest.mark.parametrize("case", CASES)
def test_what_we_save_transformers_loads_bit_for_bit(case, shard_bytes, tmp_path, monkeypatch):
    theirs = hub_model(case)
    theirs.save_pretrained(tmp_path / "theirs")
    if shard_bytes:
        monkeypatch.setattr(hf, "_SHARD_BYTES", shard_bytes)
    save_pretrained(from_pretrained(tmp_path / "theirs"), tmp_path / "ours")
    files = sorted(p.name for p in (tmp_path / "ours").glob("*.safetensors"))
    assert (len(files) > 2 and files[0].startswith("model-00001-of-")) if shard_bytes else len(files) == 1
    assert (tmp_path / "ours" / "model.safetensors.index.json").exists() == bool(shard_bytes)

    again = load_with_transformers(tmp_path / "ours")
    assert type(again) is type(theirs)
    wanted, got = theirs.state_dict(), again.state_dict()
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    tokens = torch.randint(0, 101, (2, 80))
    assert torch.equal(again(tokens).logits, theirs(tokens).logits)


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("type", ["qwen3", "qwen3_moe", "llama", "qwen2"])
def test_a_fresh_model_in_bfloat16_survives_both_libraries(type, tie, tmp_path):
    settings = {"rope_scaling": LLAMA3_ROPE} if type == "llama" else {}
    model = tiny(type, torch.bfloat16, tie_word_embeddings=tie, rope_theta=12_345.0, **settings)
    save_pretrained(model, tmp_path / "ours")
    theirs = load_with_transformers(tmp_path / "ours")
    assert theirs.dtype == AutoConfig.from_pretrained(tmp_path / "ours").dtype == torch.bfloat16
    assert type_and_bits(from_pretrained(tmp_path / "ours")) == type_and_bits(model)
    assert theirs.config.tie_word_embeddings is tie
    assert theirs.config.rope_parameters["rope_theta"] == 12_345.0
    theirs.save_pretrained(tmp_path / "theirs")
    back = from_pretrained(tmp_path / "theirs")
    assert type_and_bits(back) == type_and_bits(model)
    assert (back.lm_head.weight is back.embed_tokens.weight) is tie


def type_and_bits(model):
    return type(model), {n: (p.dtype, p.view(torch.int16).tolist()) for n, p in model.named_parameters()}


def test_sharded_files_of_transformers_load(tmp_path):
    for case in ("qwen3_moe", "qwen3_tied"):
        theirs = hub_model(case)
        theirs.save_pretrained(tmp_path / case, max_shard_size="20KB")
        assert len(list((tmp_path / case).glob("*.safetensors"))) > 2
        tokens = torch.randint(0, 101, (30,))
        ours = from_pretrained(tmp_path / case).logits(tokens)
        assert (ours - theirs(tokens[None]).logits[0]).abs().max() < 1e-5


def test_dtype_is_that_of_the_config_or_the_one_asked_for(folder):
    assert from_pretrained(folder).norm.weight.dtype == torch.float32
    edit_config(folder, dtype="bfloat16")
    assert from_pretrained(folder).norm.weight.dtype == torch.bfloat16
    edit_config(folder, drop=["dtype"], torch_dtype="float16")
    assert from_pretrained(folder).norm.weight.dtype == torch.float16
    assert from_pretrained(folder, dtype=torch.float32).norm.weight.dtype == torch.float32


def test_a_tied_head_that_was_stored_twice_is_read_once(tmp_path):
    hub_model("qwen3_tied").save_pretrained(tmp_path)
    edit_weights(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    model = from_pretrained(tmp_path)
    assert model.lm_head.weight is model.embed_tokens.weight


def test_rotary_buffers_of_old_files_are_passed_over(folder):
    edit_weights(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    from_pretrained(folder)


def test_host_memory_is_the_model_and_about_one_tensor(tmp_path):
    save_pretrained(tiny("qwen3", hidden_size=64, vocab_size=50, num_hidden_layers=6), tmp_path / "model")
    with LiveBytes() as memory:
        model = from_pretrained(tmp_path / "model")
    sizes = sorted(p.nbytes for p in model.parameters())
    assert sum(sizes) > 20 * sizes[-1]
    assert sum(sizes) <= memory.peak <= sum(sizes) + 2 * sizes[-1]
    with LiveBytes() as memory:
        save_pretrained(model, tmp_path / "again")
    assert memory.peak <= sizes[-1]


# ---- what comes along


def write_tokenizer(folder):
    folder.mkdir(parents=True, exist_ok=True)
    Tokenizer(models.WordLevel({"a": 0, "<end>": 1}, unk_token="a")).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": {"content": "<end>"}}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def test_tokenizer_files_and_token_ids_come_along(folder, tmp_path):
    write_tokenizer(folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 8], "temperature": 0.6}')
    edit_config(folder, eos_token_id=7, bos_token_id=5, pad_token_id=6)
    save_pretrained(from_pretrained(folder), tmp_path / "out", tokenizer=folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert (config.eos_token_id, config.bos_token_id, config.pad_token_id) == (7, 5, 6)
    assert load_with_transformers(tmp_path / "out").generation_config.eos_token_id == [7, 8]
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()


def test_end_of_text_comes_from_a_tokenizer_without_a_model(tmp_path):
    write_tokenizer(tmp_path / "tokenizer")
    save_pretrained(tiny("qwen3"), tmp_path / "out", tokenizer=tmp_path / "tokenizer")
    model = load_with_transformers(tmp_path / "out")
    assert model.config.eos_token_id == model.generation_config.eos_token_id == 1


@pytest.mark.parametrize("source", ["qwen3", "qwen3_moe", "llama3_rope"])
def test_the_shape_of_the_tokenizers_model_does_not_come_along(source, tmp_path):
    hub_model(source, num_hidden_layers=3, eos_token_id=9).save_pretrained(tmp_path / "source")
    write_tokenizer(tmp_path / "source")
    edit_config(tmp_path / "source", quantization_config={"quant_method": "fp8"}, max_window_layers=1)
    model = tiny("qwen3_moe" if source == "qwen3_moe" else "qwen3")
    save_pretrained(model, tmp_path / "out", tokenizer=tmp_path / "source")
    theirs = load_with_transformers(tmp_path / "out")
    assert theirs.config.eos_token_id == 9
    tokens = torch.randint(0, 101, (30,))
    assert (theirs(tokens[None]).logits[0] - model.logits(tokens)).abs().max() < 1e-5


# ---- config.json


@pytest.mark.parametrize("case", ["qwen3", "llama3_rope"])
def test_both_dialects_of_config_json_say_the_same(case, tmp_path):
    hub_model(case, rope_theta=7e4).save_pretrained(tmp_path)
    new = read_config(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert "rope_parameters" in raw and "dtype" in raw and "rope_theta" not in raw  # what transformers 5 writes
    rope = raw["rope_parameters"]
    old = {k: v for k, v in rope.items() if k != "rope_theta"} if case == "llama3_rope" else None
    edit_config(tmp_path, drop=["rope_parameters", "dtype"], rope_theta=7e4, rope_scaling=old, torch_dtype="float32")
    assert read_config(tmp_path) == new
    assert new.rope_theta == 7e4 and new.rope_scaling == old
    ours = from_pretrained(tmp_path)
    tokens = torch.randint(0, 101, (80,))
    assert (ours.logits(tokens) - load_with_transformers(tmp_path)(tokens[None]).logits[0]).abs().max() < 1e-5
    if old:
        edit_config(tmp_path, rope_scaling={**{k: v for k, v in old.items() if k != "rope_type"}, "type": "llama3"})
        assert torch.equal(from_pretrained(tmp_path).logits(tokens), ours.logits(tokens))


def test_a_number_of_tokens_that_toml_made_a_float_is_exported_as_an_int():
    cfg = load_config(ROOT / "configs" / "llama3_8b.toml", ["--model.num_hidden_layers=1"], default_config)
    assert type(cfg.model.rope_scaling["original_max_position_embeddings"]) is float
    rope = hub_config(build_model(cfg.model))["rope_scaling"]
    assert rope == cfg.model.rope_scaling and type(rope["original_max_position_embeddings"]) is int


def test_absent_keys_mean_what_they_mean_to_transformers(tmp_path):
    hub_model("llama").save_pretrained(tmp_path)
    wanted = read_config(tmp_path)
    drop = ["num_key_value_heads", "head_dim", "tie_word_embeddings", "rope_parameters", "initializer_range",
            "attention_bias", "hidden_act", "mlp_bias", "attention_dropout"]  # fmt: skip
    edit_config(tmp_path, drop=drop)
    assert read_config(tmp_path) == wanted
    tokens = torch.randint(0, 101, (30,))
    theirs = load_with_transformers(tmp_path)(tokens[None]).logits[0]
    assert (from_pretrained(tmp_path).logits(tokens) - theirs).abs().max() < 1e-5


def test_number_of_experts_is_read_under_both_of_its_names(tmp_path):
    hub_model("qwen3_moe").save_pretrained(tmp_path)
    wanted = read_config(tmp_path)
    edit_config(tmp_path, drop=["num_local_experts"], num_experts=6)
    assert read_config(tmp_path) == wanted and wanted.num_experts == 6


def test_a_run_takes_its_sizes_from_the_pretrained_folder(folder):
    cfg = default_config("", str(folder))
    assert (cfg.type, cfg.hidden_size, cfg.pretrained) == ("qwen3", 32, str(folder))
    refused(["model.type='llama'", "holds a 'qwen3'"], default_config, "llama", str(folder))


@pytest.mark.parametrize(
    "setting",
    [
        {"hidden_act": "gelu"},
        {"attention_dropout": 0.1},
        {"mlp_bias": True},
        {"use_sliding_window": True},
        {"decoder_sparse_step": 2},
        {"mlp_only_layers": [0]},
        {"is_causal": False},
    ],
    ids=lambda s: next(iter(s)),
)
def test_a_setting_that_is_not_supported_is_refused(folder, setting):
    edit_config(folder, **setting)
    ((key, value),) = setting.items()
    refused([str(folder / "config.json"), f"not supported: {key}={value}"], from_pretrained, folder)


def test_rope_in_both_dialects_is_read_as_transformers_does(folder):
    """The base may stand outside, and the older dialect's scaling goes first."""
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    llama3["original_max_position_embeddings"] = 64
    edit_config(folder, rope_theta=5e3, rope_parameters={"rope_type": "default"})
    assert read_config(folder).rope_theta == 5e3
    edit_config(folder, rope_theta=5e3, rope_parameters=llama3)
    assert read_config(folder).rope_theta == 5e3 and read_config(folder).rope_scaling == llama3
    edit_config(folder, rope_scaling=llama3, rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    assert read_config(folder).rope_scaling == llama3
    theirs = AutoConfig.from_pretrained(folder)
    assert theirs.rope_parameters["rope_type"] == "llama3" and theirs.rope_parameters["rope_theta"] == 5e3
    assert read_config(folder).rope_theta == 5e3


@pytest.mark.parametrize("rope", [{"rope_type": "yarn", "factor": 4.0}, {"type": "dynamic", "factor": 2.0}])
def test_rope_of_another_kind_is_refused_in_both_dialects(folder, rope):
    edit_config(folder, rope_parameters={**rope, "rope_theta": 1e4})
    refused([str(folder / "config.json"), "only rope_type llama3"], from_pretrained, folder)
    edit_config(folder, drop=["rope_parameters"], rope_scaling=rope, rope_theta=1e4)
    refused([str(folder / "config.json"), "only rope_type llama3"], from_pretrained, folder)


@pytest.mark.parametrize(
    ("changes", "drop", "what"),
    [
        ({"model_type": "gpt2"}, (), "model_type='gpt2' is unknown; there are qwen3,"),
        ({}, ["model_type"], "model_type=None is unknown"),
        ({}, ["hidden_size", "vocab_size"], "lacks vocab_size, hidden_size"),
        ({"num_key_value_heads": 3}, (), "num_key_value_heads=3"),
        ({"head_dim": 15}, (), "head_dim=15"),
        ({"hidden_size": "32"}, (), "hidden_size='32' is no int"),
        ({"num_attention_heads": 4.5}, (), "num_attention_heads=4.5 is no int"),
        ({"head_dim": True}, (), "head_dim=True is no int"),
        ({"rms_norm_eps": [1]}, (), "rms_norm_eps=[1] is no float"),
        ({"tie_word_embeddings": "no"}, (), "tie_word_embeddings='no' is no bool"),
        ({"rope_theta": "abc"}, ("rope_parameters",), "rope_theta='abc' is no float"),
        ({"rope_scaling": "abc"}, ("rope_parameters",), "rope_scaling='abc' is no JSON object"),
        ({"rope_parameters": 3}, (), "rope_parameters=3 is no JSON object"),
        ({"dtype": "int8"}, (), "dtype='int8'"),
        ({"dtype": "save"}, (), "dtype='save'"),
        ({"model_type": "this:Model"}, (), "a class of your own loads by its from_pretrained"),
        ({"model_type": ["qwen3"]}, (), "config.json"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(folder, changes, drop, what):
    edit_config(folder, drop, **changes)
    refused([str(folder / "config.json"), what], from_pretrained, folder)


class OwnModel(Qwen3ForCausalLM):
    """What somebody may keep in a module of their own."""


def test_a_class_of_ones_own_is_imported_only_when_the_caller_names_it(tmp_path):
    own = f"{OwnModel.__module__}:{OwnModel.__name__}"
    save_pretrained(tiny(own), tmp_path / "own")
    assert type(OwnModel.from_pretrained(tmp_path / "own")) is OwnModel
    assert default_config(own, str(tmp_path / "own")).type == own
    refused(f"model_type={own!r}", from_pretrained, tmp_path / "own")
    edit_config(tmp_path / "own", model_type="this:Model")  # importing `this` prints a poem
    refused("model_type='this:Model'", OwnModel.from_pretrained, tmp_path / "own")
    assert "this" not in sys.modules


def test_a_config_that_is_no_json_object_is_refused(folder):
    path = folder / "config.json"
    for text in ("{", "[]", "\xff", "null", "[" * 100_000):
        path.write_text(text, encoding="latin-1")
        refused(str(path), from_pretrained, folder)
    path.unlink()
    refused([str(path), "no such file"], from_pretrained, folder)


# ---- weights that do not fit


def test_a_missing_tensor_is_named(folder):
    edit_weights(folder, lambda t: t.pop("model.norm.weight"))
    refused([str(folder), "lacks model.norm.weight"], from_pretrained, folder)


def test_an_extra_tensor_is_named(folder):
    edit_weights(folder, lambda t: t.update({"model.layers.0.self_attn.q_proj.lora_A": torch.ones(2)}))
    refused(["the model has not: model.layers.0.self_attn.q_proj.lora_A"], from_pretrained, folder)


def test_an_untied_head_is_not_invented(folder):
    edit_weights(folder, lambda t: t.pop("lm_head.weight"))
    refused("lacks lm_head.weight", from_pretrained, folder)


def test_a_renamed_tensor_is_named_with_the_nearest_name(folder):
    edit_weights(folder, lambda t: t.update({"model.final_norm.weight": t.pop("model.norm.weight")}))
    refused("lacks model.norm.weight (there is model.final_norm.weight)", from_pretrained, folder)


def test_a_long_list_of_names_is_cut(folder):
    edit_weights(folder, lambda t: [t.pop(name) for name in list(t)[1:]])
    refused(["lacks ", " and 14 more"], from_pretrained, folder)


@pytest.mark.parametrize("shape", [(33,), (1,), (32, 1), ()])
def test_a_tensor_of_another_shape_is_refused_never_broadcast(folder, shape):
    edit_weights(folder, lambda t: t.update({"model.norm.weight": torch.ones(shape)}))
    refused(["model.norm.weight", f"shape {shape}", "(32,)"], from_pretrained, folder)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool, torch.int8])
def test_a_tensor_of_integers_is_refused(folder, dtype):
    edit_weights(folder, lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=dtype)}))
    refused(["model.norm.weight", str(dtype), "not a floating-point"], from_pretrained, folder)


def test_a_truncated_file_is_refused(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for size in (0, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        refused(str(path), from_pretrained, folder)
    path.write_bytes(whole + b"\0")
    refused(str(path), from_pretrained, folder)


@pytest.mark.parametrize(
    "content",
    [
        b"garbage, and no header at all " * 10,
        (1 << 40).to_bytes(8, "little") + b"{}",
        (3).to_bytes(8, "little") + b"{}",
        (1 << 63).to_bytes(8, "little") + b"{}" * 50,
        (2).to_bytes(8, "little") + b"[]",
        (1).to_bytes(8, "little") + b"{",
        b"PK\x03\x04" + bytes(200),
    ],
    ids=["garbage", "huge header", "header past the end", "negative", "no object", "no json", "zip"],
)
def test_a_file_that_is_no_safetensors_is_refused(folder, content):
    path = folder / "model.safetensors"
    path.write_bytes(content)
    refused(str(path), from_pretrained, folder)


def test_a_folder_of_pickles_is_refused_with_the_way_out(folder):
    (folder / "model.safetensors").unlink()
    refused("has neither model.safetensors nor model.safetensors.index.json", from_pretrained, folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    refused(["pytorch_model.bin is a pickle file", "save_pretrained"], from_pretrained, folder)


# ---- the index of a sharded model


@pytest.fixture
def sharded(tmp_path):
    hub_model("qwen3").save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    return tmp_path / "sharded"


def edit_index(folder, **weight_map):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] |= weight_map
    path.write_text(json.dumps(index))
    return path, index["weight_map"]


@pytest.mark.parametrize(
    "target", ["../{}", "{folder}/{}", "sub/../{}", 7, None, ["{}"], "", ".", "..", "{}/", "config.json", "a\0{}"]
)
def test_an_index_that_points_out_of_the_folder_is_refused(sharded, target):
    _, places = edit_index(sharded)
    name = "model.norm.weight"
    shutil.copy(sharded / places[name], sharded.parent / places[name])  # it would be found
    if isinstance(target, str):
        target = target.replace("{folder}", str(sharded)).replace("{}", places[name])
    path, _ = edit_index(sharded, **{name: target})
    refused([str(path), name, "no safetensors file in this folder"], from_pretrained, sharded)


def test_each_file_is_opened_once(sharded, monkeypatch):
    opened = []
    monkeypatch.setattr(hf, "open_safetensors", lambda path: opened.append(path) or open_safetensors(path))
    from_pretrained(sharded)
    assert sorted(opened) == sorted(sharded.glob("*.safetensors"))


def test_an_index_that_is_not_true_is_refused(sharded):
    _, places = edit_index(sharded)
    name = "model.norm.weight"
    other = next(file for file in places.values() if file != places[name])
    path, _ = edit_index(sharded, **{name: other})
    refused([str(path), f"{name} is not in {other}"], from_pretrained, sharded)
    edit_index(sharded, **{name: places[name], "model.extra": other})
    refused([str(path), f"model.extra is not in {other}"], from_pretrained, sharded)
    edit_index(sharded, **{"model.extra": "model-00099-of-00099.safetensors"})
    refused("model-00099-of-00099.safetensors", from_pretrained, sharded)
    for text in ("{}", "[]", '{"weight_map": []}', '{"weight_map": {}}', "{"):
        path.write_text(text)
        refused("sharded", from_pretrained, sharded)


# ---- where from and where to


def test_a_class_refuses_another_architecture(folder):
    assert type(Qwen3ForCausalLM.from_pretrained(folder)) is Qwen3ForCausalLM
    assert type(CausalLM.from_pretrained(str(folder))) is Qwen3ForCausalLM
    refused([str(folder), "a Qwen3ForCausalLM, not a LlamaForCausalLM"], LlamaForCausalLM.from_pretrained, folder)


@pytest.mark.parametrize("name", ["nobody/no-such-model", "../no-such-model"])
def test_a_hub_id_without_network_says_which_files_to_put_where(name):
    wanted = [name, "config.json", "*.safetensors", "tokenizer.json", "in a folder and give its path"]
    refused(wanted, from_pretrained, name)


@pytest.mark.parametrize("name", ["no-such-folder", "/no/such/folder", "", "a/b/c", "https://example.com/model"])
def test_a_folder_that_is_not_there_is_named(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused("no such", from_pretrained, name)


def test_saving_needs_leave_to_overwrite(folder, tmp_path):
    model = from_pretrained(folder)
    out = tmp_path / "out"
    save_pretrained(model, out)
    (out / "old").write_text("")
    refused([str(out), "exists already", "overwrite"], save_pretrained, model, out)
    assert (out / "old").exists()
    with torch.no_grad():
        model.norm.weight.fill_(3)
    save_pretrained(model, out, overwrite=True)
    assert not (out / "old").exists()
    assert (from_pretrained(out).norm.weight == 3).all()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "qwen3"]


def test_a_save_that_fails_leaves_the_old_folder(folder, tmp_path, monkeypatch):
    write_tokenizer(folder)
    model = from_pretrained(folder)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hf, "write_safetensors", full)
    with pytest.raises(OSError, match="No space left"):
        save_pretrained(model, folder, tokenizer=folder, overwrite=True)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["qwen3"]


def test_a_folder_that_holds_no_model_is_never_replaced(folder, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("dear diary")
    refused(["notes", "no config.json"], save_pretrained, from_pretrained(folder), tmp_path / "notes", overwrite=True)
    assert (tmp_path / "notes" / "diary.txt").exists()


def test_a_tokenizer_that_is_not_there_is_named(folder, tmp_path):
    for tokenizer, words in [("no/such/tokenizer/folder", "no such folder"), (tmp_path, "no tokenizer.json")]:
        refused(
            [str(tokenizer), words], save_pretrained, from_pretrained(folder), tmp_path / "out", tokenizer=tokenizer
        )


def test_the_tokenizer_of_the_loaded_folder_goes_along_by_itself(folder, tmp_path):
    write_tokenizer(folder)
    save_pretrained(from_pretrained(folder), tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_a_folder_can_be_saved_over_itself(folder):
    write_tokenizer(folder)
    tokenizer = (folder / "tokenizer.json").read_bytes()
    model = from_pretrained(folder)
    save_pretrained(model, folder, tokenizer=folder, overwrite=True)
    assert (folder / "tokenizer.json").read_bytes() == tokenizer
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), from_pretrained(folder).parameters(), strict=True))
