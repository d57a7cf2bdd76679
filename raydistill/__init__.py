"""Distil a small image classifier on your task from a large pre-trained teacher, on a laptop or a Ray cluster.

import raydistill as rd

run = rd.distill("my_images", teacher="timm:vit_base_patch16_224", student="timm:resnet10t")
run.metrics["test_accuracy"], run.report, run.predict("a.jpg")
"""

from raydistill.api import Page, Run, check, compare, distill, keys, load, tune

__all__ = ["Page", "Run", "check", "compare", "distill", "keys", "load", "tune"]
