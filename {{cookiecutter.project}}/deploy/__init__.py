"""Errands of a deployment: `python -m deploy`. Development only: the image does not hold it."""
