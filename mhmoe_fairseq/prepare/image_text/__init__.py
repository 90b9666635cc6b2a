"""From images and their captions to a prepared folder for pre-training and fine-tuning."""
