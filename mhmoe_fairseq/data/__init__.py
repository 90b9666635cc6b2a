"""Corpora and vocabularies: what ``mhmoe prepare`` makes and the tasks read.

Nothing is imported here, so that ``mhmoe_fairseq.data.vocabularies`` and the command line stay quick to load.
"""
