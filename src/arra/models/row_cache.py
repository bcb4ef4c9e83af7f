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
    """

    def __init__(self, layers: int, rows: int, columns: int) -> None:
        self._place = _Place()
        super().__init__(layers=[_Layer(self._place, rows, columns) for _ in range(layers)])
        self.rows, self.columns = rows, columns
        self.hidden_RC: Tensor | None = None

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

    def go_on(self, columns_BT: Tensor) -> None:
        """The next pass holds tokens of all rows, each at these columns of its own."""
        assert len(columns_BT) == self.rows, "a step has all rows"
        place = self._place
        place.rows_B1, place.columns_BT, place.fresh = None, columns_BT, False

    def hide(self, rows_B: Tensor, hidden_BT: Tensor) -> None:
        """Hides columns 0 to T - 1 of these rows where `hidden_BT` (bool) says so."""
        if self.hidden_RC is None:
            shape = (self.rows + 1, self.columns)
            self.hidden_RC = torch.zeros(shape, dtype=torch.bool, device=hidden_BT.device)
        self.hidden_RC[rows_B, : hidden_BT.shape[1]] = hidden_BT

    def seen(self, columns_BT: Tensor) -> Tensor:
        """Which columns the tokens of a `go_on` pass see, (B, T, C) bool."""
        seen_BTC = visible(columns_BT, self.columns)
        if self.hidden_RC is None:
            return seen_BTC
        itself_BTC = columns_BT[..., None] == torch.arange(self.columns, device=columns_BT.device)
        return (seen_BTC & ~self.hidden_RC[: self.rows, None]) | itself_BTC


def visible(positions_BT: Tensor, columns: int, window: int | None = None) -> Tensor:
    """Which columns tokens at these positions see, (B, T, C) bool: up to their own, and no further
    back than `window`."""
    columns_C = torch.arange(columns, device=positions_BT.device)
    back_BTC = positions_BT[..., None] - columns_C
    seen_BTC = back_BTC >= 0
    return seen_BTC if window is None else seen_BTC & (back_BTC < window)
