"""Scores of stems without a known truth, and the estimate of their SI-SDR from these scores."""
