"""Held-out loss and perplexity of each source, by the loss that trains."""

import math
from collections.abc import Callable

import torch
from torch import nn

from minitrain.data import PackedData
from minitrain.parallel.cp import share_tokens
from minitrain.parallel.ddp import parts_of
from minitrain.parallel.mesh import Mesh
from minitrain.parallel.pp import link_of, run

_UNIT = 2**-20  # nats; sums of whole numbers are the same in any order, and so for any number of ranks


def mean_loss(results: list[dict]) -> float | None:
    """Of validate()'s sources, over the trained tokens of all of them; None if there are none."""
    results = [r for r in results if r["trained_tokens"]]
    tokens = sum(r["trained_tokens"] for r in results)
    return sum(r["loss"] * r["trained_tokens"] for r in results) / tokens if tokens else None


@torch.no_grad()
def validate(model: nn.Module, data: PackedData, loss_fn: Callable, mesh: Mesh) -> list[dict]:
    """-> for each source that has held-out documents {"source", "loss", "perplexity", "trained_tokens"}.

    loss: mean over the tokens that are trained on, in nats; no number where there are none. FloatingPointError if it is
    none for another reason.
    """
    results, cp = [], mesh.group("cp")
    is_last, stages = link_of(parts_of(model)[-1]).is_last, link_of(model).ahead.size  # of a pipeline
    for source, rows in data.held_out_rows().items():
        losses, tokens = [], 0
        for batch in rows:
            mine = share_tokens(batch, cp)
            hidden_TD = run(model, mine)
            if is_last:
                losses.append(loss_fn(hidden_TD, model.lm_head, mine)[0].double())
            tokens += batch.num_targets
        losses = torch.stack(losses).tolist() if losses else []
        if not math.isfinite(sum(losses)):
            raise FloatingPointError(f"validation on {source}: loss {sum(losses)}")
        # sum_rows divides by the ranks of a row, of which one stage has losses, and of its tokens each a part.
        total = sum(round(loss / _UNIT) for loss in losses) * stages * cp.size
        total, tokens = mesh.sum_rows(total), mesh.sum_rows(tokens)
        loss = total * _UNIT / tokens if tokens else math.nan
        perplexity = math.inf if loss >= 700 else math.exp(loss)
        results.append({"source": source, "loss": loss, "perplexity": perplexity, "trained_tokens": tokens})
    return results
