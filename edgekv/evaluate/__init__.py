"""Measurements of what a model and its cache lose: `edgekv eval`, `edgekv sweep` and `edgekv verify`.

Everything here is written against edgekv.backends.base.Backend, so any engine and any cache type is measured by
the same code. Each measure keeps a journal (edgekv.evaluate.journal): killed, it goes on where it was.
"""
