"""The training step, the loop around it, and everything that must survive a restart."""
