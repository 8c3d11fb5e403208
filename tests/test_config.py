"""Settings: the shipped files, one grammar for file and flags, and the way back to TOML."""

import ast
import dataclasses
import inspect
import sys
import textwrap
import tomllib
from pathlib import Path

import pytest
import tyro
from conftest import TINY

from minitrain import Config, LlamaConfig, Qwen3Config, Qwen3MoeConfig, build_model, save_pretrained
from minitrain.config import (
    CheckpointConfig,
    DataConfig,
    OptimConfig,
    ParallelConfig,
    SourceConfig,
    TrainConfig,
    UserError,
    load_config,
    to_toml,
)
from minitrain.hf import default_config
from minitrain.models import init_weights
from minitrain.models.layers import DecoderConfig

SHIPPED = sorted((Path(__file__).parents[1] / "configs").glob("*.toml"))


def load(text="", *flags, tmp_path):
    (tmp_path / "c.toml").write_text(text)
    return load_config(tmp_path / "c.toml", list(flags), default_config)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_config_loads_and_means_what_it_says(path):
    cfg = load_config(path, [], default_config)
    for section, value in tomllib.loads(path.read_text()).items():
        for key, wanted in value.items() if isinstance(value, dict) else []:
            assert dataclasses.asdict(getattr(cfg, section))[key] == wanted, f"{section}.{key}"
    if not cfg.model.pretrained:
        build_model(cfg.model)  # on meta: the sizes fit together


def test_configs_are_shipped():
    assert len(SHIPPED) >= 3


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path):
    text = 'run_dir = "a"\n[train]\nsteps = 7\n[optim]\nlr = 1e-3\nschedule = "linear"\n'
    cfg = load(text, "--train.steps", "9", "--optim.lr=2e-3", tmp_path=tmp_path)
    assert (cfg.train.steps, cfg.optim.lr, cfg.optim.schedule, cfg.run_dir) == (9, 2e-3, "linear", "a")
    assert cfg.optim.beta2 == OptimConfig().beta2


@pytest.mark.parametrize(
    "flags",
    [
        ["--checkpoint.export", "false", "--train.sample", "a b", "--data.seed", "-3"],
        ["--checkpoint.export=false", "--train.sample=a b", "--data.seed=-3"],
        ["--checkpoint.export=False", "--train.sample=x", "--train.sample=a b", "--data.seed", "-3"],
    ],
)
def test_flags_may_be_written_with_a_blank_or_an_equals_sign(flags, tmp_path):
    cfg = load("[checkpoint]\nexport = true", *flags, tmp_path=tmp_path)
    assert (cfg.checkpoint.export, cfg.train.sample, cfg.data.seed) == (False, "a b", -3)


def test_what_tyro_complains_of_is_said_also_in_a_layout_of_another_version(tmp_path, monkeypatch):
    def cli(*args, **options):
        print("steps: no number", file=sys.stderr)
        sys.exit(2)

    monkeypatch.setattr(tyro, "cli", cli)
    with pytest.raises(UserError, match=r"^steps: no number$"):
        load("", tmp_path=tmp_path)


SOURCES = '[[data.sources]]\npath = "web"\nweight = 3\n[[data.sources]]\npath = "a b"\n'


def test_sources_are_a_list_of_tables_and_flags_by_number(tmp_path):
    expected = [SourceConfig("web", 3.0), SourceConfig("a b", 1.0)]
    assert load(SOURCES, tmp_path=tmp_path).data.sources == expected
    flags = ["--data.sources.0.path", "web", "--data.sources.0.weight=3", "--data.sources.1.path=a b"]
    assert load("", *flags, tmp_path=tmp_path).data.sources == expected
    changed = load(SOURCES, "--data.sources.1.weight=0.5", "--data.seed=3", tmp_path=tmp_path).data
    assert changed.sources == [SourceConfig("web", 3.0), SourceConfig("a b", 0.5)] and changed.seed == 3


@pytest.mark.parametrize(
    "text, complaint",
    [
        ('[[data.sources]]\npaht = "a"', "data.sources.0.paht: no such setting; did you mean data.sources.0.path?"),
        ('[[data.source]]\npath = "a"', "data.source.0.path: no such setting"),
        ('[data.sources]\npath = "a"', r"data.sources={'path': 'a'}: must be tables \[\[data.sources\]\]"),
        ("[data]\nsources = [1]", r"data.sources=\[1\]: must be tables \[\[data.sources\]\] with path and weight"),
        ('[data]\nsources = "abc"', r"c.toml: data.sources='abc': must be tables \[\[data.sources\]\]"),
        ('[data]\nsources = ""', "data.sources='': must be tables"),
        ('[[data.sources]]\nweight = "much"', "--data.sources.0.weight: .*'much'"),
        (SOURCES + "weight = -1", "data.sources.1.weight=-1.0: must be a number, at least 0"),
        (SOURCES + "weight = nan", "data.sources.1.weight=nan: must be a number, at least 0"),
        ("[[data.sources]]\nweight = 0", "data.sources: all weights are 0"),
        ('data.path = "b"\n' + SOURCES, "data.path=b and data.sources: give one of them"),
        ("[data]\nlook_ahead = 0", "data.look_ahead=0: must be at least 1"),
    ],
)
def test_wrong_sources_are_one_line(text, complaint, tmp_path):
    with pytest.raises(UserError, match=complaint) as error:
        load(text, tmp_path=tmp_path)
    assert "\n" not in str(error.value)


def test_no_sources_may_be_said(tmp_path):
    assert load("data.sources = []", tmp_path=tmp_path).data.sources == []
    with pytest.raises(UserError, match=r"data\.source: no such setting"):
        load("data.source = []", tmp_path=tmp_path)


@pytest.mark.parametrize("text", ["--", "-x", "- a list", "--train.steps", "a=b", "", 'a "quoted" \\ line\n\tand more'])
def test_text_settings_hold_any_text(text, tmp_path):
    assert load(f"train.sample = {_toml(text)}", tmp_path=tmp_path).train.sample == text
    assert load("", f"--train.sample={text}", tmp_path=tmp_path).train.sample == text


def _toml(text):
    return to_toml(Config(Qwen3Config(), train=TrainConfig(sample=text))).split("sample = ")[1].splitlines()[0]


def test_the_architecture_decides_which_settings_there_are(tmp_path):
    text = "[model]\nnum_experts = 16"
    assert load(text, "--model.type=qwen3_moe", tmp_path=tmp_path).model == Qwen3MoeConfig(num_experts=16)
    with pytest.raises(UserError, match="num_experts: no such setting"):
        load(text, "--model.type=llama", tmp_path=tmp_path)
    text = '[model]\ntype = "qwen3_moe"\n'
    assert load(text, "--model.type", "llama", tmp_path=tmp_path).model == LlamaConfig()


@pytest.mark.parametrize("name", ["router_aux_loss_coef", "router_z_loss_coef"])
@pytest.mark.parametrize("value", ["inf", "nan", "-1.0"])
def test_weights_of_router_losses_are_numbers(name, value, tmp_path):
    with pytest.raises(UserError, match=f"{name}={value}: must be at least 0 and finite"):
        load('[model]\ntype = "qwen3_moe"', f"--model.{name}={value}", tmp_path=tmp_path)


def test_a_pretrained_folder_gives_the_sizes_and_settings_change_the_rest(tmp_path):
    model = build_model(Qwen3Config(**TINY), "cpu")
    init_weights(model, seed=0)
    save_pretrained(model, tmp_path / "export")
    text = f'[model]\npretrained = "{tmp_path / "export"}"\nrms_norm_eps = 1e-4'
    expected = Qwen3Config(**TINY, pretrained=str(tmp_path / "export"), rms_norm_eps=1e-4)
    assert load(text, tmp_path=tmp_path).model == expected


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192.0,
}


@pytest.mark.parametrize(
    "cfg",
    [
        Config(Qwen3Config()),
        Config(Qwen3MoeConfig(**TINY, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2)),
        Config(LlamaConfig(rope_scaling=LLAMA3), DataConfig(max_seqlen=4096)),
        Config(
            Qwen3Config(head_dim=None, hidden_size=64, num_attention_heads=4, num_key_value_heads=2),
            DataConfig(path="a folder/with 'quotes' \"of\" all\\kinds", seed=-1),
            OptimConfig(lr=1e-7, max_norm=float("inf"), schedule="wsd", decay_steps=3, eps=1e-20),
            TrainConfig(sample="tab\t line\n ünï 🚀 \x7f \x00", compile="off"),
            ParallelConfig(zero=3, shard_within=8, offload="optimizer"),
            CheckpointConfig(export=False, resume=False),
            run_dir="runs/é",
        ),
        Config(Qwen3Config(), DataConfig(sources=[SourceConfig("a"), SourceConfig('"b" c', 0.0)], packing="best_fit")),
    ],
    ids=["defaults", "moe", "rope_scaling", "odd", "sources"],
)
def test_toml_round_trip(cfg, tmp_path):
    text = to_toml(cfg)
    back = load(text, tmp_path=tmp_path)
    assert dataclasses.asdict(back) == dataclasses.asdict(cfg)
    assert to_toml(back) == text


def test_a_mistake_is_said_in_one_line_whatever_a_file_has_for_names():
    assert str(UserError("of another model: it has a\nb")) == r"of another model: it has a\nb"


def test_every_setting_has_a_sentence_a_type_and_a_default():
    """The sentence is the string below the field; --help is made of them."""
    sections = SourceConfig, DataConfig, OptimConfig, TrainConfig, ParallelConfig, CheckpointConfig, DecoderConfig
    for section in sections:
        body = ast.parse(textwrap.dedent(inspect.getsource(section))).body[0].body
        for field, below in zip(body, [*body[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign):
                where = f"{section.__name__}.{field.target.id}"
                sentence = below.value.value if isinstance(below, ast.Expr) else ""
                assert len(sentence) > 10 and sentence.endswith("."), where
                assert field.value is not None or where == "DecoderConfig.type"
