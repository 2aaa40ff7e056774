"""What a training set holds: shares, selection, order, plan."""
