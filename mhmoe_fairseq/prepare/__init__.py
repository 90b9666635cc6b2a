"""What ``mhmoe prepare`` makes: corpora, vocabularies, binarised data and index files from named sources."""
