"""A key/value cache of fixed size whose rows are at places of their own.

Every row of a painting model's forward pass is a picture of its own: rows begin, end and go back on
their own, so each writes at its own columns, and a token sees the columns up to its own position.
There is no padding on the left: column and position are the same. What lies behind a row's position
is rubbish of earlier pictures, which no token sees before it is written over.

Legend: B rows of a forward pass, T tokens, R rows and C columns of the cache, H heads, w a head's
width.
"""

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin


class _Place:
    """Where the tokens of the running forward pass belong; shared by all layers."""

    def __init__(self) -> None:
        self.rows_B1: Tensor | None = None  # None: row b of the pass is row b of the cache
        self.columns_BT: Tensor | None = None
        self.fresh = False  # nothing in the cache is seen: the rows begin with this pass


class _Layer(CacheLayerMixin):
    is_compileable = True
    is_sliding = False  # windows are in the masks (`visible`), all columns are kept

    def __init__(self, place: _Place, rows: int, columns: int) -> None:
        super().__init__()
        self._place, self._rows, self._columns = place, rows, columns

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        # zeros, not empty: masked columns are multiplied by 0, and NaN would stay NaN. One row more
        # than is read: where a pass over fewer pictures than rows writes what nobody wants.
        def zeros(like: Tensor) -> Tensor:
            return like.new_zeros(self._rows + 1, like.shape[1], self._columns, like.shape[3])

        self.keys, self.values = zeros(key_states), zeros(value_states)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Stores (B, H, T, w) at the place; returns what is attended to, (B, H, T or C, w)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        place = self._place
        assert place.columns_BT is not None, "RowCache.begin or .go_on comes before a forward pass"
        rows_B1 = place.rows_B1
        if rows_B1 is None:
            rows_B1 = torch.arange(len(key_states), device=key_states.device)[:, None]
        keys, values = self.keys, self.values
        assert keys is not None
        assert values is not None
        keys[rows_B1, :, place.columns_BT] = key_states.transpose(1, 2)
        values[rows_B1, :, place.columns_BT] = value_states.transpose(1, 2)
        if place.fresh:
            return key_states, value_states
        return keys[: self._rows], values[: self._rows]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._columns, 0

    def get_seq_length(self) -> int:
        return 0  # read where a model gets no positions, and it always gets them

    def get_max_length(self) -> int:
        return self._columns

    def get_max_cache_shape(self) -> int:  # what transformers before 5.18 calls it
        return self._columns


class RowCache(Cache):
    """Keys and values (R, H, C, w) of every layer. Forward passes go through `begin` or `go_on`.

    Attributes:
        rows, columns: R and C.
        hidden_RC: columns that nobody sees but their own token (empty caption slots), or None.
        seen_TT: which tokens of a pass a token sees, where passes hold trees of tokens; or None.
    """

    def __init__(self, layers: int, rows: int, columns: int) -> None:
        self._place = _Place()
        super().__init__(layers=[_Layer(self._place, rows, columns) for _ in range(layers)])
        self.rows, self.columns = rows, columns
        self.hidden_RC: Tensor | None = None
        self.seen_TT: Tensor | None = None

    @property
    def nobody(self) -> int:
        """The row whose content is never read."""
        return self.rows

    def begin(self, rows_B: Tensor, tokens: int) -> None:
        """The next pass holds the first tokens of these rows, at columns 0 to T - 1. It sees none
        but its own tokens."""
        place = self._place
        place.rows_B1 = rows_B[:, None]
        columns_T = torch.arange(tokens, device=rows_B.device)
        place.columns_BT = columns_T.expand(len(rows_B), -1)
        place.fresh = True

    def branch(self, seen_TT: Tensor) -> None:
        """From now on passes hold trees of T tokens, the first of which is the root: token t sees
        what is before the root, and the tokens of its row of `seen_TT` (bool). They have columns
        of their own behind each other, from the root's position on; see `keep`."""
        self.seen_TT = seen_TT

    def go_on(self, positions_BT: Tensor) -> None:
        """The next pass holds tokens of all rows, each at a position of its own."""
        assert len(positions_BT) == self.rows, "a step has all rows"
        place = self._place
        place.rows_B1, place.columns_BT, place.fresh = None, self._columns(positions_BT), False

    def _columns(self, positions_BT: Tensor) -> Tensor:
        if self.seen_TT is None:
            return positions_BT
        return positions_BT[:, :1] + torch.arange(len(self.seen_TT), device=positions_BT.device)

    def keep(self, from_RD: Tensor, to_RD: Tensor) -> None:
        """Copies columns within each row: what a tree's pass left at a column may be the token of
        another position."""
        row_R1 = torch.arange(self.rows, device=from_RD.device)[:, None]
        for layer in self.layers:
            assert isinstance(layer, _Layer)
            for table in (layer.keys, layer.values):
                assert table is not None
                table[row_R1, :, to_RD] = table[row_R1, :, from_RD]

    def hide(self, rows_B: Tensor, hidden_BT: Tensor) -> None:
        """Hides columns 0 to T - 1 of these rows where `hidden_BT` (bool) says so."""
        if self.hidden_RC is None:
            shape = (self.rows + 1, self.columns)
            self.hidden_RC = torch.zeros(shape, dtype=torch.bool, device=hidden_BT.device)
        self.hidden_RC[rows_B, : hidden_BT.shape[1]] = hidden_BT

    def seen(self, positions_BT: Tensor, window: int | None = None) -> Tensor:
        """Which columns the tokens of a `go_on` pass see, (B, T, C) bool; see `visible`."""
        seen_BTC = visible(positions_BT, self.columns, window)
        if self.seen_TT is not None:
            columns_C = torch.arange(self.columns, device=positions_BT.device)
            seen_BTC = seen_BTC & (columns_C < positions_BT[:, :1, None])
            near_BTT = self.seen_TT.expand(len(positions_BT), -1, -1)
            if window is not None:
                near_BTT = near_BTT & (positions_BT[:, :, None] - positions_BT[:, None] < window)
            columns_B1T = self._columns(positions_BT)[:, None].expand_as(near_BTT)
            seen_BTC = seen_BTC.scatter(2, columns_B1T, near_BTT)
        if self.hidden_RC is None:
            return seen_BTC
        itself_BTC = self._columns(positions_BT)[..., None] == torch.arange(
            self.columns, device=positions_BT.device
        )
        return (seen_BTC & ~self.hidden_RC[: self.rows, None]) | itself_BTC


def visible(positions_BT: Tensor, columns: int, window: int | None = None) -> Tensor:
    """Which columns tokens at these positions see, (B, T, C) bool: up to their own, and no further
    back than `window`."""
    columns_C = torch.arange(columns, device=positions_BT.device)
    back_BTC = positions_BT[..., None] - columns_C
    seen_BTC = back_BTC >= 0
    return seen_BTC if window is None else seen_BTC & (back_BTC < window)
