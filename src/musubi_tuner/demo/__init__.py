"""The embedded default: pictures made here, captions for them, small encoders, and a score for what a model draws."""
