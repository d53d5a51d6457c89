"""Separate and score audio files, whatever their format, length, rate and number of channels."""
