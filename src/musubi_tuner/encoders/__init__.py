"""Frozen networks used while caching and sampling: autoencoders, text encoders, teachers."""
