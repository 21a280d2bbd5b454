"""In which form an operator is applied beside a weight: the cheapest, by the multiply-adds of a training step."""

from enum import Enum

from rankwise.ops.operator import LinearOperator

VECTOR = 16  # numbers that a CPU multiplies at once, in float32
ENTRY = 100  # multiply-adds in the time that forming, adding and differentiating a matrix takes for each entry
NODE = 20_000_000  # and in the time of the small operations around it


class Form(Enum):
    """How ``x (W + op)^T`` is computed."""

    LOW_RANK = "low rank"  # by the factors of op.lower()
    OWN = "own"  # by op.mv, as the operator itself prefers
    WHOLE = "whole"  # by the matrix of op


def about(tokens: int) -> int:
    """The power of two at or below a number of tokens: batches that differ little are run alike."""
    return 1 << max(tokens, 1).bit_length() - 1


def costs(op: LinearOperator, tokens: int, together: bool) -> dict[Form, int]:
    """Multiply-adds of forward and backward above the frozen weight's own, by form.

    Args:
        op: (M, N).
        tokens: how many x has.
        together: whether W + op may be formed as one weight.

    Returns:
        The forms that op has, with their multiply-adds.
    """
    (m, n), (apply, form), rank = op.shape, op.cost, op.rank
    # formed in forward and in backward, its gradient g^T x taken through the same products twice
    found = {} if rank is None else {Form.LOW_RANK: 3 * tokens * rank * (m + n)}
    if apply < m * n:
        found[Form.OWN] = 3 * tokens * apply
    return found | {Form.WHOLE: (1 if together else 3) * tokens * m * n + 4 * form + ENTRY * m * n + NODE}


def cheapest(op: LinearOperator, tokens: int, together: bool) -> Form:
    """The form with the fewest multiply-adds, the first of equal ones."""
    found = costs(op, tokens, together)
    return min(found, key=found.__getitem__)
