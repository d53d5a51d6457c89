"""Tracks of a selection in formats that other programs load: WebDataset, Hugging Face's datasets, FLAC files."""
