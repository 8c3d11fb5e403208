"""Tensor parallel: every matrix cut over neighbouring ranks, and between the matrices the tokens (sequence parallel).

    (T/n, D) residual stream, norms        each rank its tokens
        | GatherTokens                     all-gather; in backward a reduce-scatter
    (T, D)   attention or MLP              each rank its heads, its columns, its part of each expert
        | ScatterTokens                    reduce-scatter; in backward an all-gather
    (T/n, D) residual stream
    ...      after the last norm all ranks get all hidden states, and each scores them for its part of the vocabulary

What is cut how stands in the model's TP_PLAN, beside its layers. Shoeybi et al. 2019, arXiv:1909.08053; sequence
parallel: Korthikanti et al. 2022, arXiv:2205.05198.
"""

import fnmatch
import functools

import torch.nn.functional as F
from torch import Tensor, nn

from minitrain.config import UserError
from minitrain.parallel.comm import (
    Enter,
    GatherTokens,
    Group,
    JoinColumns,
    JoinTokens,
    ScatterTokens,
    all_reduce,
    gather_equal,
)
from minitrain.parallel.cut import cut, span
from minitrain.parallel.mesh import Mesh


def apply_tp(model: nn.Module, mesh: Mesh) -> None:
    """Cut the model as its TP_PLAN says. UserError for a parameter that no row of it names."""
    if mesh.group("kv").size != min(mesh.group("tp").size, model.config.num_key_value_heads):
        raise UserError("parallel.tp: init_mesh was not given the config of this model, whose heads it is to share out")
    plan, named = getattr(type(model), "TP_PLAN", {}), set()
    for name, module in model.named_modules():
        for style in (style for pattern, style in plan.items() if fnmatch.fnmatchcase(name, pattern)):
            _STYLES[style](module, mesh, model.config)
            named |= set() if style == "sublayer" else set(module.parameters())
    if missing := [name for name, p in model.named_parameters() if p not in named]:
        raise UserError(f"parallel.tp: no row of {type(model).__name__}.TP_PLAN says how to cut {missing[0]}")
    model.register_forward_hook(functools.partial(_join_tokens, mesh.group("tp")))


def _join_tokens(group, model, args, hidden_TD):
    if model.norm is None:  # stages of a pipeline pass each rank's tokens on
        return hidden_TD
    return JoinTokens.apply(hidden_TD, len(args[0].tokens), group)


# ---- the styles of a plan


def _partial(module, mesh, _cfg):
    for p in module.parameters():
        p.grad_sum_on = ("dp", "cp", "tp")


def _sublayer(module, mesh, _cfg):
    group = mesh.group("tp")

    def gather(_module, args):
        return GatherTokens.apply(args[0], len(args[-1].tokens), group), *args[1:]

    module.register_forward_pre_hook(gather)
    module.register_forward_hook(lambda _module, _args, y_TD: ScatterTokens.apply(y_TD, group))


def _vocabulary(module, mesh, cfg):
    group = mesh.group("tp")
    cut(module.weight, "tp", 0, group)
    if isinstance(module, nn.Embedding):
        module.forward = functools.partial(_embed, module, span(cfg.vocab_size, group)[0], group)
    else:
        module.forward = functools.partial(_score, module, cfg.vocab_size, group)
        module.vocabulary = _Vocabulary(cfg.vocab_size, group)


def _embed(module, first, group, tokens_T: Tensor) -> Tensor:
    here_T = (tokens_T >= first) & (tokens_T < first + len(module.weight))
    x_TD = F.embedding((tokens_T - first).where(here_T, 0), module.weight)
    return ScatterTokens.apply(x_TD.masked_fill(~here_T[:, None], 0), group)


def _score(module, vocab_size, group, hidden: Tensor) -> Tensor:
    """All logits, for losses of one's own; the built-in one looks at `vocabulary` and never has them together."""
    ends = [span(vocab_size, Group(rank, group.size)) for rank in range(group.size)]
    logits = F.linear(Enter.apply(hidden, group), module.weight)
    return JoinColumns.apply(logits, [end - start for start, end in ends], group)


class _Vocabulary:
    """What loss.cross_entropy asks of a head of which each rank has a range of rows."""

    def __init__(self, vocab_size: int, group: Group):
        self.first, self.group = span(vocab_size, group)[0], group

    def gather(self, x: Tensor) -> Tensor:
        return gather_equal(x, self.group)

    def sum(self, x: Tensor) -> None:
        all_reduce(x, self.group)


def _columns(module, mesh, _cfg, axis="tp", unit=1):
    for p in module.parameters():  # weight, and bias
        cut(p, axis, 0, mesh.group(axis), unit)


def _rows(module, mesh, _cfg, unit=1):
    group = mesh.group("tp")
    cut(module.weight, "tp", 1, group, unit)
    if module.bias is not None:  # the ranks' results are added
        module.bias.grad_sum_on = ("dp", "cp", "tp")
        module.forward = lambda x: F.linear(x, module.weight, module.bias / group.size)


def _columns_of_heads(module, mesh, cfg):
    _columns(module, mesh, cfg, unit=_head_unit(mesh, cfg))


def _rows_of_heads(module, mesh, cfg):
    _rows(module, mesh, cfg, unit=_head_unit(mesh, cfg))


def _head_unit(mesh, cfg) -> int:
    """Channels that stay together: of all queries of a key/value head, or those of 1 / tp of the queries."""
    return cfg.head_dim * (cfg.num_attention_heads // max(cfg.num_key_value_heads, mesh.group("tp").size))


def _columns_of_kv_heads(module, mesh, cfg):
    """Fewer heads than ranks: neighbours have the same one, each with other queries."""
    _columns(module, mesh, cfg, axis="kv", unit=cfg.head_dim)
    if mesh.group("kv_copies").size > 1:
        for p in module.parameters():
            p.grad_sum_on = ("dp", "cp", "kv_copies")


def _experts(module, mesh, _cfg):
    """Each expert's inner width; dimension 0 is theirs (ep.py)."""
    for p, dim in ((module.gate_proj, 1), (module.up_proj, 1), (module.down_proj, 2)):
        cut(p, "tp", dim, mesh.group("tp"))


_STYLES = {
    "vocabulary": _vocabulary,
    "sublayer": _sublayer,
    "columns": _columns,
    "columns of heads": _columns_of_heads,
    "columns of kv heads": _columns_of_kv_heads,
    "rows": _rows,
    "rows of heads": _rows_of_heads,
    "partial": _partial,
    "experts": _experts,
}
