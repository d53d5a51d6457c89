"""The report of a run, a pass or a search: one HTML file that needs no network."""
