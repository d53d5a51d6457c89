"""Runs, searches and results shown while they run and in notebooks."""
