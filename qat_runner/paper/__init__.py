"""Reproduction of the paper's tables and figures: the published numbers beside the results of runs."""
