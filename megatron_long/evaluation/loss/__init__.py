"""Loss by source and position over held-out documents and plain texts."""
