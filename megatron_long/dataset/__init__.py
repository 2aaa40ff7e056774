"""What is written and read back: the indexed dataset, its manifest, its check, its windows, its report."""
