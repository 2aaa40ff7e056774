"""Triton kernels of the cross entropy: one pass over a chunk's logits for the loss, one for the gradient.

Legend: c positions of the chunk, v columns (rows of the output layer on this rank). Plain PyTorch
versions of both are in `linear_cross_entropy`, and tests compare them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
NUM_WARPS = 8


def row_statistics(logits: Tensor, local_labels: Tensor) -> Tensor:
    """Log-sum-exp, maximum and label's logit of each row; see `chunk_statistics`."""
    num_rows, num_columns = logits.shape
    statistics = torch.empty(3, num_rows, dtype=torch.float32, device=logits.device)
    _row_statistics[(num_rows,)](
        logits,
        local_labels,
        statistics,
        num_rows,
        num_columns,
        logits.stride(0),
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
    )
    return statistics


def row_gradient(
    logits: Tensor, log_sum_exp: Tensor, local_labels: Tensor, scale: Tensor, dtype: torch.dtype
) -> Tensor:
    """Scaled softmax minus one-hot, in `dtype`; see `logit_gradient`."""
    num_rows, num_columns = logits.shape
    grad = torch.empty(num_rows, num_columns, dtype=dtype, device=logits.device)
    grid = (num_rows, triton.cdiv(num_columns, BLOCK))
    _row_gradient[grid](
        logits,
        log_sum_exp.contiguous(),
        local_labels,
        scale.contiguous(),
        grad,
        num_columns,
        logits.stride(0),
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
    )
    return grad


@triton.jit
def _row_statistics(logits, labels, statistics, num_rows, num_columns, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * stride
    columns = tl.arange(0, BLOCK)
    maximum = tl.full((BLOCK,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, num_columns, BLOCK):
        inside = first + columns < num_columns
        values = tl.load(start + first + columns, mask=inside, other=-float("inf"))
        larger = tl.maximum(maximum, values)
        shift = tl.where(larger == -float("inf"), 0.0, larger)  # a lane that saw no column yet
        total = total * tl.exp(maximum - shift) + tl.exp(values - shift)
        maximum = larger
    row_maximum = tl.max(maximum, axis=0)
    row_total = tl.sum(total * tl.exp(maximum - row_maximum), axis=0)
    label = tl.load(labels + row)
    is_local = (label >= 0) & (label < num_columns)
    label_logit = tl.load(start + label, mask=is_local, other=-float("inf"))
    tl.store(statistics + row, row_maximum + tl.log(row_total))
    tl.store(statistics + num_rows + row, row_maximum)
    tl.store(statistics + 2 * num_rows + row, label_logit)


@triton.jit
def _row_gradient(
    logits, log_sum_exp, labels, scale, grad, num_columns, stride, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < num_columns
    values = tl.load(logits + row * stride + columns, mask=inside, other=-float("inf"))
    probability = tl.exp(values - tl.load(log_sum_exp + row))
    one_hot = tl.where(columns == tl.load(labels + row), 1.0, 0.0)
    result = (probability - one_hot) * tl.load(scale + row)
    tl.store(grad + row * num_columns + columns, result.to(grad.dtype.element_ty), mask=inside)
