"""Stretch Llama-class models to 128K tokens with Megatron-Core.

The recipe is that of Fu et al. 2024, "Data Engineering for Scaling Language Models to 128K Context"
(arXiv 2402.10171). README.md has the map of the package.
"""

__version__ = "0.2.0"
