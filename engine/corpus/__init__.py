"""Corpora: manifests, folders and AudioSet's lists, read into clips with stable ids and failures with reasons."""
