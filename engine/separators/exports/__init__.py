"""Separators for others: folders that a model hub takes as they are, and ONNX files."""
