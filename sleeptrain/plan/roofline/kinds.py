"""The kinds of work that a count tells apart, and what the operators of torch are."""

from __future__ import annotations

from enum import Enum


class Kind(Enum):
    """The kind of work of a kernel.

    HEAD: products with the head's matrix. LOSS: all other work of head and loss. SUM: what adds gradients of weights up
    over the rounds of a step beside the products that do so themselves.
    """

    PRODUCT = "matrix products"
    ATTENTION = "attention"
    RECURRENCE = "recurrences"
    NORM = "norms, convolutions, SwiGLU"
    ELEMENTWISE = "elementwise"
    CAST = "casts"
    EMBEDDING = "embeddings"
    HEAD = "products of the head"
    LOSS = "loss"
    SUM = "sums of weight gradients"


# Names of packets in torch.ops.aten, without the underscore of work in place.
PRODUCTS = frozenset({"mm", "addmm", "bmm", "baddbmm"})
CASTS = frozenset({"_to_copy", "copy"})  # where the dtype changes
REDUCTIONS = frozenset({"sum", "mean", "amax", "amin", "linalg_vector_norm", "linalg_vecdot", "prod", "any"})
EMBEDDINGS = frozenset({"embedding", "embedding_dense_backward"})
# They write numbers and read nothing; a compiler puts the numbers into the kernel that uses them.
MADE = frozenset(
    {"zeros", "zeros_like", "new_zeros", "ones", "ones_like", "new_ones", "full", "full_like", "new_full", "arange",
     "scalar_tensor", "fill", "zero"}
)  # fmt: skip
# Elementwise, though torch does not tag them so.
ELEMENTWISE = frozenset(
    {"repeat", "constant_pad_nd", "slice_backward", "select_backward", "softplus_backward",
     "silu_backward", "copy", "_to_copy", "clone"}
)  # fmt: skip
# They launch nothing: memory without values, and questions.
FREE = frozenset(
    {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "device", "promote_types", "dim",
     "is_same_size", "_has_same_storage_numel", "lift_fresh", "_reshape_alias", "_unsafe_view", "detach", "alias"}
)  # fmt: skip
# Kernels of a call that launches several: zeros and then the values; a sort of indices before sums of rows, of as many
# passes as indices have bytes.
KERNELS = {
    "_index_put_impl": 12,
    "slice_backward": 2,
    "select_backward": 2,
    "nll_loss_backward": 2,
    "embedding_dense_backward": 6,
    "index_put": 6,
}
# They read or write some rows of a table, as many as their other tensors have.
READ_ROWS = frozenset({"index", "index_select", "gather", "embedding"})
WRITE_ROWS = frozenset({"index_add", "scatter_add", "index_copy", "_index_put_impl"})
