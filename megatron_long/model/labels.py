"""Special values of labels; needs no torch."""

UNSCORED = -1
"""Label of a position that is not scored; its loss is 0."""
