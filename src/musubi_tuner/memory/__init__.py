"""Memory tricks: they wrap a model from outside and are unknown to it."""
