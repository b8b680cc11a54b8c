"""Supervised fine-tuning as a pipeline of filters over plain files: tokenize, mask, train, generate."""

__version__ = "0.1.0"
