"""Networks: the image tokenizer and its discriminator, the decoder, and frozen networks under `pretrained`."""
