"""From a request to images: modes, pipeline, post-processing, safety, scorers, output."""
