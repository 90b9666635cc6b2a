"""Where images with captions come from: one module per source, one interface (image_text.images.ImageSource)."""
