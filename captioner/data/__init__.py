"""From files to batches: captions, words and their ids, photographs, training's batches."""
