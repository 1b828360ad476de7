"""Elastic pre-training of causal language models with Token Superposition on Ray."""

__version__ = "0.2.0"
