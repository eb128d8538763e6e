"""The measurements behind eval.py's one table."""
