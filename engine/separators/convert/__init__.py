"""Checkpoints that other projects released, made into folders of this project; foreign pickles are opened only here."""
