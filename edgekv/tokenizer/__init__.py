"""Vocabularies, byte-pair encodings and pre-tokenizers: text to tokens and back, as llama.cpp does it.

They are our own because a cache, a perplexity or a KL means something only if every token is the engine's: the tests
compare with llama.cpp for every code point. Hugging Face's `tokenizers` cuts text into words, by expressions that were
made equal to llama.cpp's (pre_tokenize); its byte-pair merging would give the same tokens, but holds 49,152 of them in
20 MB, which a board like the Zero 2 W needs for the model. SentencePiece's encoding, by score and with single bytes for
unknown characters, is not in it.
"""
