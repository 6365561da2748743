"""A Flower app that trains VGG16; `wire_bytes.py` copies ``vgg16_update.py`` in."""
