"""Runs turned into one page of curves and tables, from what their folders hold."""
