"""A report: one page of curves and tables, made from the folders of runs."""
