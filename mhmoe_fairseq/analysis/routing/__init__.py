"""What the experts of a trained model did on a data set."""
