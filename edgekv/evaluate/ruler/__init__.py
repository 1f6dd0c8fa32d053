"""The 13 kinds of tasks of RULER (Hsieh et al., arXiv 2404.06654), made from a seed, of any length in a model's tokens.

Eight kinds of needles, variable tracking, common and frequent words, and two kinds of questions about documents.
The kinds, their settings and their scores are the paper's; the wording and the code are EdgeKV's own, and the
documents are cut from a text that the user names, so scores compare caches, not models with published figures.
"""
