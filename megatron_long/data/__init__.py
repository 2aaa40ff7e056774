"""From a corpus with several sources to a mixed, indexed dataset. Imports no torch."""
