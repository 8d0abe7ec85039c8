"""ReTool: teach a language model when to run code."""

__version__ = "0.1.0"
