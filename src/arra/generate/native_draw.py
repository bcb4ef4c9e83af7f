"""The next token of every row in one call of C++ (models/native_draw.cpp): bfloat16 on a CPU.

It draws from what `sampling.py` draws from, rounded in other places; rows that are greedy or leave
codes out are drawn there.

Legend: R rows, V logits of a row, K codes.
"""

import torch
from torch import Tensor

from arra.generate.state import State
from arra.models.native import Draw, library


class NativeDraw:
    """Draws into the tables of a lane, whose places in memory must not change.

    Args:
        code_ids_K: that follow each other.
    """

    def __init__(self, state: State, code_ids_K: Tensor) -> None:
        self._state, self._code_ids_K = state, code_ids_K  # what is pointed to
        self._draw = Draw(
            None,
            None,
            code_ids_K.data_ptr(),
            state.leader_R.data_ptr(),
            state.partner_R.data_ptr(),
            state.active_R.data_ptr(),
            state.temperature_R.data_ptr(),
            state.forced_RS.data_ptr(),
            state.uniform_RS.data_ptr(),
            state.scale_RS.data_ptr(),
            state.step_R.data_ptr(),
            state.token_R.data_ptr(),
            state.drawn_RS.data_ptr(),
            state.finite_R.data_ptr(),
            *state.forced_RS.shape,
            0,
            int(code_ids_K[0]),
            len(code_ids_K),
            0,
        )

    @staticmethod
    def serves(device: torch.device, dtype: torch.dtype) -> bool:
        """Whether codes that follow each other can be drawn here, of a model of this type."""
        return device.type == "cpu" and dtype == torch.bfloat16 and library() is not None

    def __call__(self, logits_RV: Tensor, given_R: Tensor | None = None) -> None:
        """Draws from what the head gave, and goes on by a step.

        Args:
            logits_RV: bfloat16.
            given_R: codes that are drawn already, -1 where there is none; None: there are none.
        """
        logits_RV, loaded = logits_RV.contiguous(), library()
        assert loaded is not None
        self._draw.logits, self._draw.width = logits_RV.data_ptr(), logits_RV.shape[1]
        self._draw.given = None if given_R is None else given_R.data_ptr()
        self._draw.threads = torch.get_num_threads()
        loaded.draw(self._draw)
