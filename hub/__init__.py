"""Hugging Face directories in and out. Imports nothing of ours."""
