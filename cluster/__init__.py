"""Running on a cluster: connecting to Ray, submitting jobs, checking nodes; knows only ``engine.errors``."""
