"""Images and texts: index files, decoding, transforms, masking and the data sets of BEiT-3's tasks.

Nothing is imported here: reading and writing index files needs neither torch nor fairseq.
"""
