"""What decides each row's next token, on the device: a step needs nothing from the host.

Legend: R rows, S steps (tokens behind the prompt, from the first code on), D model width.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class State:
    """A row of its own in every tensor; they are written in place."""

    leader_R: Tensor  # the guided row of the row's picture
    partner_R: Tensor  # the unguided one; the guided again where there is none
    token_R: Tensor  # the next token
    position_R: Tensor  # where it stands
    step_R: Tensor
    active_R: Tensor  # 1, or 0 where nobody sits
    forced_RS: Tensor  # the token that the format dictates, -1: a code
    uniform_RS: Tensor
    scale_RS: Tensor  # of guidance
    drawn_RS: Tensor  # codes
    finite_R: Tensor
    temperature_R: Tensor
    top_k_R: Tensor
    top_p_R: Tensor
    hidden_RD: Tensor | None = field(default=None)  # what the next token follows from

    @classmethod
    def idle(cls, rows: int, columns: int, device: torch.device) -> "State":
        def zeros(*shape: int, dtype: torch.dtype = torch.long) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        own_R = torch.arange(rows, device=device)
        return cls(
            leader_R=own_R,
            partner_R=own_R.clone(),
            token_R=zeros(rows),
            position_R=zeros(rows),
            step_R=zeros(rows),
            active_R=zeros(rows),
            forced_RS=zeros(rows, columns),
            uniform_RS=zeros(rows, columns, dtype=torch.float64),
            scale_RS=zeros(rows, columns, dtype=torch.float32) + 1,
            drawn_RS=zeros(rows, columns),
            finite_R=zeros(rows, dtype=torch.bool) | True,
            temperature_R=zeros(rows, dtype=torch.float32) + 1,
            top_k_R=zeros(rows),
            top_p_R=zeros(rows, dtype=torch.float64) + 1,
        )
