"""Scores of trained networks: functions over a stage's predict functions, used in training and offline alike."""
