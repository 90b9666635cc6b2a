"""Where pictures with captions come from: one module per source, one interface (image_text.pictures.PictureSource)."""
