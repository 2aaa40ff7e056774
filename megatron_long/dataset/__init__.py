"""The indexed dataset, its manifest, verification, training windows and report."""
