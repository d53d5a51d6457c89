"""The engine: read a corpus, separate and score it in one pass, and select training tracks from its stems."""
