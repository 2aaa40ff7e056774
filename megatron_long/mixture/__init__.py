"""Content of a training set: shares, selection, order, plan."""
