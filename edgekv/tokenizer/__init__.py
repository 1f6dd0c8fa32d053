"""Vocabularies, BPE and pre-tokenization: text to tokens and back, as llama.cpp does it."""
