"""One packed row of documents: what the data loader makes, the model reads and the loss scores.

    documents     [ a b c d ]        [ e f g ]
    tokens        a  b  c  d   e  f  g            (T,)   no batch axis, no padding
    targets       b  c  d  -100 f  g  -100        (T,)   the next token of the same document
    positions     0  1  2  3   0  1  2            (T,)   restart in each document
    cu_seqlens    0            4        7  7  7   (N+1,) padded to a fixed N by repeating the last entry

Read next: attention.py, which keeps the documents apart, and models/layers.py.
"""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

IGNORE = -100  # the target that is not trained on: torch.nn.functional.cross_entropy's ignore_index


@dataclass
class Batch:
    """T packed tokens. Shapes are the same for every batch of a run, so that compiled code and CUDA graphs stay valid.

    num_targets and num_pairs are plain numbers, for the loss's divisor and the meter's FLOPs; left out, they are
    counted here (which waits for the device where the tensors are on one).
    """

    tokens: Tensor  # (T,) int64
    targets: Tensor  # (T,) int64, IGNORE where not trained on
    positions: Tensor  # (T,) int64
    cu_seqlens_q: Tensor  # (N + 1,) int32: queries of document i are rows cu_seqlens_q[i] : cu_seqlens_q[i + 1]
    cu_seqlens_k: Tensor  # (N + 1,) int32: its keys; differs from cu_seqlens_q only where keys come from elsewhere
    max_seqlen: int  # no document is longer; constant in a run
    num_targets: int | None = None  # trained tokens in this row
    num_pairs: int | None = None  # sum of squared lengths of real documents: (query, key) pairs without a mask
    share: float = 0.0  # in training 1 / rows of the step: weighs what is averaged over rows, such as router losses
    num_padding: int = 0  # tokens at the end that only fill the row
    is_real: Tensor | None = None  # (T,) bool, False at these tokens; None: there are none

    def __post_init__(self):
        if self.num_targets is None:
            self.num_targets = int((self.targets != IGNORE).sum())
        if self.num_pairs is None:
            self.num_pairs = int(self.cu_seqlens_q.diff().long().square().sum())
        self.cu_seqlens_q.plans = {}  # all layers share what attention makes of them (fused_attention.make_plan)

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch with its tensors on `device`; does not wait when they come from pinned memory."""
        return self._map(lambda t: t.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """The same batch in host memory that a GPU can copy from by itself."""
        return self._map(Tensor.pin_memory)

    def _map(self, change) -> "Batch":
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}
        return replace(self, **{name: change(t) for name, t in tensors.items()})

    @classmethod
    def pack(cls, documents: list[Tensor], max_seqlen: int | None = None) -> "Batch":
        """One row of whole documents, each (n,) of token ids; a document's last token has no target."""
        device = documents[0].device
        lengths = torch.tensor([len(d) for d in documents])
        positions = torch.cat([torch.arange(n) for n in lengths.tolist()])
        tokens = torch.cat(documents).long()
        targets = tokens.roll(-1)
        ends = lengths.cumsum(0)
        targets[(ends[lengths > 0] - 1).to(device)] = IGNORE
        cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), ends]).to(device, torch.int32)
        longest = max_seqlen or int(lengths.max())
        return cls(tokens, targets, positions.to(device), cu_seqlens, cu_seqlens, longest)
