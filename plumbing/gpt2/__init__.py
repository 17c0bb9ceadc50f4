"""Beside the page of the model: its files, batches, keys and values, memory."""
