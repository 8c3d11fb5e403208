"""Pipeline parallel: each rank of "pp" is a stage, with some neighbouring blocks; rows follow each other through it.

    1F1B, three stages, four rows: a digit is a row's forward, a letter its backward
    stage 0    0 1 2 . . a 3 b . c . d
    stage 1    . 0 1 . a 2 b 3 c . d .
    stage 2    . . 0 a 1 b 2 c 3 d . .

    zb-h1: a letter is the first half of a backward, for the stage before; a capital the other, gradients of weights
    stage 0    0 1 2 . . a A 3 b B c C d D
    stage 1    . 0 1 . a 2 b A 3 c B d C D
    stage 2    . . 0 a 1 b 2 c A 3 d B C D

Hidden states go to the next stage and their gradients back, nothing else: each stage has the rows' tokens, and losses
of routers ride on the hidden states. Where the head is the embedding both ends have the matrix: their gradients are
summed at the end of a step (ddp.py), so the copies stay equal. With several parts a stage has blocks of as many places,
and a row goes through all stages as often. GPipe: Huang et al. 2019, arXiv:1811.06965; 1F1B: Narayanan et al. 2019,
PipeDream, doi:10.1145/3341301.3359646; parts (interleaved 1F1B): Narayanan et al. 2021, arXiv:2104.04473;
ZB-H1: Qi et al. 2023, arXiv:2401.10241 (deferred.py).
"""

import collections
import copy
import functools
import itertools

import torch
from torch import Tensor, nn

from minitrain.batch import Batch
from minitrain.config import UserError
from minitrain.parallel.comm import Group, broadcast, gather_objects, receive, send
from minitrain.parallel.ddp import DENSE, parts_of, shared_by_blocks
from minitrain.parallel.deferred import Deferred
from minitrain.parallel.mesh import ALONE, Mesh

_PARTS = {"embed_tokens", "layers", "norm", "lm_head"}


def apply_pp(model: nn.Module, mesh: Mesh) -> None:
    """Leave this stage's blocks in the model; the embedding on the first stage, norm and head on the last."""
    if others := [name for name, _ in model.named_children() if name not in _PARTS]:
        raise UserError(f"parallel.pp: which stage has {others[0]}? It knows {', '.join(sorted(_PARTS))} only")
    if name := shared_by_blocks(model):
        raise UserError(f"parallel.pp: {name} is a parameter of another block, too, which may be on another stage")
    stage = mesh.group("pp")
    is_last, is_tied = stage.rank == stage.size - 1, model.lm_head.weight is model.embed_tokens.weight
    parts = share_blocks(_costs(model), stage.size * mesh.parts)[stage.rank :: stage.size]
    for i, name in enumerate(list(model.layers)):
        if not any(i in part for part in parts):
            del model.layers[name]
    if is_tied:
        model.embed_tokens.weight.grad_sum_on = (*DENSE, "ends")
    if stage.rank > 0 and not (is_last and is_tied):
        model.embed_tokens = None
    if not is_last:
        model.norm = model.lm_head = None
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError(f"parallel.pp: all of stage {stage.rank} is frozen; use fewer stages than pp={stage.size}")
    model.link = Link(mesh)
    if mesh.parts > 1:
        model.parts = [_part(model, blocks, Link(mesh, i)) for i, blocks in enumerate(parts)]
    if mesh.schedule == "zb-h1":
        model.deferred = Deferred(model)


def _part(model: nn.Module, blocks: range, link: "Link") -> nn.Module:
    """The model as if it had these blocks only: the same modules and hooks."""
    part = copy.copy(model)
    part._modules = dict(model._modules)
    part.layers = nn.ModuleDict({str(i): model.layers[str(i)] for i in blocks})
    part.link = link
    if not link.is_first and not link.is_last:
        part.embed_tokens = None
    if not link.is_last:
        part.norm = part.lm_head = None
    return part


def _costs(model: nn.Module) -> list[int]:
    """Of each block: weights that a token is multiplied with. The ends count with the first and the last.

    Attention's own products are left out: they are alike in all blocks, and how many depends on the documents.
    """
    cfg = model.config

    def active(p):
        return p.numel() * cfg.num_experts_per_tok // cfg.num_experts if p.ndim == 3 else p.numel()

    costs = [sum(active(p) for p in block.parameters()) for block in model.layers.values()]
    costs[0] += cfg.hidden_size  # a look-up of one row
    costs[-1] += model.lm_head.weight.numel()
    return costs


def share_blocks(costs: list[int], stages: int) -> list[range]:
    """Neighbouring blocks for each stage, at least one, so that the costliest stage costs as little as can be."""
    totals = [0, *itertools.accumulate(costs)]

    @functools.cache
    def best(begin: int, stages: int) -> tuple[int, tuple[int, ...]]:
        """Of blocks from `begin` on -> sum of the stages' costs to the 16th: the costliest decides, then the others."""
        if stages == 1:
            return (totals[-1] - totals[begin]) ** 16, (len(costs),)
        found = []
        for end in range(begin + 1, len(costs) - stages + 2):
            rest, ends = best(end, stages - 1)
            found.append(((totals[end] - totals[begin]) ** 16 + rest, (end, *ends)))
        return min(found)  # of equal ones the one with less on early stages, which keep more rows

    ends = best(0, stages)[1]
    return list(itertools.starmap(range, itertools.pairwise((0, *ends))))


def schedule(kind: str, stage: int, stages: int, rows: int, parts: int = 1) -> list[tuple[str, int, int]]:
    """What a stage does in a step: ("forward", row, part) and ("backward", row, part), each once.

    gpipe: all forwards first. 1f1b: a backward as soon as it can be. Both wait for stages - 1 rows in all, of parts for
    (stages - 1) / parts: rows go in groups of at least `stages` through one part after the other, so that a row is back
    from the last stage when its turn comes. With one stage each row's backward follows its forward. zb-h1: 1f1b, and
    ("weights", row, 0) as many rows after its backward as there are stages before, so that a stage waits for
    (stages - 1) / 3 rows in all and has no more under way than the first.
    """
    num_groups = max(1, rows // stages)
    ends = [rows * i // num_groups for i in range(num_groups + 1)]
    groups = [range(begin, end) for begin, end in itertools.pairwise(ends)]
    forwards = [(row, part) for group in groups for part in range(parts) for row in group]
    backwards = [(row, part) for group in groups for part in reversed(range(parts)) for row in group]
    ahead = (stages - stage - 1) * (1 if parts == 1 else 2) + (parts - 1) * max(map(len, groups))
    actions, done = [], 0
    for i, backward in enumerate(backwards):
        until = len(forwards) if kind == "gpipe" else min(len(forwards), i + ahead + 1)
        actions += [("forward", *forward) for forward in forwards[done:until]] + [("backward", *backward)]
        actions += [("weights", i - stage, 0)] if kind == "zb-h1" and i >= stage else []
        done = until
    return actions + [("weights", row, 0) for row in range(max(0, rows - stage), rows) if kind == "zb-h1"]


def messages_at_a_time(stages: int) -> int:
    """Of a part of a stage, which keeps what it sent until that is taken: so many that no schedule waits for one."""
    return 4 * stages


def bubble(kind: str, stages: int, rows: int, parts: int = 1) -> float:
    """The share of a step in which a stage waits, if a forward and each half of a backward take the same time.

    With several parts from as many rows as stages on; with fewer it is more.
    """
    waits = (stages - 1) / parts
    if kind == "zb-h1":
        waits = max(stages - 1, 2 * (stages - 1) - (rows - 1)) / 3
    return waits / (rows + waits)


class Link:
    """Between a part of this stage and the parts before and after it, on the neighbours; with one stage nothing passes.

    Each direction has a group of its own, and so has the way around from the last stage to the first one's next part:
    what waits in one of them holds up none of the others, over NCCL too, and the parts' messages stay in order.
    """

    def __init__(self, mesh: Mesh, part: int = 0):
        self.ahead, self.tp = mesh.group("pp"), mesh.group("tp")
        self.schedule, self.parts = mesh.schedule, mesh.parts
        rank, stages = self.ahead.rank, self.ahead.size
        self.is_first, self.is_last = (part, rank) == (0, 0), (part, rank) == (mesh.parts - 1, stages - 1)
        self.before, self.after = (rank - 1) % stages, (rank + 1) % stages
        ways = mesh.group("pp"), mesh.group("pp_back")
        around = mesh.group("pp_around"), mesh.group("pp_back_around")
        self.from_before, self.to_before = around if rank == 0 else ways
        self.to_after, self.from_after = around if rank == stages - 1 else ways
        self.under_way = collections.deque()  # messages, and their tensors; at most:
        self.most = messages_at_a_time(stages)

    def actions(self, rows: int) -> list[tuple[str, int, int]]:
        """Of this stage in a step."""
        return schedule(self.schedule, self.ahead.rank, self.ahead.size, rows, self.parts)

    def forward(self, model: nn.Module, batch: Batch) -> tuple[Tensor | None, Tensor]:
        """-> hidden states of the stage before (None on the first), and what the model makes of them.

        They are sent on; on the last stage they are for the loss.
        """
        if self.is_first:
            x_TD, y_TD = None, model(batch)
        else:
            T = -(-len(batch.tokens) // self.tp.size)  # between blocks ranks of tp share the tokens
            x_TD = _empty(model, T, model.config.hidden_size)
            receive(x_TD, self.before, self.from_before)
            x_TD.requires_grad_(torch.is_grad_enabled())
            # NOTE: a view, since the gradient of a leaf may be there before those of parameters made with it.
            y_TD = model(batch, x_TD.view_as(x_TD))
        if not self.is_last:
            self._send(y_TD.detach(), self.after, self.to_after)
        return x_TD, y_TD

    def backward(self, x_TD: Tensor | None, y: Tensor) -> None:
        """y: the loss on the last stage, elsewhere what forward() gave with x."""
        d_TD = None
        if not self.is_last:
            d_TD = torch.empty_like(y)
            receive(d_TD, self.after, self.from_after)
        if y.requires_grad:  # in a first part all may be frozen
            y.backward(d_TD)
        if not self.is_first:
            self._send(x_TD.grad, self.before, self.to_before)

    def _send(self, x: Tensor, to: int, group: Group) -> None:
        x = x.contiguous()
        self._wait_for_all_but(self.most - 1)
        self.under_way.append((send(x, to, group), x))

    def _wait_for_all_but(self, newest: int) -> None:
        while len(self.under_way) > newest:
            message, _ = self.under_way.popleft()
            message.wait()

    def finish(self) -> None:
        """Until all that was sent has been taken."""
        self._wait_for_all_but(0)

    def from_last(self, model: nn.Module, named: dict[str, Tensor]) -> dict[str, Tensor]:
        """Scalars that the last stage has, on every stage."""
        if self.ahead.size == 1:
            return named
        names = gather_objects(list(named), self.ahead)[-1]
        values = _empty(model, len(names))
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        if self.is_last:
            values.copy_(torch.stack(list(named.values())))
        broadcast(values, self.ahead.size - 1, self.ahead)
        return dict(zip(names, values, strict=True))


def link_of(model: nn.Module) -> Link:
    """Of one stage, where the model is whole."""
    return getattr(model, "link", None) or Link(ALONE)


def run(model: nn.Module, batch: Batch) -> Tensor:
    """A row's forward by all stages together. -> hidden states, on the last one those for the loss."""
    for part in parts_of(model):
        _, hidden_TD = link_of(part).forward(part, batch)
    for part in parts_of(model):
        link_of(part).finish()
    return hidden_TD


def last_logits(model: nn.Module, batch: Batch) -> Tensor:
    """(V,), of the row's last token, on every stage."""
    hidden_TD, link = run(model, batch), link_of(parts_of(model)[-1])
    logits_V = model.lm_head(hidden_TD[-1]) if link.is_last else _empty(model, model.config.vocab_size)
    broadcast(logits_V, link.ahead.size - 1, link.ahead)
    return logits_V


def _empty(model: nn.Module, *shape: int) -> Tensor:
    return next(model.parameters()).new_empty(shape)
