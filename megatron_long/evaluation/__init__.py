"""What a model does with its context: needle in a haystack, loss by source and position."""
