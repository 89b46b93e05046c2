"""What `train.py` does: plan, run the due stages as children, then train."""
