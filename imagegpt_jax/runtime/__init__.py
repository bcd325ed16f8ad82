"""Processes and machines: distributed start, watchdog, preemption, file systems, hardware."""
