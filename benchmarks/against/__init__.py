"""Workers and figures of `peers.py`."""
