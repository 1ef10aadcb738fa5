"""HTML reports, charts and tables of runs."""
