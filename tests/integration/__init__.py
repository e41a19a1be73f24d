"""Trainings in real ranks that are quick enough for every change."""
