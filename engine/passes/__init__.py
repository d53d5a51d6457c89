"""A pass: separate and score every clip of a corpus, write the stems in shards, record what failed and why."""
