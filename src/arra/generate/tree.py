"""Several codes per forward pass, from the same distribution: a tree of drafts, drawn by one noise.

Each code of a picture has Gumbel noise of its own, drawn from the picture's seed before painting:
the code is argmax(log p + noise), which is a draw from p. So with its noise given a picture is a
function of the model, and whatever is drafted, it stays the same picture: a pass looks at a tree of
drafts, takes what the model and the noise say at the root, goes to the branch that begins with that
code if there is one, and so on. The last code taken is the next tree's root. (arXiv 2002.09928
foresees pictures so, by one guess; trees of guesses are SpecInfer's, arXiv 2305.09781.)

What is drafted after a code are those likeliest by log q + noise, where q is what the last pass
said at that place, on the average over its branches: those that end in the same codes count for
most. The noise makes drafts good: where p is flat, it is the noise that decides.

`tests/invariants/test_speculation.py` compares and counts it.

Legend: N pictures, T nodes of the tree, D levels below its root, S steps of a picture (tables have
more), K codes, J codes of an ending, P parents at one level.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

CHANCE_OF_RANK = (0.38, 0.13, 0.06, 0.05, *(0.03,) * 4, *(0.01,) * 8)
"""How often a draft is right, from the likeliest one on (experiments/speculation)."""
NODES_PER_LEVEL = 8
"""A tree of so many nodes has a branch of one level that is there for the next passes to know."""
PENALTIES = (4.0, 2.0, 1.0)
"""Of branches whose last code is another, whose last but one is, ...: e^-4, e^-2, e^-1."""
LEAST = 1e-12
"""Chances below it count as this much when branches are averaged."""


@dataclass(frozen=True)
class Tree:
    """The shape of all trees of a lane, level by level.

    Attributes:
        parent: of each node; the root, which is the first, is its own.
        rank: which of its parent's drafts it is, 0 = the likeliest.
        level: 0 = the root's.
    """

    parent: tuple[int, ...]
    rank: tuple[int, ...]
    level: tuple[int, ...]

    @classmethod
    def of(cls, nodes: int, codes: int) -> "Tree":
        """The tree of so many nodes that is expected to go furthest."""
        # Each node has the numbers of the drafts on the way to it.
        trunk = nodes // NODES_PER_LEVEL
        ways = {(0,) * length for length in range(trunk + 1)}
        while len(ways) < nodes:
            ways.add(max(_open(ways, codes), key=_chance))
        ordered = sorted(ways, key=lambda way: (len(way), way))
        place = {way: number for number, way in enumerate(ordered)}
        return cls(
            tuple(place[way[:-1]] for way in ordered),
            tuple(way[-1] if way else 0 for way in ordered),
            tuple(map(len, ordered)),
        )

    @cached_property
    def levels(self) -> int:
        return self.level[-1]

    def at(self, level: int) -> list[int]:
        return [node for node, own in enumerate(self.level) if own == level]

    @cached_property
    def above_TT(self) -> Tensor:
        """Which nodes are on the way to a node, itself included, bool."""
        above_TT = torch.eye(len(self.parent), dtype=torch.bool)
        for node, parent in enumerate(self.parent):
            above_TT[node] |= above_TT[parent]
        return above_TT


_Way = tuple[int, ...]


def _chance(way: _Way) -> float:
    chance = 1.0
    for rank in way:
        chance *= CHANCE_OF_RANK[rank]
    return chance


def _open(ways: set[_Way], codes: int) -> list[_Way]:
    """The next drafts of all nodes."""
    found, ranks = [], min(codes, len(CHANCE_OF_RANK))
    for way in ways:
        rank = 0
        while (*way, rank) in ways:
            rank += 1
        if rank < ranks:
            found.append((*way, rank))
    return sorted(found)


def gumbel(generator: torch.Generator, *shape: int) -> Tensor:
    """Noise whose argmax over log p + noise is a draw from p, float32."""
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
    return -(-uniform.clamp(min=2**-54).log()).log().float()


@dataclass(frozen=True)
class _Level:
    """Nodes that are drafted together."""

    parents: Tensor  # (P,) those of them that have children
    children: Tensor
    parent_of: Tensor  # places in `parents`
    rank: Tensor
    most: int  # children of a parent


@dataclass
class Branches:
    """The codes of N pictures and a tree of drafts of each; what a lane asks of `Drafts` too.

    Args:
        pictures, steps, nodes, codes: N, S, T, K.
        dtype: of the probabilities.
    """

    pictures: int
    steps: int
    nodes: int
    codes: int
    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float32
    tree: Tree = field(init=False)

    def __post_init__(self) -> None:
        def zeros(*shape: int, dtype: torch.dtype = torch.long) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=self.device)

        pictures, nodes = self.pictures, self.nodes
        self.tree, endings = Tree.of(nodes, self.codes), len(PENALTIES)
        room = self.steps + self.tree.levels + 1
        self.code_NS, self.forced_NS = zeros(pictures, room), zeros(pictures, room).bool()
        self.noise_NSK = zeros(pictures, room, self.codes, dtype=torch.float32)
        self.length_N = zeros(pictures)  # steps of the picture; 0: nobody is there
        self.final_N, self.passes_N = zeros(pictures), zeros(pictures)
        self.kept_N = zeros(pictures)  # codes that were drafts and stayed
        self.width_N = zeros(pictures) + nodes
        self.moved_N = zeros(pictures)  # steps that the last pass made final
        self.draft_NT = zeros(pictures, nodes)
        self.ending_NTJ = zeros(pictures, nodes, endings)  # a node's code, the one before it, ...
        # Of the tree before, by which this one was planted: log p of what followed its nodes.
        self.said_NTK = zeros(pictures, nodes, self.codes, dtype=self.dtype)
        self.ended_NTJ = zeros(pictures, nodes, endings)
        self.way_ND = zeros(pictures, self.tree.levels)  # nodes that became final, by level
        self.penalty_J = torch.tensor(PENALTIES, device=self.device, dtype=self.dtype)
        self.parent_T, self.rank_T, self.level_T = (
            torch.tensor(values, device=self.device)
            for values in (self.tree.parent, self.tree.rank, self.tree.level)
        )
        self._levels = [self._level(level) for level in range(1, self.tree.levels + 1)]

    def _level(self, level: int) -> _Level:
        tree = self.tree
        children = tree.at(level)
        parents = sorted({tree.parent[node] for node in children})
        rank = [tree.rank[node] for node in children]
        return _Level(
            torch.tensor(parents, device=self.device),
            torch.tensor(children, device=self.device),
            torch.tensor([parents.index(tree.parent[node]) for node in children]).to(self.device),
            torch.tensor(rank, device=self.device),
            max(rank) + 1,
        )

    # ---- beginning and ending -------------------------------------------------------------------

    @property
    def first_width(self) -> int:
        """What a picture begins with, and goes on with: the whole tree."""
        return self.nodes

    def begin(
        self,
        pictures: Sequence[int],
        start_NS: Tensor,
        forced_NS: Tensor,
        p_NK: Tensor,
        noise_NSK: Tensor,
    ) -> None:
        """Starts pictures of S steps.

        Args:
            start_NS: the first code, which is final; nothing else is read.
            forced_NS: whether the format dictates the step.
            p_NK: what the first code was drawn from: the best that is known of the next.
        """
        rows, steps = list(pictures), start_NS.shape[1]
        self.code_NS[rows, :steps] = start_NS.to(self.code_NS.device)
        self.forced_NS[rows, :steps] = forced_NS.to(self.code_NS.device)
        self.noise_NSK[rows, :steps] = noise_NSK.to(self.code_NS.device)
        self.length_N[rows] = steps
        self.final_N[rows] = self.passes_N[rows] = 1
        self.moved_N[rows] = self.kept_N[rows] = 0
        self.said_NTK[rows] = p_NK[:, None].to(self.dtype).clamp(min=LEAST).log()
        self.ended_NTJ[rows] = -1

    def end(self, pictures: Sequence[int]) -> None:
        """Nobody is there any more."""
        rows = list(pictures)
        self.length_N[rows] = self.final_N[rows] = self.passes_N[rows] = 0

    # ---- a pass ---------------------------------------------------------------------------------

    def propose(self, width: int) -> Tensor:
        """Plants the trees; the step (N, T) that follows from each node. Call `judge` next."""
        last_N = self.final_N - 1
        back_NJ = last_N[:, None] - torch.arange(len(PENALTIES), device=last_N.device)
        root_NJ = self.code_NS.gather(1, back_NJ.clamp(min=0)).masked_fill(back_NJ < 0, -1)
        draft_NT, ending_NTJ = self.draft_NT, self.ending_NTJ
        draft_NT[:, 0], ending_NTJ[:, 0] = root_NJ[:, 0].clamp(min=0), root_NJ
        for number, level in enumerate(self._levels):
            step_N = self.final_N + number
            likely_NPK = self._foreseen(ending_NTJ[:, level.parents], number)
            likely_NPK = likely_NPK + self._noise(step_N[:, None])
            best_NPR = likely_NPK.topk(level.most, dim=-1).indices
            code_NC = best_NPR[:, level.parent_of, level.rank]
            code_NC = code_NC.masked_fill(self.forced_NS.gather(1, step_N[:, None]), 0)
            before_NCJ = ending_NTJ[:, level.parents[level.parent_of]]
            draft_NT[:, level.children] = code_NC
            ending_NTJ[:, level.children] = torch.cat([code_NC[..., None], before_NCJ], -1)[
                ..., :-1
            ]
        return self.final_N[:, None] + self.level_T

    def _noise(self, step_NX: Tensor) -> Tensor:
        index = step_NX[..., None].expand(-1, -1, self.codes)
        return self.noise_NSK.gather(1, index)

    def _foreseen(self, ending_NPJ: Tensor, level: int) -> Tensor:
        """log q of what follows nodes of this level, (N, P, K), by the tree that was planted last:
        from its nodes at the same step, or from the newest step that it had."""
        differs_NPTJ = ending_NPJ[:, :, None] != self.ended_NTJ[:, None]
        penalty_NPT = (differs_NPTJ * self.penalty_J).sum(-1)
        then_N = (self.moved_N + level).clamp(max=self.tree.levels)
        elsewhere_NT = self.level_T != then_N[:, None]
        weight_NPT = (-penalty_NPT).masked_fill(elsewhere_NT[:, None], -torch.inf).softmax(-1)
        return torch.bmm(weight_NPT, self.said_NTK)

    def fed(self, step_NT: Tensor) -> Tensor:
        """The codes of the nodes."""
        return self.draft_NT

    def live(self, step_NT: Tensor) -> Tensor:
        """Which of the steps that `propose` gave are the picture's, (N, T) bool."""
        return step_NT < self.length_N[:, None]

    def judge(self, p_NTK: Tensor) -> None:
        """Goes down every picture's tree as far as it is right.

        Args:
            p_NTK: the distribution of what follows each node, from one forward pass.
        """
        step_NT = self.final_N[:, None] + self.level_T
        said_NTK = p_NTK.log()
        drawn_NT = (said_NTK + self._noise(step_NT)).argmax(-1)
        drawn_NT = drawn_NT.masked_fill(self.forced_NS.gather(1, step_NT), 0)
        at_N1 = torch.zeros_like(self.final_N)[:, None]
        going_N = self.final_N < self.length_N
        mine_N, begun_N = going_N, self.final_N.clone()
        self.way_ND.copy_(torch.arange(1, self.tree.levels + 1, device=at_N1.device))
        for level in range(self.tree.levels + 1):
            step_N1 = (begun_N + level)[:, None]
            code_N1 = drawn_NT.gather(1, at_N1)
            code_N1 = torch.where(going_N[:, None], code_N1, self.code_NS.gather(1, step_N1))
            self.code_NS.scatter_(1, step_N1, code_N1)
            self.final_N.add_(going_N)
            going_N = going_N & (self.final_N < self.length_N)
            is_next_NT = (self.parent_T == at_N1) & (self.level_T == level + 1)
            is_next_NT = is_next_NT & (self.draft_NT == code_N1) & going_N[:, None]
            going_N = is_next_NT.any(1)
            at_N1 = torch.where(going_N[:, None], is_next_NT.int().argmax(1, keepdim=True), at_N1)
            forced_N = self.forced_NS.gather(1, step_N1)[:, 0]
            self.kept_N.add_(going_N & ~forced_N)
            if level < self.tree.levels:
                own_N = self.way_ND[:, level]
                self.way_ND[:, level] = torch.where(going_N, at_N1[:, 0], own_N)
        self.moved_N.copy_(self.final_N - begun_N)
        self.passes_N.add_(mine_N)
        self.said_NTK.copy_(said_NTK.clamp(min=math.log(LEAST)))
        self.ended_NTJ.copy_(self.ending_NTJ)
