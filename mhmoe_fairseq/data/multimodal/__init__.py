"""Images and texts: index files, which are read without torch and fairseq, and what masked data modelling hides."""
