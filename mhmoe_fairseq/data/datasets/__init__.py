"""The data sets of pre-training and fine-tuning; a sample is decoded where it is drawn, in a worker of the loader."""
