"""The networks: the CNN encoder, the recurrent decoders, and both in one captioning model."""
