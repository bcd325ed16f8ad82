"""What can be trained: a module or folder per task, with its `TASK` as `tasks/interface.py` says."""
