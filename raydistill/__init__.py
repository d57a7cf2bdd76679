"""Distil a small image classifier on your task from a large pre-trained teacher."""
