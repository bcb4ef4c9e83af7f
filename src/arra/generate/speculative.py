"""Several codes per forward pass, from the same distribution: speculative Jacobi decoding.

SJD is arXiv 2410.01699, its coupled form SCD is arXiv 2510.24211. A window of W steps holds drafts
x_j, each with the distribution q_j that it was drawn from. One forward pass over the window gives
every step's p_j, given the drafts before it. Each draft stays with probability
min(1, p_j(x_j) / q_j(x_j)), else it is drawn anew from (p_j - q_j)+, normalised; q_j becomes p_j.
Final are the steps from the first one on as long as their drafts stay, and the first that changes.
Behind that one, SJD draws all drafts afresh from p_j; SCD goes on as before it, so that drafts
stay where they can.

Why the distribution is the model's own. Take all that happens at steps below j as given: what is
below does not depend on x_j, as the model is causal; so p_j is a fixed distribution in every pass.
(1) x_j is distributed as q_j in every pass: it enters with one draft from a q that what is below
decides (here: a copy of a code below, q = 1 there), and both ways of drawing it anew turn a draw
from q_j into one from p_j, which is the next q_j. (2) In the pass that makes step j final, no draft
below it changes, so p_j is the model's distribution given the final codes below. (3) Which pass
that is, when j enters and how wide the window is at the time follow from what is below alone. So
the final code is a draw from p_j of (2), whatever is below: the picture is drawn from the model's
product of conditionals. `tests/invariants/test_speculation.py` counts it.

Legend: N pictures, W steps of a window, S steps of a picture (tables have W more), K codes.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Speculate = Literal["off", "sjd", "scd"]
SMALLEST = 2
"""Steps of the narrowest window: with one, nothing is foreseen."""
WIDTH_PER_PACE = 5
"""A draft has to come to rest before the window's front reaches it (experiments/speculation)."""
MEMORY = 0.8
"""How much of a picture's pace is that of its earlier passes."""


def jacobi(
    draft_NW: Tensor,
    chance_of_draft_NW: Tensor,
    p_NWK: Tensor,
    q_NWK: Tensor,
    uniform_NW: Tensor,
    fixed_NW: Tensor,
    coupled: bool,
) -> Tensor:
    """One pass over the windows: the codes that take the drafts' places, (N, W).

    Args:
        chance_of_draft_NW: q_j(x_j); 1 where the draft was no draw, and `q_NWK` is not read there.
        p_NWK, q_NWK: distributions of each step, given the drafts before it, now and when its draft
            was drawn.
        uniform_NW: float64 in [0, 1); one number decides whether a draft stays and, stretched over
            what is left of [0, 1), what takes its place.
        fixed_NW: steps whose draft stays in any case.
        coupled: SCD; otherwise SJD.
    """
    draft_NW1 = draft_NW[..., None]
    p_of_draft_NW = p_NWK.gather(-1, draft_NW1)[..., 0].double()
    stay_NW = (p_of_draft_NW / chance_of_draft_NW).clamp(max=1).masked_fill(fixed_NW, 1)
    stays_NW = uniform_NW < stay_NW
    free_NW = torch.zeros_like(stays_NW) if coupled else _behind_first(~stays_NW) & ~fixed_NW
    weights_NWK = leftover(p_NWK, q_NWK, draft_NW1, chance_of_draft_NW, free_NW)
    stretched_NW = torch.where(free_NW, uniform_NW, (uniform_NW - stay_NW) / (1 - stay_NW))
    cdf_NWK = weights_NWK.cumsum(-1, dtype=torch.float64)
    total_NW1 = cdf_NWK[..., -1:]
    # Below 1, so that the threshold stays below the total and no code without weight is drawn.
    threshold_NW1 = stretched_NW.clamp(0, 1 - 2**-40)[..., None] * total_NW1
    drawn_NW = torch.searchsorted(cdf_NWK, threshold_NW1, right=True)[..., 0]
    drawn_NW = drawn_NW.clamp(max=p_NWK.shape[-1] - 1)  # beyond only where p is not finite
    # Nothing is left where p equals q but for rounding: then the draft stays.
    stays_NW = (stays_NW & ~free_NW) | (total_NW1[..., 0] <= 0)
    return torch.where(stays_NW, draft_NW, drawn_NW)


def leftover(
    p_NWK: Tensor, q_NWK: Tensor, draft_NW1: Tensor, chance_of_draft_NW: Tensor, free_NW: Tensor
) -> Tensor:
    """Weights of what takes a draft's place: p where it is drawn afresh, else (p - q)+."""
    drawn_NW = (chance_of_draft_NW < 1) & ~free_NW
    weights_NWK = torch.addcmul(p_NWK, q_NWK, -drawn_NW[..., None].to(p_NWK.dtype))
    weights_NWK.clamp_(min=0)
    # A draft that has to go was likelier under q than under p: nothing is left of it.
    own_NW1 = weights_NWK.gather(-1, draft_NW1).where(free_NW[..., None], 0)
    return weights_NWK.scatter_(-1, draft_NW1, own_NW1)


def _behind_first(found_NW: Tensor) -> Tensor:
    """True behind the first True of each row."""
    counts_NW = found_NW.long()
    return counts_NW.cumsum(1) > counts_NW


class Drafts:
    """The codes of N pictures, final ones and drafts, and how the drafts came about.

    Args:
        pictures, steps, window, codes: N, S, the widest W, K.
        coupled: SCD; otherwise SJD.
        adaptive: a picture's window is `WIDTH_PER_PACE` times as wide as its passes went far
            lately, rounded up to W, W / 2, W / 4 ...; otherwise it has its full width always.
        dtype: of the probabilities.
    """

    def __init__(
        self,
        pictures: int,
        steps: int,
        window: int,
        codes: int,
        *,
        coupled: bool,
        adaptive: bool = False,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        def zeros(*shape: int, dtype: torch.dtype = torch.long) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.coupled, self.adaptive, self.window = coupled, adaptive, window
        self.code_NS = zeros(pictures, steps + window)
        self.forced_NS = zeros(pictures, steps + window, dtype=torch.bool)
        self.source_NS = zeros(pictures, steps + window)
        self.uniform_NSW = zeros(pictures, steps + 1, window, dtype=torch.float64)
        self.length_N = zeros(pictures)  # steps of the picture; 0: nobody is there
        self.final_N = zeros(pictures)  # steps that are final
        self.seen_N = zeros(pictures)  # steps whose drafts were drawn from `q_NWK`, or are final
        self.passes_N = zeros(pictures)
        self.kept_N = zeros(pictures)  # codes that were drafts and stayed
        self.width_N = zeros(pictures) + window
        self.pace_N = zeros(pictures, dtype=torch.float64)  # steps that a pass made final, lately
        self.q_NWK = zeros(pictures, window, codes, dtype=dtype)

    def begin(
        self,
        pictures: Sequence[int],
        start_NS: Tensor,
        forced_NS: Tensor,
        source_NS: Tensor,
        uniform_NSW: Tensor,
    ) -> None:
        """Starts pictures of S steps.

        Args:
            start_NS: the first code, which is final, and codes to begin the first window with.
            forced_NS: whether the format dictates the step.
            source_NS: the step below it that a step's first draft is copied from.
            uniform_NSW: [n, i, w] is for slot w of the window in pass i; i = 0 is left out.
        """
        rows, steps = list(pictures), start_NS.shape[1]
        for table, values in (
            (self.code_NS, start_NS),
            (self.forced_NS, forced_NS),
            (self.source_NS, source_NS),
            (self.uniform_NSW, uniform_NSW),
        ):
            table[rows, :steps] = values.to(table.device)
        self.length_N[rows] = steps
        self.final_N[rows] = self.seen_N[rows] = self.passes_N[rows] = 1
        self.width_N[rows] = self.first_width
        self.pace_N[rows] = self.first_width / WIDTH_PER_PACE
        self.kept_N[rows], self.q_NWK[rows] = 0, 0

    @property
    def widths(self) -> list[int]:
        """The widths that windows have, rising."""
        widths = [self.window]
        while self.adaptive and widths[0] >= 2 * SMALLEST:
            widths.insert(0, widths[0] // 2)
        return widths

    @property
    def first_width(self) -> int:
        """What a picture begins with."""
        return self.widths[-2:][0]

    def end(self, pictures: Sequence[int]) -> None:
        """Nobody is there any more."""
        rows = list(pictures)
        self.length_N[rows] = self.final_N[rows] = self.seen_N[rows] = self.passes_N[rows] = 0

    def propose(self, width: int) -> Tensor:
        """Steps (N, W) of the windows of this width, with a draft at each; call `judge` next."""
        step_NW = self.final_N[:, None] + torch.arange(width, device=self.final_N.device)
        newest_N1 = (self.seen_N[:, None] - 1).clamp(min=0)
        source_NW = self.source_NS.gather(1, step_NW).minimum(newest_N1)
        copied_NW = self.code_NS.gather(1, source_NW)
        # Before the first pass there is nothing but one code to copy.
        is_new_NW = (step_NW >= self.seen_N[:, None]) & (self.passes_N[:, None] > 1)
        draft_NW = torch.where(is_new_NW, copied_NW, self.code_NS.gather(1, step_NW))
        self.code_NS.scatter_(1, step_NW, draft_NW)
        return step_NW

    def fed(self, step_NW: Tensor) -> Tensor:
        """The codes before the steps that `propose` gave, (N, W)."""
        return self.code_NS.gather(1, (step_NW - 1).clamp(min=0))

    def live(self, step_NW: Tensor) -> Tensor:
        """Which of the steps that `propose` gave are in their picture's window, (N, W) bool."""
        mine_N = (self.width_N == step_NW.shape[1]) & (self.final_N < self.length_N)
        return (step_NW < self.length_N[:, None]) & mine_N[:, None]

    def judge(self, p_NWK: Tensor) -> None:
        """Moves every picture with windows of this width on.

        Args:
            p_NWK: the distribution of each step that `propose` gave, from one forward pass.
        """
        width = p_NWK.shape[1]
        slot_W = torch.arange(width, device=p_NWK.device)
        step_NW = self.final_N[:, None] + slot_W
        live_NW = self.live(step_NW)
        draft_NW, q_NWK = self.code_NS.gather(1, step_NW), self.q_NWK[:, :width]
        chance_NW = q_NWK.gather(-1, draft_NW[..., None])[..., 0].double()
        chance_NW = chance_NW.masked_fill((step_NW >= self.seen_N[:, None]) | ~live_NW, 1)
        pass_N11 = self.passes_N[:, None, None].expand(-1, 1, width)
        uniform_NW = self.uniform_NSW.gather(1, pass_N11)[:, 0]
        forced_NW = self.forced_NS.gather(1, step_NW)
        fixed_NW = ~live_NW | forced_NW
        code_NW = jacobi(draft_NW, chance_NW, p_NWK, q_NWK, uniform_NW, fixed_NW, self.coupled)
        is_final_NW = live_NW & ~_behind_first(code_NW != draft_NW)
        self.code_NS.scatter_(1, step_NW, code_NW)
        self.kept_N.add_((is_final_NW & (code_NW == draft_NW) & ~forced_NW).sum(1))
        self._move(p_NWK, is_final_NW.sum(1), live_NW.sum(1), live_NW[:, 0])

    def _move(self, p_NWK: Tensor, ended_N: Tensor, live_N: Tensor, mine_N: Tensor) -> None:
        """The windows move over the steps that became final, the distributions with them."""
        pictures, width, _ = p_NWK.shape
        slot_W = torch.arange(width, device=p_NWK.device)
        from_NW = (slot_W + ended_N[:, None]).clamp(max=width - 1)
        from_NW = from_NW + width * torch.arange(pictures, device=p_NWK.device)[:, None]
        moved_NWK = p_NWK.flatten(0, 1).index_select(0, from_NW.flatten()).view_as(p_NWK)
        if self.adaptive:
            moved_NWK = torch.where(mine_N[:, None, None], moved_NWK, self.q_NWK[:, :width])
            pace_N = MEMORY * self.pace_N + (1 - MEMORY) * ended_N
            self.pace_N.copy_(torch.where(mine_N, pace_N, self.pace_N))
            widths = torch.tensor(self.widths, device=pace_N.device)
            place_N = torch.searchsorted(widths.double(), WIDTH_PER_PACE * self.pace_N)
            width_N = widths[place_N.clamp(max=len(widths) - 1)]
            self.width_N.copy_(torch.where(mine_N, width_N, self.width_N))
        self.q_NWK[:, :width] = moved_NWK
        self.seen_N.copy_(torch.where(mine_N, self.final_N + live_N, self.seen_N))
        self.final_N.add_(ended_N)
        self.passes_N.add_(mine_N)
