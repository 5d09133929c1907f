"""Hugging Face: which models can be served, the attention implementation "lil", and its cache."""
