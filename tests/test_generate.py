"""Generation: the tokens that transformers generates, the cache, sampling, and attention functions put back."""

import sys
from collections import Counter

import pytest
import torch
import transformers
from conftest import TINY
from torch import nn

from minitrain import generate
from minitrain.attention import attention
from minitrain.generate import _sample
from minitrain.hf import from_pretrained
from minitrain.models import build_model, init_weights
from minitrain.models.layers import Attention
from minitrain.models.qwen3 import Qwen3Config
from minitrain.models.qwen3_moe import Qwen3MoeConfig

COMMON = {"initializer_range": 0.3, "eos_token_id": None, "pad_token_id": 0, "bos_token_id": None}
MOE = {"moe_intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 2}
HF = {
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**TINY, **COMMON)),
    "qwen3_moe": lambda: transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**TINY, **COMMON, **MOE)),
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY, **COMMON)),
}
PROMPT = torch.tensor([5, 17, 3, 99, 42])


def tiny(config_class=Qwen3Config, **options):
    """Weights large enough that the likeliest tokens are far apart."""
    model = build_model(config_class(**{**TINY, "initializer_range": 0.3, **options}), "cpu")
    init_weights(model, 0)
    return model


def seams(model):
    return [m for m in model.modules() if hasattr(m, "attention")]


# ---- the right tokens


@pytest.mark.parametrize("kind", HF)
def test_greedy_tokens_are_those_of_transformers(tmp_path, kind):
    theirs = HF[kind]().eval()
    theirs.save_pretrained(tmp_path)
    ours = from_pretrained(tmp_path)
    for prompt in (PROMPT, PROMPT[:1]):
        options = {"max_new_tokens": 30, "do_sample": False}
        [expected] = theirs.generate(prompt[None], attention_mask=torch.ones_like(prompt[None]), **options)
        assert len(set(expected.tolist())) > 6  # not one token over and over
        assert generate(ours, prompt, 30, temperature=0).equal(expected)


@pytest.mark.parametrize("config_class, options", [(Qwen3Config, {}), (Qwen3MoeConfig, MOE)], ids=["dense", "moe"])
def test_the_cache_gives_what_the_whole_text_gives(monkeypatch, config_class, options):
    model, seen = tiny(config_class, **options), []

    def keep(logits, *rest):
        seen.append(logits)
        return _sample(logits, *rest)

    monkeypatch.setattr(sys.modules["minitrain.generate"], "_sample", keep)
    tokens = generate(model, PROMPT, 12, temperature=0)
    assert len(tokens) == 17 and len(seen) == 12
    with torch.no_grad():
        whole = model.logits(tokens)
    torch.testing.assert_close(torch.stack(seen), whole[4:-1], rtol=1e-4, atol=1e-5)
    assert tokens[5:].equal(whole[4:-1].argmax(-1))


def test_only_the_new_token_is_computed(monkeypatch):
    model, lengths = tiny(), []
    model.embed_tokens.register_forward_hook(lambda module, args, out: lengths.append(len(out)))
    generate(model, PROMPT, 4)
    assert lengths == [5, 1, 1, 1]


def test_the_prompt_comes_first_and_the_length_is_as_asked():
    for n in (0, 1, 7):
        tokens = generate(tiny(), PROMPT, n)
        assert tokens[:5].equal(PROMPT) and len(tokens) == 5 + n and tokens.dtype == torch.int64


def test_it_stops_after_the_end_token():
    model = tiny()
    free = generate(model, PROMPT, 20, temperature=0)
    end = int(free[9])
    first = free[5:].tolist().index(end)
    assert generate(model, PROMPT, 20, temperature=0, eos_token_id=end).equal(free[: 5 + first + 1])
    absent = next(t for t in range(101) if t not in free)
    assert generate(model, PROMPT, 20, temperature=0, eos_token_id=absent).equal(free)
    assert len(generate(model, PROMPT, 20, temperature=0, eos_token_id=[absent, end])) == 5 + first + 1
    again = torch.cat([PROMPT, torch.tensor([end])])  # in the prompt it ends nothing
    assert len(generate(model, again, 1, eos_token_id=end)) == 7


# ---- sampling

PROBS = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15])  # in order: 1, 3, 4, 0, 2


def drawn(n=2000, temperature=1.0, top_k=None, top_p=None):
    """How often each token comes, as a share of n draws."""
    generator = torch.Generator().manual_seed(0)
    counts = Counter(int(_sample(PROBS.log(), temperature, top_k, top_p, generator)) for _ in range(n))
    return {token: count / n for token, count in counts.items()}


@pytest.mark.parametrize(
    "options, allowed",
    [
        ({}, {0, 1, 2, 3, 4}),
        ({"top_k": 1}, {1}),
        ({"top_k": 2}, {1, 3}),
        ({"top_k": 4}, {1, 3, 4, 0}),
        ({"top_k": 1000}, {0, 1, 2, 3, 4}),
        ({"top_p": 0.01}, {1}),
        ({"top_p": 0.39}, {1}),
        ({"top_p": 0.41}, {1, 3}),
        ({"top_p": 0.71}, {1, 3, 4}),
        ({"top_p": 0.96}, {0, 1, 2, 3, 4}),
        ({"top_p": 1.0}, {0, 1, 2, 3, 4}),
        ({"top_k": 3, "top_p": 0.5}, {1, 3}),  # 0.4 / 0.85 is less than a half
        ({"top_k": 3, "top_p": 0.45}, {1}),  # 0.4 / 0.85 is more than 0.45
        ({"temperature": 0}, {1}),
    ],
)
def test_tokens_come_from_the_right_set_in_the_right_proportions(options, allowed):
    shares = drawn(**options)
    assert shares.keys() == allowed
    total = sum(PROBS[t] for t in allowed)
    for token, share in shares.items():
        assert share == pytest.approx(float(PROBS[token] / total), abs=0.04)  # 4 standard deviations


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_divides_the_logits(temperature):
    expected = (PROBS.log() / temperature).softmax(-1)
    for token, share in drawn(temperature=temperature).items():
        assert share == pytest.approx(float(expected[token]), abs=0.04)


def test_top_p_adds_whole_numbers_up_for_which_a_gpu_has_a_deterministic_algorithm(monkeypatch):
    cumsum, seen = torch.Tensor.cumsum, []
    monkeypatch.setattr(torch.Tensor, "cumsum", lambda x, dim: seen.append(x.dtype) or cumsum(x, dim))
    drawn(n=1, top_p=0.5)
    assert seen == [torch.int64]


def test_the_same_seed_gives_the_same_tokens():
    model = tiny()
    first = generate(model, PROMPT, 20, seed=7)
    torch.rand(3)  # whatever torch's own generator did in between
    assert generate(model, PROMPT, 20, seed=7).equal(first)
    assert not generate(model, PROMPT, 20, seed=8).equal(first)


def test_torchs_own_random_numbers_are_left_alone():
    model = tiny()
    state = torch.get_rng_state()
    generate(model, PROMPT, 3)
    assert torch.get_rng_state().equal(state)


# ---- the seam


class Stop(Exception):
    pass


def test_attention_functions_are_put_back():
    model = tiny()

    def own(*args):
        return attention(*args)

    seams(model)[1].attention = own
    generate(model, PROMPT, 3)
    assert [m.attention for m in seams(model)] == [attention, own]

    def fails(*args):
        raise Stop

    seams(model)[1].attention = fails
    with pytest.raises(Stop):
        generate(model, PROMPT, 3)
    assert [m.attention for m in seams(model)] == [attention, fails]
    seams(model)[1].attention = attention
    with torch.no_grad():
        model.logits(PROMPT)  # trains and evaluates as before: no cache is left behind
    assert generate(model, PROMPT, 3).equal(generate(tiny(), PROMPT, 3))


def test_a_users_own_attention_is_called_with_all_keys():
    model, calls = tiny(), []

    def sliding(q, k, v, cu_q, cu_k, max_seqlen):
        calls.append((len(q), len(k), cu_q.tolist(), cu_k.tolist(), max_seqlen))
        return attention(q, k, v, cu_q, cu_k, max_seqlen, window=2)

    seams(model)[0].attention = sliding
    tokens = generate(model, PROMPT, 3, temperature=0)
    assert calls == [(5, 5, [0, 5], [0, 5], 5), (1, 6, [0, 1], [0, 6], 6), (1, 7, [0, 1], [0, 7], 7)]
    with torch.no_grad():
        assert tokens[5:].equal(model.logits(tokens)[4:-1].argmax(-1))


def test_attention_may_be_a_module_of_its_own():
    class Sliding(nn.Module):
        def forward(self, q, k, v, cu_q, cu_k, max_seqlen):
            return attention(q, k, v, cu_q, cu_k, max_seqlen, window=2)

    model = tiny()
    own = seams(model)[0].attention = Sliding()
    tokens = generate(model, PROMPT, 8, temperature=0)
    assert seams(model)[0].attention is own and "layers.0.self_attn.attention" in dict(model.named_modules())
    with torch.no_grad():
        assert tokens[5:].equal(model.logits(tokens)[4:-1].argmax(-1))


def test_attention_may_be_a_method():
    class Sliding(Attention):
        def __init__(self, cfg):
            super().__init__(cfg, qk_norm=True)
            del self.attention

        def attention(self, q, k, v, cu_q, cu_k, max_seqlen):
            return attention(q, k, v, cu_q, cu_k, max_seqlen, window=2)

    model = tiny()
    own = Sliding(model.config)
    own.load_state_dict(model.layers["0"].self_attn.state_dict())
    model.layers["0"].self_attn = own
    tokens = generate(model, PROMPT, 8, temperature=0)
    assert "attention" not in vars(own)
    with torch.no_grad():
        assert tokens[5:].equal(model.logits(tokens)[4:-1].argmax(-1))


def test_a_block_may_call_its_attention_module_attention():
    class Parallel(nn.Module):
        def __init__(self, block):
            super().__init__()
            self.norm, self.attention, self.mlp = block.input_layernorm, block.self_attn, block.mlp

        def forward(self, x_TD, rope, batch):
            normed_TD = self.norm(x_TD)
            return x_TD + self.attention(normed_TD, rope, batch) + self.mlp(normed_TD, batch)

    model = tiny()
    model.layers["0"] = Parallel(model.layers["0"])
    tokens = generate(model, PROMPT, 8, temperature=0)
    with torch.no_grad():
        assert tokens[5:].equal(model.logits(tokens)[4:-1].argmax(-1))


# ---- what it refuses


@pytest.mark.parametrize(
    "options, message",
    [
        ({"prompt": PROMPT[None]}, r"prompt has shape \(1, 5\)"),
        ({"prompt": PROMPT[:0]}, r"prompt has shape \(0,\)"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.5}, "top_p=1.5"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        generate(nn.Module(), **{"prompt": PROMPT, "max_new_tokens": 1, **options})
