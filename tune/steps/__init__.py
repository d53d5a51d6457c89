"""Steps of a run: its artifacts, judges, labels and iterations."""
