"""Scores: sets of images, their features, and evaluators that are used in training and offline alike."""
